"""The SFT stage: `trl.SFTTrainer` over tokenized rows."""

from typing import Any

from datasets import Dataset
from peft import PeftModel
from transformers import PreTrainedModel
from trl import SFTConfig, SFTTrainer

from toolkit.errors import ModelError
from toolkit.job import StageJob
from toolkit.models import adapter, packing
from toolkit.models.prefix_check import reason_against
from toolkit.training import trainer
from toolkit.training.checkpoints import WholeCheckpoints
from toolkit.training.nonfinite import FiniteSteps


class RowTrainer(FiniteSteps, WholeCheckpoints, SFTTrainer):
    """TRL's trainer, with checkpoints that are whole or not there, and without steps that are not finite."""


def arguments(job: StageJob, **own: Any) -> SFTConfig:
    """`SFTConfig` of the stage. Rows come with `labels` in place; TRL shuffles them where it is asked to."""
    asked = job.plan.trainer
    rows_are_final = not asked.get("packing") and not asked.get("shuffle_dataset")
    settings: dict[str, Any] = {"dataset_kwargs": {"skip_prepare_dataset": rows_are_final}}
    if asked.get("padding_free"):
        settings["max_length"] = None  # rows are cut already; TRL refuses to run padding-free where it would not cut
    return trainer.arguments(SFTConfig, job, **(settings | own))


def build(job: StageJob, base: PreTrainedModel) -> RowTrainer:
    """TRL's trainer for this stage, ready to train; the adapter it trains is named `default`.

    Raises:
        ModelError: packing is asked for, and documents in one row would see each other in this model.
    """
    model: PeftModel | None = adapter.policy(base, job.plan, job.start, job.recipe.seed, job.where())
    keeps_rows = bool(job.plan.trainer.get("packing")) and packing.keeps_rows(base)
    trained: Any = base if model is None else model
    given: dict[str, Any] = {
        "args": arguments(job),
        "train_dataset": job.data.train,
        "eval_dataset": job.data.eval,
    }
    if keeps_rows:
        given = _packed(job, trained)
    built = RowTrainer(
        model=trained,
        processing_class=job.tokenizer,
        peft_config=adapter.lora_config(job.plan, job.where()) if model is None else None,
        **given,
    )
    if keeps_rows:
        packing.isolate_documents(built.model)
    return built


def packed_rows(job: StageJob, rows: Dataset) -> Dataset:
    """Rows of the stage packed, in the order the trainer is given them."""
    return _shuffled(job, packing.pack(job.plan, _shuffled(job, rows)))


def _packed(job: StageJob, model: Any) -> dict[str, Any]:
    reason = reason_against(model)
    if reason is not None:
        raise ModelError(
            f"{job.where('trainer', 'packing')}: packed documents would see each other: {reason}; remove it"
        )
    eval_packing = job.plan.trainer.get("eval_packing")
    packed_eval = job.data.eval is not None and eval_packing is not False
    return {
        "args": arguments(job, packing=False, eval_packing=None, dataset_kwargs={"skip_prepare_dataset": True}),
        "train_dataset": packed_rows(job, job.data.train),
        "eval_dataset": packing.pack(job.plan, job.data.eval) if packed_eval and job.data.eval else job.data.eval,
        "data_collator": packing.RowsOfDocuments(job.tokenizer.pad_token_id),
    }


def _shuffled(job: StageJob, rows: Dataset) -> Dataset:
    """As TRL does, before packing and after it."""
    return rows.shuffle(seed=job.recipe.seed) if job.plan.trainer.get("shuffle_dataset") else rows
