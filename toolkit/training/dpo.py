"""The DPO stage: `trl.DPOTrainer` over tokenized pairs, with the stage's own start as the reference, proven."""

import re
from collections.abc import Callable
from typing import Any

import torch
from peft import PeftModel
from transformers import PreTrainedModel, TrainerCallback
from trl import DPOConfig, DPOTrainer

from toolkit.errors import ModelError
from toolkit.job import StageJob
from toolkit.launching.processes import from_main
from toolkit.models import adapter, prefix, prefix_check, sharding
from toolkit.recipe.plan import StagePlan
from toolkit.rows.grouping import LengthGrouped, pair_lengths
from toolkit.training import proof, reference, trainer, watch
from toolkit.training.checkpoints import WholeCheckpoints
from toolkit.training.held_out import EveryPairOnce
from toolkit.training.nonfinite import FiniteSteps
from toolkit.training.probe import work
from toolkit.training.progress import say
from toolkit.wording import first_line

CHECKED_PAIRS = 2


class PairTrainer(EveryPairOnce, FiniteSteps, WholeCheckpoints, DPOTrainer):
    """TRL's trainer, given rows that are tokenized already, with pairs of like length in one batch.

    Its checkpoints are whole or not there, steps that are not finite are left out, and held-out pairs count once each.

    `_prepare_dataset` is TRL's own and has no public counterpart: `SFTTrainer` accepts tokenized rows, `DPOTrainer` of
    TRL 1.16 does not. Remove when it does.
    """

    group_by_length = False
    """Whether batches hold pairs of like length."""

    def _prepare_dataset(self, dataset: Any, *args: Any, **kwargs: Any) -> Any:
        return dataset if "prompt_ids" in dataset.column_names else super()._prepare_dataset(dataset, *args, **kwargs)

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        rows = self.train_dataset if train_dataset is None else train_dataset
        if not self.group_by_length:
            return super()._get_train_sampler(train_dataset)
        seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
        # the rows of one optimizer step, however many processes and micro-batches they are dealt out to
        step = self._train_batch_size * self.args.gradient_accumulation_steps * self.accelerator.num_processes
        return LengthGrouped(pair_lengths(rows), step, seed)


class OfItsEpoch(TrainerCallback):
    """Tells the order of the rows its epoch before rows are skipped: where a stage resumes inside an epoch.

    accelerate 1.15 wraps the order once more to skip, and no longer reaches it from several processes: they would go on
    in the order of the first epoch. Remove when `DataLoaderShard.set_epoch` does.
    """

    def on_epoch_begin(self, args: Any, state: Any, control: Any, train_dataloader: Any = None, **_: Any) -> None:
        train_dataloader.set_epoch(int(state.epoch))


class Batches:
    """The stage's collator: TRL's own, until prompts are shared. A data loader keeps the object it was made with."""

    def __init__(self, collate: Callable[[list[dict[str, Any]]], dict[str, Any]]):
        self.collate = collate

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, Any]:
        return self.collate(rows)


def arguments(job: StageJob) -> DPOConfig:
    """`DPOConfig` of the stage. The grouping of pairs is ours: transformers' own looks for `input_ids`."""
    own = {"train_sampling_strategy": "random"} if _groups(job) else {}
    return trainer.arguments(DPOConfig, job, **own)


def build(job: StageJob, base: PreTrainedModel) -> PairTrainer:
    """TRL's trainer for this stage, ready to train; the adapter it trains is named `default`."""
    model: PeftModel | None = adapter.policy(base, job.plan, job.start, job.recipe.seed, job.where())
    built = PairTrainer(
        model=base if model is None else model,
        args=arguments(job),
        train_dataset=job.data.train,
        eval_dataset=job.data.eval,
        processing_class=job.tokenizer,
        peft_config=adapter.lora_config(job.plan, job.where()) if model is None else None,
    )
    built.data_collator = Batches(built.data_collator)
    built.group_by_length = _groups(job)
    built.add_callback(OfItsEpoch())
    _settle_reference(built.model, job.plan)
    return built


