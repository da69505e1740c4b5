"""Steps whose loss or gradient is not finite: not applied, said with their rows, and few."""

import math
from itertools import accumulate, islice
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object

from toolkit.errors import ProofError
from toolkit.job import StageJob
from toolkit.training.checkpoints import FOLDER, newest
from toolkit.training.progress import say

ROWS_NAMED = 16


class FiniteSteps:
    """In front of a transformers `Trainer`: leaves out a step whose loss or gradient is NaN or infinite.

    Such a step counts, so that the schedule stays as it was, but changes no weight and no optimizer state. After
    `stop_after_nonfinite` of them in a row training stops. With fp16 the loss scaler looks for its scale by overflowing
    gradients and leaves those steps out itself: there only the loss counts. transformers takes the norm of all
    gradients in `_get_grad_norm`, before the optimizer's step; there is no public place that knows it. Remove when
    callbacks are given it.
    """

    job: StageJob | None = None
    """The stage, for its rows and its limit; set by `trainer.fit`."""
    not_finite = 0
    """Steps in a row, up to now."""
    _finite: Any = True

    args: Any
    state: Any
    accelerator: Any
    optimizer: Any
    callback_handler: Any
    train_dataset: Any
    is_deepspeed_enabled: bool

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """One micro-batch, as in the trainer itself; its loss is remembered until the optimizer's step."""
        loss: torch.Tensor = super().training_step(*args, **kwargs)  # type: ignore[misc]
        self._finite = torch.isfinite(loss).all() & self._finite
        return loss

    def _get_grad_norm(self, model: Any, grad_norm: Any = None) -> Any:
        norm = super()._get_grad_norm(model, grad_norm)  # type: ignore[misc]
        finite, self._finite = bool(self._finite), True
        scaled = self.accelerator.scaler is not None
        if not scaled and norm is not None:
            finite = finite and math.isfinite(float(norm))
        if self._everywhere(finite):
            self.not_finite = 0
            return norm
        if not scaled:
            self.optimizer.zero_grad(set_to_none=True)  # optimizers pass over parameters without a gradient
        self.not_finite += 1
        if self.job is not None:
            self._tell(self.job)
        return norm

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        if not self.not_finite:  # else the last good one is the newest
            super()._save_checkpoint(model, trial)  # type: ignore[misc]

    def _everywhere(self, finite: bool) -> bool:
        if self.args.world_size == 1:
            return finite
        flag = torch.tensor(int(finite), device=self.args.device)
        torch.distributed.all_reduce(flag, torch.distributed.ReduceOp.MIN)
        return bool(flag)

    def _tell(self, job: StageJob) -> None:
        """
        Raises:
            ProofError: it is one step too many.
        """
        rows = sorted(set(gather_object(rows_of_step(self, job))))
        named = ", ".join(rows[:ROWS_NAMED]) + (f" and {len(rows) - ROWS_NAMED} more" if len(rows) > ROWS_NAMED else "")
        what = f"the loss or gradient of step {self.state.global_step + 1} is not finite"
        limit = 1 if self.is_deepspeed_enabled else job.recipe.stages[job.plan.index].stop_after_nonfinite
        if self.not_finite >= limit:
            raise ProofError(f"{job.plan.name}: {what}{_in_a_row(self.not_finite)}; its rows: {named}. {_way_out(job)}")
        say(f"  {what}: the step is left out, {self.not_finite} of {limit} in a row before it stops; its rows: {named}")


def check_end(trainer: Any, job: StageJob) -> None:
    """Refuse a stage that ended on steps that were not finite.

    Raises:
        ProofError
    """
    if trainer.not_finite:
        what = f"training ended on steps whose loss or gradient is not finite{_in_a_row(trainer.not_finite)}"
        raise ProofError(f"{job.plan.name}: {what}. {_way_out(job)}")


def rows_of_step(trainer: Any, job: StageJob) -> list[str]:
    """The rows of the optimizer step at work, on this process, as `pairs.jsonl row 7`, counted from 0 in each source.

    The sampler is asked again what it gave: nothing is written down while steps are fine.
    """
    loader = trainer.callback_handler.train_dataloader
    sampler, batches = loader.batch_sampler, trainer.args.gradient_accumulation_steps
    epoch, step = divmod(trainer.state.global_step, max(math.ceil(len(loader) / batches), 1))
    loader.set_epoch(epoch)
    inner = getattr(sampler, "batch_sampler", sampler)
    if hasattr(inner, "set_epoch"):
        inner.set_epoch(epoch)
    indices = [i for batch in islice(sampler, step * batches, (step + 1) * batches) for i in batch]
    loader.set_epoch(epoch)  # going through it may have moved it on
    return [name for i in indices for name in _names(job, trainer.train_dataset[i], i)]


def _names(job: StageJob, row: dict[str, Any], index: int) -> list[str]:
    """Where a row of the trainer's comes from: a packed one from several; TRL may have shuffled them."""
    train = job.data.train
    if "prompt_ids" in row or (not job.plan.trainer.get("packing") and not job.plan.trainer.get("shuffle_dataset")):
        return [_name(job, index)]
    lengths = row.get("seq_lengths") or [len(row["input_ids"])]
    documents = {tuple(row["input_ids"][end - n : end]) for n, end in zip(lengths, accumulate(lengths), strict=True)}
    found = [i for i, ids in enumerate(train["input_ids"]) if tuple(ids) in documents]
    return [_name(job, i) for i in found] or [f"packed row {index}"]


def _name(job: StageJob, index: int) -> str:
    sources = job.recipe.stages[job.plan.index].data
    for source, loaded in zip(sources, job.data.sources, strict=True):
        rows = loaded.kept()
        if index < len(rows):
            path = Path(source.path)
            return f"{path.name if path.is_absolute() else source.path} row {rows[index]}"
        index -= len(rows)
    return f"training row {index}"


def _in_a_row(n: int) -> str:
    return f", the last {n} in a row" if n > 1 else ""


def _way_out(job: StageJob) -> str:
    good, _ = newest(job.folder / FOLDER)
    kept = f"the last good checkpoint is {good}" if good else "no checkpoint was written before"
    return f"Lower the learning rate, or take these rows out; {kept}"
