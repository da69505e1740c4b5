"""What would need less memory: changes to a recipe, and the bytes that each is estimated to save."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from transformers import PreTrainedModel

from toolkit.job import StageJob
from toolkit.launching.division import Sharding
from toolkit.recipe.plan import quantization
from toolkit.resources import estimate, longest


@dataclass(frozen=True)
class Saving:
    """A change to the recipe, and the bytes of peak memory it is estimated to save."""

    setting: str
    bytes: int


def savings(job: StageJob, empty: PreTrainedModel, sharding: Sharding | None = None) -> list[Saving]:
    """The three changes that would save most, the largest first; each leaves the effective batch as it is."""
    now = estimate.estimate(job, empty, sharding).peak
    found = [
        Saving(setting, now - estimate.estimate(changed(job), empty, sharding).peak)
        for setting, changed in _changes(job, empty)
    ]
    return sorted((s for s in found if s.bytes > 0), key=lambda s: -s.bytes)[:3]


def _changes(job: StageJob, empty: PreTrainedModel) -> list[tuple[str, Callable[[StageJob], StageJob]]]:
    asked, changes = job.plan.trainer, []
    size, accumulated = longest.batch_size(job), asked.get("gradient_accumulation_steps", 1)
    if size > 1:
        smaller = {"per_device_train_batch_size": size // 2}
        smaller["gradient_accumulation_steps"] = accumulated * size // (size // 2)
        changes.append((_setting(smaller), _with_trainer(smaller)))
    if not asked.get("gradient_checkpointing", True):
        changes.append((_setting({"gradient_checkpointing": True}), _with_trainer({"gradient_checkpointing": True})))
    columns = max(longest.columns(row) for row in longest.longest_rows(longest.training_rows(job), 1))
    half = {"max_length": max(min(columns, job.plan.max_length or columns) // 2, 1)}
    changes.append((_setting(half), _with_trainer(half)))
    if not (quantization(job.recipe) or {}).get("load_in_4bit"):
        changes.append(("quantization: {load_in_4bit: true}", _in_4bit))
    if "8bit" not in asked.get("optim", "") and "paged" not in asked.get("optim", ""):
        changes.append((_setting({"optim": "paged_adamw_8bit"}), _with_trainer({"optim": "paged_adamw_8bit"})))
    return changes


def _setting(values: dict[str, Any]) -> str:
    written = ", ".join(f"{key}: {str(value).lower()}" for key, value in values.items())
    return f"trainer: {{{written}}}"


def _with_trainer(values: dict[str, Any]) -> Callable[[StageJob], StageJob]:
    return lambda job: replace(job, plan=replace(job.plan, trainer=job.plan.trainer | values))


def _in_4bit(job: StageJob) -> StageJob:
    return replace(job, recipe=job.recipe.model_copy(update={"quantization": {"load_in_4bit": True}}))
