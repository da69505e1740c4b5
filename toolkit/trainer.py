"""What SFT and DPO share around TRL's trainers: their arguments, checkpoints, and running one to its end."""

import json
import math
from pathlib import Path
from typing import Any

import torch
from transformers.integrations import get_reporting_integration_callbacks
from transformers.trainer_callback import PrinterCallback, ProgressCallback

from toolkit import model
from toolkit.chat import first_line
from toolkit.errors import ModelError, RunError
from toolkit.job import StageJob
from toolkit.plan import Hardware, StagePlan
from toolkit.probe import Probe, explained
from toolkit.progress import Metrics, Progress, say
from toolkit.rundir import storage

# Settings that shape the rows. The toolkit has applied them by the time the trainer gets its rows.
APPLIED_TO_ROWS = ("completion_only_loss", "assistant_only_loss")
CHECKPOINT_FILES = ("adapter_model.safetensors", "optimizer.pt", "scheduler.pt")  # and rng_state*.pth, one per process


def arguments(config_class: Any, job: StageJob, **own: Any) -> Any:
    """`SFTConfig` or `DPOConfig` of the stage; checkpoints go to `folder/checkpoints`.

    Args:
        own: fields that the stage's own module sets.

    Raises:
        ModelError: a value or combination that TRL or transformers refuse.
        RunError: one process sees several GPUs.
    """
    settings = {key: value for key, value in job.plan.trainer.items() if key not in APPLIED_TO_ROWS}
    if job.hardware.device == "cpu":
        settings["use_cpu"] = True  # TrainingArguments sets the process group up anew, and must find it there
        settings.setdefault("dataloader_pin_memory", False)
    try:
        output_dir = str(job.folder / "checkpoints")
        args = config_class(output_dir=output_dir, seed=job.recipe.seed, disable_tqdm=True, **{**settings, **own})
        for tracker in get_reporting_integration_callbacks(args.report_to):
            tracker()  # says whether its package is installed
    except (ValueError, TypeError, ImportError, RuntimeError) as error:
        raise ModelError(f"{job.where('trainer')}: {first_line(error)}") from None
    if args.n_gpu > 1:
        raise RunError(
            f"{args.n_gpu} GPUs are visible to one process, which would split batches among them; use "
            f"`accelerate launch --num_processes {args.n_gpu} -m toolkit ...`, or CUDA_VISIBLE_DEVICES=0 for one"
        )
    return args


def fit(trainer: Any, job: StageJob, probe: bool = True) -> dict[str, float]:
    """Train to the end, from the last complete checkpoint if there is one.

    Args:
        probe: On CUDA, run the longest batch forward and backward before the first step.

    Returns:
        transformers' closing metrics (`train_runtime` in seconds, `train_loss`, ...), and `peak_memory_bytes`.

    Raises:
        RunError: the disk is full or not writable, or memory is; checkpoints stay as they are.
    """
    progress = Progress(job.plan.name)
    for callback in (PrinterCallback, ProgressCallback):
        trainer.remove_callback(callback)
    trainer.add_callback(Metrics(job.folder / "metrics.jsonl"))
    trainer.add_callback(progress)
    if probe and job.hardware.device == "cuda":
        trainer.add_callback(Probe(trainer, job))
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    checkpoint = last_checkpoint(job.folder / "checkpoints")
    if checkpoint is not None:
        say(f"  resumes from {checkpoint.name}")
    try:
        with storage(job.folder), explained(job, job.folder / "checkpoints"):
            result = trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    finally:
        progress.close()
    return dict(result.metrics) | {"peak_memory_bytes": model.peak_memory()}


def last_checkpoint(folder: Path) -> Path | None:
    """The newest checkpoint that is whole: `trainer_state.json`, which is written last, is there and readable."""
    found = sorted(folder.glob("checkpoint-*"), key=lambda p: int(p.name.split("-")[-1]), reverse=True)
    return next((path for path in found if _is_complete(path)), None)


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


def _is_complete(path: Path) -> bool:
    try:
        json.loads((path / "trainer_state.json").read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError):
        return False
    files = {file.name for file in path.iterdir()}
    return all(name in files for name in CHECKPOINT_FILES) and any(f.startswith("rng_state") for f in files)


def release() -> None:
    """Give the memory of deleted models back before the next one is loaded."""
    import gc

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