@work("proving the reference")
def prove(job: StageJob, built: PairTrainer, start: torch.Tensor) -> proof.Proof:
    """Compare policy, reference and start model on the first pairs, before the first step.

    Args:
        start: log-probabilities of `proof.first_sequences` under the start model, `(2 * pairs,)`, in nats.

    Raises:
        ProofError: they differ.
    """
    batch = proof.first_sequences(job)
    inputs = built._prepare_inputs(built.data_collator(proof.first_rows(job)))
    built.model.eval()
    policy = _policy_logps(built, inputs)
    weight, built.ld_alpha = built.ld_alpha, None  # LD-DPO weighs tokens alike in both: plain sums are compared
    against = torch.cat(built.compute_ref_log_probs(built.model, inputs)).float().cpu()
    built.ld_alpha = weight
    try:
        with torch.no_grad(), built.accelerator.autocast():
            loss = built.compute_loss(built.model, inputs).item()
    except ValueError as error:  # TRL looks at `loss_type` when it computes the first loss
        raise ModelError(f"{job.where('trainer')}: {first_line(error)}") from error
    built._metrics["eval"].clear()
    built.model.train()
    rounding = proof.rounding(job)
    proven = proof.Proof(
        sequences=len(batch.tokens),
        policy_vs_reference=proof.per_token_difference(policy, against, batch),
        reference_vs_start=proof.per_token_difference(against, start, batch),
        first_loss=loss,
        tolerance_same_path=proof.SAME_PATH[rounding],
        tolerance_other_path=proof.OTHER_PATH[rounding],
    )
    proof.judge(proven, job.plan.policy, job.plan.reference or "")
    return proven


@work("comparing shared prompts with plain passes")
def share_prompts(job: StageJob, built: PairTrainer) -> str:
    """Run each prompt once for its pair from now on, if this model does that exactly.

    Returns:
        What was decided, and why: one sentence.
    """
    if not job.plan.prefix_sharing:
        return "off, as the recipe asks"
    collator = prefix.PairCollator(built.processing_class.pad_token_id, built.args.max_length)
    reason = prefix_check.reason_against(built.model)
    if any(isinstance(module, torch.nn.Dropout) and module.p > 0 for module in built.model.modules()):
        reason = "dropout is on, and would be drawn once for both answers"
    rows, sharded = proof.first_rows(job)[:CHECKED_PAIRS], sharding.is_sharded()
    check = None if reason else prefix_check.self_check(built.model, rows, collator, sharded=sharded)
    reason, check = from_main((reason, check))  # ranks that round differently must not choose differently
    if reason or check is None or not check.passed:
        return f"off: {reason or check}"
    prefix.share_prefix(built.model)
    built.data_collator.collate = collator
    return f"on: {check}"


@work("computing the reference log-probs")
def take_reference(job: StageJob, built: PairTrainer) -> None:
    """Give the trainer its reference log-probs as columns, unless they are to be computed on every step.

    They are where the model is sharded: it is so only once training starts, over rows that are there already.
    """
    if job.plan.reference_from == "online" or sharding.is_sharded():
        return
    built.train_dataset = reference.with_reference(job, built, built.train_dataset, "training")
    if built.eval_dataset is not None:
        built.eval_dataset = reference.with_reference(job, built, built.eval_dataset, "held-out")
    built.precompute_ref_logps = True  # what `precompute_ref_log_probs` sets, without TRL's own pass and its hash


def watch_over(job: StageJob, built: PairTrainer) -> watch.Guards | None:
    """Put the guards on the trainer; `None` where they are off and nothing is to be chosen."""
    watching = watch.Guards(job, built)
    if watching.guard.action == "off" and job.plan.keep == "last":
        return None
    built.add_callback(watching)
    return watching


def outcome(watching: watch.Guards, built: PairTrainer) -> dict[str, Any]:
    """For `stage.json`: `guards`, what was said; `stopped`, what ended training, or `None`; `kept`, which weights."""
    found: dict[str, Any] = {"guards": watching.said, "stopped": watching.stopped}
    if watching.job.plan.keep == "best":
        found["kept"] = watching.kept(built.state)
        say(f"  kept: {found['kept']['why']}")
    return found


def _groups(job: StageJob) -> bool:
    return bool(job.plan.trainer["train_sampling_strategy"] == "group_by_length")


def _settle_reference(model: Any, plan: StagePlan) -> None:
    """Undo or complete what TRL 1.16 does to a `PeftModel` it is given: it adds a copy of `default`, named `ref`."""
    if plan.mode == "stack":
        model.delete_adapter("ref")  # the reference is the `start` adapter, which is there already
    if plan.mode == "continue":
        # TRL copies no adapter of an embedding: there the parameters' names end in it. On a quantized base it casts the
        # trained adapter to bf16, and leaves its copy in float32
        for name, parameter in model.named_parameters():
            if ".ref" in name:
                parameter.data = model.get_parameter(re.sub(r"\.ref(\.|$)", r".default\1", name)).data.clone()


@torch.no_grad()
def _policy_logps(built: PairTrainer, inputs: dict[str, Any]) -> torch.Tensor:
    labels = inputs["input_ids"].masked_fill(inputs["completion_mask"] == 0, -100)
    for_model = {name: value for name, value in inputs.items() if name != "completion_mask"}
    with built.accelerator.autocast():
        out = built.model(**for_model, labels=labels, fused_lm_head=True, use_cache=False)
    return out.log_probs.sum(1).float().cpu()
