"""`Recipe` to stage plans: what starts where, what the reference is, which settings apply. Pure: reads no file."""

import hashlib
import json
from dataclasses import dataclass
from typing import Any, Literal

from toolkit.recipe.sections import Guard, Recipe, Stage

Mode = Literal["fresh", "stack", "continue"]

LORA_DEFAULTS: dict[str, Any] = {"r": 16, "lora_alpha": 32, "lora_dropout": 0.0, "target_modules": "all-linear"}
QUANTIZATION_4BIT_DEFAULTS: dict[str, Any] = {
    "bnb_4bit_quant_type": "nf4",
    "bnb_4bit_use_double_quant": True,
    "bnb_4bit_compute_dtype": "bfloat16",
}
TRAINER_DEFAULTS: dict[str, dict[str, Any]] = {
    "sft": {"learning_rate": 2e-4, "num_train_epochs": 1, "lr_scheduler_type": "cosine", "warmup_steps": 0.03},
    "dpo": {
        "learning_rate": 5e-6,
        "num_train_epochs": 1,
        "lr_scheduler_type": "cosine",
        "warmup_steps": 0.1,
        "beta": 0.1,
        "train_sampling_strategy": "group_by_length",
    },
}
KEEPING_DEFAULTS: dict[str, Any] = {
    "max_grad_norm": 1.0,
    "logging_steps": 10,
    "save_strategy": "steps",
    "save_steps": 0.1,  # of the run's steps
    "save_total_limit": 2,
    "report_to": "none",
    "ddp_find_unused_parameters": False,  # every LoRA matrix takes part in every step; looking for others costs time
}
EVAL_DEFAULTS: dict[str, Any] = {"eval_strategy": "steps", "eval_steps": 0.25}  # of the run's steps
KEEP_BEST_DEFAULTS: dict[str, Any] = {  # transformers' own machinery; `watch.Guards` computes the metric
    "load_best_model_at_end": True,
    "metric_for_best_model": "selection",
    "greater_is_better": True,
    "eval_steps": 0.1,
}

# Settings that change what is written down, never what is learned: changing one does not rerun a finished stage.
WITHOUT_EFFECT_ON_WEIGHTS: tuple[str, ...] = (
    "logging_",
    "log_",
    "save_",
    "report_to",
    "run_name",
    "project",
    "trackio_",
    "dataloader_num",
    "ddp_",
)


@dataclass(frozen=True)
class Hardware:
    """Where the run happens; never part of a recipe, nor of a stage's digest but for `dtype` and `bf16`."""

    device: str
    bf16: bool
    processes: int = 1


@dataclass(frozen=True)
class StagePlan:
    """One stage, with every default filled in.

    `start` is `base`, an earlier stage's name, or the path or Hub id of an adapter.
    """

    name: str
    type: Literal["sft", "dpo"]
    index: int
    start: str
    mode: Mode
    policy: str
    reference: str | None
    lora: dict[str, Any]
    trainer: dict[str, Any]
    reference_from: Literal["cached", "online"] | None
    prefix_sharing: bool
    guard: dict[str, Any] | None = None
    keep: Literal["last", "best"] = "last"

    @property
    def max_length(self) -> int | None:
        """Tokens at which TRL cuts a row, or prompt + completion; its own default is 1024."""
        return self.trainer.get("max_length", 1024)

    def batch_size(self, hardware: Hardware) -> int:
        """Rows that one optimizer step sees, over all processes."""
        per_device = self.trainer.get("per_device_train_batch_size", 8)
        return per_device * self.trainer.get("gradient_accumulation_steps", 1) * hardware.processes


def model_dtype(recipe: Recipe, hardware: Hardware) -> str:
    """The type the base weights are held in."""
    if recipe.model.dtype != "auto":
        return recipe.model.dtype
    return "bfloat16" if hardware.bf16 else "float32"


