"""What SFT and DPO share around TRL's trainers: their arguments, and running one to its end or to a signal."""

import math
from typing import Any

import torch
from transformers import Trainer, TrainerCallback
from transformers.trainer_callback import PrinterCallback, ProgressCallback
from transformers.utils import is_liger_kernel_available

from toolkit.errors import ModelError, RunError
from toolkit.job import StageJob
from toolkit.launching import signals
from toolkit.launching.processes import from_main
from toolkit.recipe.plan import Hardware, StagePlan
from toolkit.records.rundir import storage
from toolkit.training import checkpoints, nonfinite, trackers
from toolkit.training.probe import Probe, explained
from toolkit.training.progress import Metrics, Progress, say
from toolkit.wording import first_line

# Settings that shape the rows. The toolkit has applied them by the time the trainer gets its rows.
APPLIED_TO_ROWS = ("completion_only_loss", "assistant_only_loss")


def arguments(config_class: Any, job: StageJob, **own: Any) -> Any:
    """`SFTConfig` or `DPOConfig` of the stage; checkpoints go to `folder/checkpoints`.

    Args:
        own: fields that the stage's own module sets.

    Raises:
        ModelError: a value or combination that TRL or transformers refuse, or a package that is not installed.
        RunError: one process sees several GPUs.
    """
    settings = {key: value for key, value in job.plan.trainer.items() if key not in APPLIED_TO_ROWS}
    settings.setdefault("run_name", trackers.run_name(job))
    if job.hardware.device == "cpu":
        settings["use_cpu"] = True  # TrainingArguments sets the process group up anew, and must find it there
        settings.setdefault("dataloader_pin_memory", False)
    try:
        output_dir = str(job.folder / checkpoints.FOLDER)
        args = config_class(output_dir=output_dir, seed=job.recipe.seed, disable_tqdm=True, **{**settings, **own})
        trackers.check(args.report_to)
        _check_packages(args)
    except (ValueError, TypeError, ImportError, RuntimeError) as error:
        raise ModelError(f"{job.where('trainer')}: {first_line(error)}") from None
    if args.n_gpu > 1:
        raise RunError(
            f"{args.n_gpu} GPUs are visible to one process, which would split batches among them; use "
            f"`accelerate launch --num_processes {args.n_gpu} -m toolkit ...`, or CUDA_VISIBLE_DEVICES=0 for one"
        )
    return args


def _check_packages(args: Any) -> None:
    """Find out whether the packages are installed that transformers asks for only when a stage starts to train.

    Raises:
        ImportError, ValueError
    """
    if args.use_liger_kernel and not is_liger_kernel_available():
        raise ImportError("use_liger_kernel: liger-kernel is not installed; pip install liger-kernel")
    try:
        Trainer.get_optimizer_cls_and_kwargs(args)
    except ValueError as error:
        if "You need to pass a" not in str(error):  # a few look at the model, which is not there yet
            raise


class StopAtStep(TrainerCallback):
    """Ends training with a checkpoint after the step in which a signal came in, to whichever process it came."""

    def __init__(self, note: signals.Note):
        self.note = note
        self.agreed = 0
        """The signal that every process ends on; 0 for none."""

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.agreed = self.note.signum
        if args.world_size > 1:
            flag = torch.tensor(self.note.signum, device=args.device)
            torch.distributed.all_reduce(flag, torch.distributed.ReduceOp.MAX)
            self.agreed = int(flag)
        if self.agreed:
            control.should_save = control.should_training_stop = True


def fit(trainer: Any, job: StageJob, probe: bool = True) -> dict[str, float]:
    """Train to the end, from the last good checkpoint if there is one.

    Args:
        probe: On CUDA, run the longest batch forward and backward before the first step.

    Returns:
        transformers' closing metrics (`train_runtime` in seconds, `train_loss`, ...).

    Raises:
        RunError: the disk is full or not writable, or memory is; checkpoints stay as they are.
        ProofError: too many steps in a row, or the last ones, whose loss or gradient is not finite.
        Stopped: by a signal, after the step at work and a checkpoint.
    """
    progress = Progress(job.plan.name)
    for callback in (PrinterCallback, ProgressCallback):
        trainer.remove_callback(callback)
    trainer.add_callback(Metrics(job.folder / "metrics.jsonl"))
    trainer.add_callback(progress)
    if probe and job.hardware.device == "cuda":
        trainer.add_callback(Probe(trainer, job))
    trainer.job = job
    start = _resume_from(job)
    with trackers.own_run(trainer, job):
        try:
            with storage(job.folder), explained(job), signals.noted() as note:
                stop = StopAtStep(note)
                trainer.add_callback(stop)
                result = trainer.train(resume_from_checkpoint=start)
        finally:
            progress.close()
    if stop.agreed:
        raise signals.Stopped(stop.agreed, _kept(trainer, job))
    nonfinite.check_end(trainer, job)
    return dict(result.metrics)


def _resume_from(job: StageJob) -> str | None:
    """The main process reads the checkpoints for all: what is damaged is damaged for everyone."""
    checkpoint, damaged = from_main(checkpoints.newest(job.folder / checkpoints.FOLDER))
    for line in damaged:
        say(f"  {line}")
    if checkpoint is not None:
        say(f"  resumes from {checkpoint.name}")
    return str(checkpoint) if checkpoint else None


def _kept(trainer: Any, job: StageJob) -> str:
    good, _ = checkpoints.newest(job.folder / checkpoints.FOLDER)
    return f"after step {trainer.state.global_step} of {job.plan.name}; " + (f"kept in {good}" if good else "none kept")


def optimizer_steps(rows: int, plan: StagePlan, hardware: Hardware) -> int:
    """Optimizer steps that transformers' Trainer will take over `rows` rows."""
    if plan.trainer.get("max_steps", -1) > 0:
        return int(plan.trainer["max_steps"])
    per_device = plan.trainer.get("per_device_train_batch_size", 8)
    if plan.trainer.get("dataloader_drop_last"):
        batches = rows // per_device // hardware.processes
    else:
        batches = math.ceil(math.ceil(rows / per_device) / hardware.processes)
    per_epoch = max(math.ceil(batches / plan.trainer.get("gradient_accumulation_steps", 1)), 1)
    return math.ceil(plan.trainer["num_train_epochs"] * per_epoch)


def repeated_rows(rows: int, plan: StagePlan, hardware: Hardware) -> int:
    """Rows that accelerate trains on twice in an epoch, so that the last batch of every process is full."""
    if hardware.processes == 1 or plan.trainer.get("dataloader_drop_last"):
        return 0
    together = plan.trainer.get("per_device_train_batch_size", 8) * hardware.processes
    return -rows % int(together)


def release() -> None:
    """Give the memory of deleted models back before the next one is loaded."""
    import gc

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
