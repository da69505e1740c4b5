"""The SFT stage: `trl.SFTTrainer` over tokenized rows."""

from peft import PeftModel
from transformers import PreTrainedModel
from trl import SFTConfig, SFTTrainer

from toolkit import adapter, trainer
from toolkit.job import StageJob


def arguments(job: StageJob) -> SFTConfig:
    """`SFTConfig` of the stage. Rows come with `labels` in place; TRL packs or shuffles them where it is asked to."""
    rows_are_final = not job.plan.trainer.get("packing") and not job.plan.trainer.get("shuffle_dataset")
    return trainer.arguments(SFTConfig, job, dataset_kwargs={"skip_prepare_dataset": rows_are_final})


def build(job: StageJob, base: PreTrainedModel) -> SFTTrainer:
    """TRL's trainer for this stage, ready to train; the adapter it trains is named `default`."""
    model: PeftModel | None = adapter.policy(base, job.plan, job.start, job.recipe.seed, job.where())
    return SFTTrainer(
        model=base if model is None else model,
        args=arguments(job),
        train_dataset=job.data.train,
        eval_dataset=job.data.eval,
        processing_class=job.tokenizer,
        peft_config=adapter.lora_config(job.plan, job.where()) if model is None else None,
    )