def quantization(recipe: Recipe) -> dict[str, Any] | None:
    """`BitsAndBytesConfig` fields, with nf4, double quantization and bf16 compute where 4-bit is asked for."""
    asked = recipe.quantization
    if not asked:
        return None
    return QUANTIZATION_4BIT_DEFAULTS | asked if asked.get("load_in_4bit") else dict(asked)


def stage_plans(recipe: Recipe, hardware: Hardware) -> list[StagePlan]:
    """The stages of a recipe in order, resolved."""
    return [_stage_plan(recipe, i, hardware) for i in range(len(recipe.stages))]


def stage_digest(plan: StagePlan, **depends_on: Any) -> str:
    """Key of everything the stage's result depends on; the same key means that it need not run again.

    Args:
        depends_on: digests of base, data and parent, seed, dtype, quantization: whatever else decides the result.
    """
    without_effect = WITHOUT_EFFECT_ON_WEIGHTS
    if plan.trainer.get("load_best_model_at_end"):  # what is saved decides what can be best
        without_effect = tuple(prefix for prefix in without_effect if prefix != "save_")
    trainer = {k: v for k, v in plan.trainer.items() if not k.startswith(without_effect)}
    watched = plan.guard or {}
    if watched.get("action") == "stop" or plan.keep == "best":  # else guards only speak
        depends_on["guard"] = watched
    return digest({"type": plan.type, "mode": plan.mode, "lora": plan.lora, "trainer": trainer, **depends_on})


def digest(value: Any) -> str:
    """SHA-256, in hex, of the value's canonical JSON."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()


def _stage_plan(recipe: Recipe, index: int, hardware: Hardware) -> StagePlan:
    stage = recipe.stages[index]
    start = stage.from_ or (recipe.stages[index - 1].name if index else "base")
    mode: Mode = "fresh" if start == "base" else "continue" if stage.adapter == "continue" else "stack"
    policy, reference = _in_words(stage, start, mode)
    return StagePlan(
        name=stage.name,
        type=stage.type,
        index=index,
        start=start,
        mode=mode,
        policy=policy,
        reference=reference if stage.type == "dpo" else None,
        lora={} if mode == "continue" else LORA_DEFAULTS | recipe.lora | (stage.lora or {}),
        trainer=_trainer(recipe, stage, hardware),
        reference_from=stage.reference if stage.type == "dpo" else None,
        prefix_sharing=stage.prefix_sharing and stage.type == "dpo",
        guard=_guard(recipe, stage) if stage.type == "dpo" else None,
        keep=stage.keep,
    )


def _guard(recipe: Recipe, stage: Stage) -> dict[str, Any]:
    over = (guard.model_dump(exclude_unset=True) for guard in (recipe.guard, stage.guard) if guard is not None)
    asked: dict[str, Any] = {}
    for settings in over:
        asked |= settings
    return Guard(**asked).model_dump()


def _in_words(stage: Stage, start: str, mode: Mode) -> tuple[str, str]:
    if mode == "fresh":
        return "base + new adapter", "base (the stage's adapter disabled)"
    if mode == "stack":
        policy = f"base + {start} adapter (frozen) + new adapter"
        return policy, f"base + {start} adapter (the new adapter disabled)"
    return f"base + {start} adapter, trained further", f"base + {start} adapter as it was (a frozen copy)"


def _trainer(recipe: Recipe, stage: Stage, hardware: Hardware) -> dict[str, Any]:
    asked = stage.trainer
    settings = TRAINER_DEFAULTS[stage.type] | KEEPING_DEFAULTS
    settings["bf16"] = hardware.bf16 and model_dtype(recipe, hardware) == "bfloat16" and not asked.get("fp16")
    if stage.eval_data:
        settings |= EVAL_DEFAULTS
        settings["per_device_eval_batch_size"] = asked.get("per_device_train_batch_size", 8)
    if stage.keep == "best":  # every evaluation is a candidate, so every one is saved
        settings |= KEEP_BEST_DEFAULTS
        settings["save_strategy"] = asked.get("eval_strategy", settings.get("eval_strategy"))
        settings["save_steps"] = asked.get("eval_steps", settings["eval_steps"])
    return settings | asked
