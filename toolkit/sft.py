"""The SFT stage: `trl.SFTTrainer` over tokenized rows."""

from pathlib import Path
from typing import Any

from peft import PeftModel
from transformers import PreTrainedModel
from trl import SFTConfig, SFTTrainer

from toolkit import adapter, trainer
from toolkit.data import StageData
from toolkit.plan import Hardware, StagePlan
from toolkit.recipe import Recipe


def arguments(recipe: Recipe, plan: StagePlan, folder: Path, hardware: Hardware) -> SFTConfig:
    """`SFTConfig` of the stage. Rows come with `labels` in place; TRL packs or shuffles them where it is asked to."""
    rows_are_final = not plan.trainer.get("packing") and not plan.trainer.get("shuffle_dataset")
    as_given = {"skip_prepare_dataset": rows_are_final}
    return trainer.arguments(SFTConfig, recipe, plan, hardware, folder, dataset_kwargs=as_given)


def build(
    recipe: Recipe,
    plan: StagePlan,
    data: StageData,
    base: PreTrainedModel,
    tokenizer: Any,
    start: Path | None,
    folder: Path,
    hardware: Hardware,
) -> SFTTrainer:
    """TRL's trainer for this stage, ready to train; the adapter it trains is named `default`."""
    where = recipe.where("stages", plan.index)
    model: PeftModel | None = adapter.policy(base, plan, start, recipe.seed, where)
    return SFTTrainer(
        model=base if model is None else model,
        args=arguments(recipe, plan, folder, hardware),
        train_dataset=data.train,
        eval_dataset=data.eval,
        processing_class=tokenizer,
        peft_config=adapter.lora_config(plan, where) if model is None else None,
    )
