"""Out of memory, said early and usefully: one forward and backward on the longest batch, before the first step.

A run that would fail at hour six, when the longest rows come together, fails in minute one. Nothing that training
depends on is changed. Out of memory at any later moment is said in the same words.
"""

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any, Concatenate, ParamSpec, TypeVar

import torch
from transformers import TrainerCallback

from toolkit.errors import RunError, ToolkitError
from toolkit.job import StageJob
from toolkit.models import model
from toolkit.recipe.plan import quantization
from toolkit.records.rundir import exhausted, out_of_memory
from toolkit.resources import estimate, longest, relief
from toolkit.training.checkpoints import FOLDER, newest
from toolkit.training.progress import say
from toolkit.wording import amount, first_line

P = ParamSpec("P")
T = TypeVar("T")


class Probe(TrainerCallback):
    """Probes when training begins: the model is wrapped and on its device by then, and a checkpoint is loaded."""

    def __init__(self, trainer: Any, job: StageJob):
        self.trainer, self.job = trainer, job

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        if self.trainer.is_deepspeed_enabled:
            say("  probe: left out, as DeepSpeed counts every backward pass as a step of its own")
            return
        try:
            peak = probe(self.trainer, self.job, model)
        except torch.OutOfMemoryError as error:
            raise RunError(explanation(self.job, error, "on the longest batch, before the first step")) from error
        if peak:
            say(f"  probe: the longest batch fits, {amount(peak)} at its peak")


def probe(trainer: Any, job: StageJob, wrapped: Any = None) -> int:
    """One forward and backward on the longest batch, with room taken for the optimizer's state; no step.

    Random numbers, gradients, metrics and the order of the data are afterwards what they were.

    Args:
        wrapped: the model as accelerate wrapped it; by default the trainer's own.

    Returns:
        Peak bytes on this process's GPU; 0 on the CPU.

    Raises:
        torch.OutOfMemoryError: the batch does not fit.
    """
    trained = trainer.model if wrapped is None else wrapped
    rows = longest.longest_rows(trainer.train_dataset, trainer.args.per_device_train_batch_size)
    with _undisturbed(trainer):
        room = _optimizer_room(trainer, job)
        _reset_peak()
        trained.train()
        inputs = trainer._prepare_inputs(trainer.data_collator(rows))
        with trainer.compute_loss_context_manager():
            loss = trainer.compute_loss(trained, inputs)
        trainer.accelerator.backward(loss)
        peak = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0
        del room, inputs, loss
    return peak


@contextmanager
def explained(job: StageJob) -> Iterator[None]:
    """Say out of memory in training as a `RunError`, with the last good checkpoint; other errors pass through.

    Raises:
        RunError: the itemised estimate, and the three settings that would help most.
    """

    def text(error: Exception) -> str:
        kept, _ = newest(job.folder / FOLDER)
        when = f"while training; the last checkpoint is {kept.name}" if kept else "while training, no checkpoint yet"
        try:
            return explanation(job, error, when)
        except (MemoryError, RuntimeError):  # no room for an estimate either
            return f"{job.where()}: {when}: {exhausted(error)}"

    with _worded(text):
        yield


def work(doing: str) -> Callable[[Callable[Concatenate[StageJob, P], T]], Callable[Concatenate[StageJob, P], T]]:
    """A function of a stage that says out of memory as `told` does, with the stage's name."""

    def decorate(function: Callable[Concatenate[StageJob, P], T]) -> Callable[Concatenate[StageJob, P], T]:
        @wraps(function)
        def wrapped(job: StageJob, /, *args: P.args, **kwargs: P.kwargs) -> T:
            with told(f"{job.plan.name}: {doing}"):
                return function(job, *args, **kwargs)

        return wrapped

    return decorate


@contextmanager
def told(doing: str) -> Iterator[None]:
    """Say out of memory outside training in one sentence; other errors pass through.

    Args:
        doing: what is being done, as in `dpo: loading the base`.

    Raises:
        RunError
    """
    with _worded(lambda error: f"{doing}: {exhausted(error)}"):
        yield


@contextmanager
def _worded(text: Callable[[Exception], str]) -> Iterator[None]:
    """Out of memory as a `RunError` with this text; what is worded already passes through."""
    try:
        yield
    except ToolkitError:
        raise
    except Exception as error:
        if not out_of_memory(error):
            raise
        raise RunError(text(error)) from error


def explanation(job: StageJob, error: BaseException, when: str) -> str:
    """What happened, the estimate item by item, and the three settings that would help most, with their savings."""
    lines = [f"{job.where()}: out of memory on {job.hardware.device} {when}: {first_line(error)}"]
    empty = model.empty_base(job.recipe)
    lines.append(estimate.text(estimate.estimate(job, empty)))
    helpful = relief.savings(job, empty)
    if helpful:
        lines.append("these would help most, by the estimate:")
        lines += [f"  {saving.setting}   saves {amount(saving.bytes)}" for saving in helpful]
    return "\n".join(lines)


@contextmanager
def _undisturbed(trainer: Any) -> Iterator[None]:
    """Put back what a forward and backward touch: random numbers, gradients, TRL's metrics and its count of tokens.

    `_metrics` and `_total_train_tokens` are TRL 1.16's own, without a public counterpart; remove with them.
    """
    training, metrics = trainer.model.training, copy.deepcopy(trainer._metrics)
    tokens = trainer._total_train_tokens
    devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    try:
        with torch.random.fork_rng(devices):
            yield
    finally:
        for parameter in trainer.model.parameters():
            parameter.grad = None
        trainer.model.train(training)
        trainer._metrics, trainer._total_train_tokens = metrics, tokens
        if devices:
            torch.cuda.empty_cache()


def _optimizer_room(trainer: Any, job: StageJob) -> Any:
    """The optimizer makes its state at the first step: its bytes are held while probing on a GPU."""
    if not torch.cuda.is_available() or (trainer.optimizer is not None and trainer.optimizer.state):
        return None
    size = 2 if quantization(job.recipe) else 4
    local = sum(p.to_local().numel() if hasattr(p, "to_local") else p.numel() for p in _trained(trainer))
    state = estimate.optimizer_bytes(str(trainer.args.optim.value), local, size)
    return torch.empty(state, dtype=torch.uint8, device=trainer.args.device)


def _trained(trainer: Any) -> Iterator[torch.nn.Parameter]:
    return (parameter for parameter in trainer.model.parameters() if parameter.requires_grad)


def _reset_peak() -> None:
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
