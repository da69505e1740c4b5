"""The DPO stage: `trl.DPOTrainer` over tokenized pairs, with the stage's own start as the reference, proven."""

import math
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import PreTrainedModel
from trl import DPOConfig, DPOTrainer

from toolkit import adapter, reference, trainer
from toolkit.data import StageData
from toolkit.plan import Hardware, StagePlan, model_dtype, quantization
from toolkit.recipe import Recipe

PROOF_ROWS = 4


class PairTrainer(DPOTrainer):
    """TRL's trainer, given rows that are tokenized already.

    `_prepare_dataset` is TRL's own and has no public counterpart: `SFTTrainer` accepts tokenized rows, `DPOTrainer` of
    TRL 1.16 does not. Remove when it does.
    """

    def _prepare_dataset(self, dataset: Any, *args: Any, **kwargs: Any) -> Any:
        return dataset if "prompt_ids" in dataset.column_names else super()._prepare_dataset(dataset, *args, **kwargs)


def arguments(recipe: Recipe, plan: StagePlan, folder: Path, hardware: Hardware) -> DPOConfig:
    """`DPOConfig` of the stage."""
    return trainer.arguments(DPOConfig, recipe, plan, hardware, folder)


def build(
    recipe: Recipe,
    plan: StagePlan,
    data: StageData,
    base: PreTrainedModel,
    tokenizer: Any,
    start: Path | None,
    folder: Path,
    hardware: Hardware,
) -> PairTrainer:
    """TRL's trainer for this stage, ready to train; the adapter it trains is named `default`."""
    where = recipe.where("stages", plan.index)
    model: PeftModel | None = adapter.policy(base, plan, start, recipe.seed, where)
    built = PairTrainer(
        model=base if model is None else model,
        args=arguments(recipe, plan, folder, hardware),
        train_dataset=data.train,
        eval_dataset=data.eval,
        processing_class=tokenizer,
        peft_config=adapter.lora_config(plan, where) if model is None else None,
    )
    _settle_reference(built.model, plan)
    return built


def start_logps(rows: Any, model: Any, tokenizer: Any, max_length: int | None) -> torch.Tensor:
    """Log-probabilities of the first pairs under an independently loaded start model, `(2 * pairs,)`, in nats."""
    return reference.completion_logps(model, _sequences(rows, tokenizer, max_length))


def prove(built: PairTrainer, plan: StagePlan, start: torch.Tensor, recipe: Recipe, hardware: Hardware) -> reference.Proof:
    """Compare policy, reference and start model on the first pairs, before the first step.

    Args:
        start: what `start_logps` returned, `(2 * pairs,)`.

    Raises:
        ProofError: they differ.
    """
    rows = _first(built.train_dataset)
    batch = _sequences(rows, built.processing_class, built.args.max_length)
    inputs = built._prepare_inputs(built.data_collator(rows))
    built.model.eval()
    policy = _policy_logps(built, inputs)
    against = torch.cat(built.compute_ref_log_probs(built.model, inputs)).float().cpu()
    with torch.no_grad(), built.accelerator.autocast():
        loss = built.compute_loss(built.model, inputs).item()
    built._metrics["eval"].clear()
    built.model.train()
    path = "bfloat16" if built.args.bf16 or quantization(recipe) else model_dtype(recipe, hardware)
    proof = reference.Proof(
        sequences=len(batch.tokens),
        policy_vs_reference=reference.per_token_difference(policy, against, batch),
        reference_vs_start=reference.per_token_difference(against, start, batch),
        first_loss=loss,
        expected_first_loss=math.log(2) if built.loss_types == ["sigmoid"] and not built.args.use_weighting else None,
        tolerance_same_path=reference.SAME_PATH[path],
        tolerance_other_path=reference.OTHER_PATH[path],
    )
    reference.judge(proof, plan.policy, plan.reference or "")
    return proof


def _settle_reference(model: Any, plan: StagePlan) -> None:
    """Undo or complete what TRL 1.16 does to a `PeftModel` it is given: it adds a copy of `default`, named `ref`."""
    if plan.mode == "stack":
        model.delete_adapter("ref")  # the reference is the `start` adapter, which is there already
    if plan.mode == "continue":
        # TRL casts the trained adapter to bf16 on a quantized base, and leaves its copy in float32
        for name, parameter in model.named_parameters():
            if ".ref." in name:
                parameter.data = parameter.data.to(model.get_parameter(name.replace(".ref.", ".default.")).dtype)


@torch.no_grad()
def _policy_logps(built: PairTrainer, inputs: dict[str, Any]) -> torch.Tensor:
    labels = inputs["input_ids"].masked_fill(inputs["completion_mask"] == 0, -100)
    with built.accelerator.autocast():
        out = built.model(
            input_ids=inputs["input_ids"],
            attention_mask=inputs["attention_mask"],
            labels=labels,
            fused_lm_head=True,
            use_cache=False,
        )
    return out.log_probs.sum(1).float().cpu()


def _first(rows: Any) -> list[dict[str, Any]]:
    return [rows[i] for i in range(min(PROOF_ROWS, len(rows)))]


def _sequences(rows: Any, tokenizer: Any, max_length: int | None) -> reference.Sequences:
    return reference.sequences(_first(rows) if not isinstance(rows, list) else rows, tokenizer.pad_token_id, max_length)
