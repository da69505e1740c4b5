"""Rules for `trainer`: values, and fields that contradict or switch off each other in the installed TRL."""

import math
from collections.abc import Callable, Iterable
from typing import Any

from toolkit.errors import Problem
from toolkit.recipe.fields import field_types, problem_with, schedule_arguments, trackers
from toolkit.recipe.loss_rules import DIVERGENCES, loss_problems, loss_types_problem
from toolkit.recipe.refused import OTHER_NAMES, OWNED_BY_TOOLKIT, REFUSED_IN_DPO, REFUSED_IN_SFT
from toolkit.wording import did_you_mean, short

Say = Callable[..., Problem]

CONFIGS = {"sft": "SFTConfig", "dpo": "DPOConfig"}
BOUNDS: dict[str, tuple[float, str]] = {
    "learning_rate": (0, "0 or more"),
    "per_device_train_batch_size": (1, "1 or more"),
    "per_device_eval_batch_size": (1, "1 or more"),
    "gradient_accumulation_steps": (1, "1 or more"),
    "max_length": (2, "2 or more tokens"),
    "warmup_steps": (0, "0 or more; below 1 it is a share of the run"),
    "weight_decay": (0, "0 or more"),
    "max_grad_norm": (0, "0 or more; 0 is no clipping"),
    "save_total_limit": (1, "1 or more; transformers ignores less"),
    "torch_empty_cache_steps": (1, "1 or more"),
    "dataset_num_proc": (1, "1 or more"),
    "dataloader_num_workers": (0, "0 or more"),
    "eval_delay": (0, "0 or more"),
}
ABOVE_ZERO = {
    "num_train_epochs": "or nothing is trained",
    "beta": "or it prefers what was rejected",
    "logging_steps": "steps; below 1 it is a share of the run",
    "eval_steps": "steps; below 1 it is a share of the run",
    "save_steps": "steps; below 1 it is a share of the run",
    "discopop_tau": "it divides",
}
EVALUATION = (
    "eval_on_start",
    "eval_steps",
    "eval_delay",
    "per_device_eval_batch_size",
    "eval_packing",
    "load_best_model_at_end",
    "metric_for_best_model",
    "greater_is_better",
)
METRICS = {
    "sft": [
        "loss",
        "runtime",
        "samples_per_second",
        "steps_per_second",
        "entropy",
        "mean_token_accuracy",
        "num_tokens",
    ],
    "dpo": [
        *("loss", "runtime", "samples_per_second", "steps_per_second", "entropy", "mean_token_accuracy", "num_tokens"),
        *("rewards/chosen", "rewards/rejected", "rewards/accuracies", "rewards/margins"),
        *("logps/chosen", "logps/rejected", "logits/chosen", "logits/rejected"),
    ],
}
DEFAULT_EVAL_STEPS, DEFAULT_SAVE_STEPS = 0.25, 0.1  # `toolkit.recipe.plan`; a test holds them together
WITHOUT_OPTIM_ARGS = ("adamw_torch", "adamw_torch_fused", "adamw_torch_xla", "adamw_torch_npu_fused")
LOW_RANK = ("galore", "apollo")  # the optimizers that look at optim_target_modules
CHECKPOINTING = ("use_reentrant", "preserve_rng_state", "determinism_check", "debug", "early_stop", "selective")
TRACKER_FIELDS = ("run_name", "project", "trackio_space_id", "trackio_bucket_id", "trackio_static_space_id")


def refused(stage_type: Any) -> dict[str, str]:
    """Fields of TRL that a stage of this type may not set -> why."""
    own = {"sft": REFUSED_IN_SFT, "dpo": REFUSED_IN_DPO}.get(str(stage_type), {})
    return OWNED_BY_TOOLKIT | own


def trainer_problems(stage: dict[str, Any], say: Say, *at: str | int) -> Iterable[Problem]:
    """What is wrong with one stage's `trainer`."""
    trainer, kind = stage["trainer"], str(stage.get("type"))
    no, config = refused(kind), CONFIGS.get(kind)
    fine: dict[str, Any] = {}
    for key, value in trainer.items():
        if key in no:
            yield say(f"is not for a recipe's trainer: {no[key]}", *at, key)
        elif wrong := _unknown(config, key) or problem_with(config or _either(key), key, value) or _value(key, value):
            yield say(wrong, *at, key)
        else:
            fine[key] = value
    for rule in (_precision, _schedule, _optimizer, _evaluation, _best_model, _loading, _tracking):
        for key, text in rule(fine, stage):
            yield say(text, *at, key)
    for key, text in {"sft": _sft, "dpo": _dpo}[kind](fine, stage) if kind in CONFIGS else ():
        yield say(text, *at, key)


Found = Iterable[tuple[str, str]]
"""Key and text of a problem."""


def _either(key: str) -> str:
    """The class that has this field, for a stage whose type is not known."""
    return "SFTConfig" if key in field_types("SFTConfig") else "DPOConfig"


def _unknown(config: str | None, key: str) -> str | None:
    if key in (field_types(config) if config else field_types("SFTConfig") | field_types("DPOConfig")):
        return None
    if key in OTHER_NAMES:
        return f"unknown key: {OTHER_NAMES[key]}"
    other = {"SFTConfig": "DPOConfig", "DPOConfig": "SFTConfig"}.get(config or "", "")
    if other and key in field_types(other):
        return f"unknown key, {config} has no such field; it is one of {other}, for {other[:3].lower()} stages"
    known = field_types(config or "SFTConfig")
    return f"unknown key, {config or 'neither SFTConfig nor DPOConfig'} has no such field{did_you_mean(key, known)}"


def _value(key: str, value: Any) -> str | None:
    if key == "loss_type" and isinstance(value, list):
        return loss_types_problem(value)
    if key == "f_divergence_type" and value not in DIVERGENCES:
        return f"found {short(value)}, expected {', '.join(DIVERGENCES)}{did_you_mean(value, DIVERGENCES)}"
    if key == "report_to":
        return _trackers(value)
    if key == "accelerator_config" and isinstance(value, str):
        return f"found {short(value)}, expected a mapping: a recipe is one file"
    if key == "accelerator_config" and isinstance(value, dict):
        wrong = [text for inner, v in value.items() if (text := problem_with("AcceleratorConfig", inner, v))]
        return f"{next(iter(value))}: {wrong[0]}" if wrong and len(value) == 1 else wrong[0] if wrong else None
    if key in ("gradient_checkpointing_kwargs", "activation_checkpointing_kwargs") and isinstance(value, dict):
        unknown = [inner for inner in value if inner not in CHECKPOINTING]
        return (
            f"{short(unknown[0])} is no argument of checkpointing{_of(unknown[0], CHECKPOINTING)}" if unknown else None
        )
    is_number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    return _number(key, value) if is_number else None


def _number(key: str, value: float) -> str | None:
    if key in BOUNDS and value < BOUNDS[key][0]:
        return f"found {short(value)}, expected {BOUNDS[key][1]}"
    if key in ABOVE_ZERO and value <= 0:
        return f"found {short(value)}, expected more than 0, {ABOVE_ZERO[key]}"
    if key in ("logging_steps", "eval_steps", "save_steps") and value > 1 and value != int(value):
        return f"found {value}, expected a whole number of steps, or a share of the run below 1"
    if key == "max_steps" and (value == 0 or value < -1):
        return f"found {value}, expected 1 or more; without it num_train_epochs decides"
    if key in ("adam_beta1", "adam_beta2") and not 0 <= value < 1:
        return f"found {value}, expected a share from 0 to below 1"
    if key in ("ld_alpha", "label_smoothing") and not 0 <= value <= 1:
        return f"found {value}, expected a share from 0 to 1"
    return None


def _of(word: Any, known: Iterable[str]) -> str:
    known = list(known)
    return f"; expected some of {', '.join(known)}{did_you_mean(word, known)}" if known else "; expected none"


def _trackers(value: Any) -> str | None:
    known = ["none", "all", *trackers()]
    for name in value if isinstance(value, list) else [value]:
        if isinstance(name, str) and name not in known:
            return f"found {short(name)}, expected some of {', '.join(known)}{did_you_mean(name, known)}"
    return None


def _precision(t: dict[str, Any], _: dict[str, Any]) -> Found:
    if t.get("fp16") and t.get("bf16"):
        yield "fp16", "fp16 and bf16 together; keep one of them"
    for old, new in (
        ("gradient_checkpointing", "activation_checkpointing"),
        ("gradient_checkpointing_kwargs", "activation_checkpointing_kwargs"),
    ):
        if old in t and t.get(new) is not None:
            yield old, f"transformers ignores it beside {new}, its new name; keep one of them"


def _schedule(t: dict[str, Any], _: dict[str, Any]) -> Found:
    name = t.get("lr_scheduler_type", "cosine")
    warmup, steps = t.get("warmup_steps", 0), t.get("max_steps", -1)
    if steps > 0 and warmup >= 1 and warmup >= steps:
        text = f"the warm-up of {warmup:g} steps is as long as the run of {steps} (max_steps) or longer"
        yield "warmup_steps", f"{text}, so the learning rate is never reached; expected fewer, or a share such as 0.1"
    if "warmup_steps" in t and warmup > 0 and name in ("constant", "reduce_lr_on_plateau", "greedy"):
        way_out = "; use constant_with_warmup" if name == "constant" else "; remove it"
        yield "warmup_steps", f"lr_scheduler_type: {name} has no warm-up and ignores it{way_out}"
    given = t.get("lr_scheduler_kwargs")
    arguments = schedule_arguments(name)
    if arguments is None or not isinstance(given or {}, dict):
        return
    allowed, required = arguments
    if name == "constant_with_warmup":
        allowed = ()
    for key in given or {}:
        if key not in allowed:
            text = f"{short(key)} is no argument of lr_scheduler_type: {name}{_of(key, allowed)}"
            yield "lr_scheduler_kwargs", text
    missing = [key for key in required if key not in (given or {})]
    where = "lr_scheduler_kwargs" if given else "lr_scheduler_type"
    if missing:
        yield where, f"{name} needs lr_scheduler_kwargs with {', '.join(missing)}"
    if name.endswith("min_lr") and (("min_lr" in (given or {})) == ("min_lr_rate" in (given or {}))):
        yield where, f"{name} needs lr_scheduler_kwargs with either min_lr or min_lr_rate"


def _optimizer(t: dict[str, Any], _: dict[str, Any]) -> Found:
    name = t.get("optim", "adamw_torch_fused")
    if t.get("optim_args"):
        if name in WITHOUT_OPTIM_ARGS:
            yield "optim_args", f"optim: {name} ignores it; use adam_beta1, adam_beta2, adam_epsilon, weight_decay"
        elif any(part.count("=") != 1 for part in t["optim_args"].split(",")):
            yield "optim_args", f"found {short(t['optim_args'])}, expected key=value pairs, as in rank=64,scale=0.1"
    low_rank = name.startswith(LOW_RANK)
    if t.get("optim_target_modules") and not low_rank:
        yield (
            "optim_target_modules",
            f"is for GaLore and APOLLO; optim: {name} ignores it; LoRA's are lora.target_modules",
        )
    if low_rank and not t.get("optim_target_modules"):
        yield "optim", f"{name} needs optim_target_modules"


def _evaluates(t: dict[str, Any], stage: dict[str, Any]) -> bool:
    return bool(stage.get("eval_data")) and t.get("eval_strategy", "steps") != "no"


def _evaluation(t: dict[str, Any], stage: dict[str, Any]) -> Found:
    if not stage.get("eval_data"):
        if t.get("eval_strategy", "no") != "no":
            yield "eval_strategy", "evaluation is asked for without eval_data; add it to the stage, or remove this"
        off = t.get("eval_strategy") == "no"  # switched off on purpose: what is set beside it may stay
        for key in EVALUATION:
            if t.get(key) not in (None, False) and not off:
                yield key, "is about evaluation, and the stage has no eval_data; add it to the stage, or remove this"
        if t.get("save_strategy") == "best":
            yield "save_strategy", "best is chosen by evaluation, and the stage has no eval_data"
    if t.get("lr_scheduler_type") in ("reduce_lr_on_plateau", "greedy") and not _evaluates(t, stage):
        yield "lr_scheduler_type", f"{t['lr_scheduler_type']} looks at evaluations, and the stage makes none"
    for what in ("eval", "save", "logging"):
        strategy = t.get(f"{what}_strategy")
        if strategy in ("epoch", "best") and t.get(f"{what}_steps") is not None:
            yield f"{what}_steps", f"{what}_strategy: {strategy} ignores it; remove one of them"


def _best_model(t: dict[str, Any], stage: dict[str, Any]) -> Found:
    metric, known = t.get("metric_for_best_model"), METRICS.get(str(stage.get("type")), [])
    if isinstance(metric, str) and known and metric.removeprefix("eval_") not in known:
        yield (
            "metric_for_best_model",
            f"no evaluation reports {short(metric)}{_of(metric.removeprefix('eval_'), known)}",
        )
    if t.get("save_strategy") == "best" and metric is None and not t.get("load_best_model_at_end"):
        yield "save_strategy", "best needs metric_for_best_model, as in metric_for_best_model: loss"
    if not t.get("load_best_model_at_end") or not stage.get("eval_data") or t.get("save_strategy") == "best":
        return
    evaluate, save = t.get("eval_strategy", "steps"), t.get("save_strategy", "steps")
    if evaluate != save:
        text = f"needs eval_strategy and save_strategy to be the same; found {evaluate} and {save}"
        yield "load_best_model_at_end", text
    elif evaluate == "steps":
        each, every = t.get("eval_steps") or DEFAULT_EVAL_STEPS, t.get("save_steps", DEFAULT_SAVE_STEPS)
        if not _is_multiple(every, each):
            text = f"needs save_steps to be a multiple of eval_steps; found {every:g} and {each:g}"
            yield "load_best_model_at_end", f"{text}; set save_steps: {each:g}"


def _is_multiple(save: float, evaluate: float) -> bool:
    """By transformers' own reckoning: whole steps, or shares of the run in millionths."""
    if save < 1 and evaluate < 1:
        return (save * 1_000_000) % (evaluate * 1_000_000) == 0
    return save >= 1 and evaluate >= 1 and save % evaluate == 0


def _loading(t: dict[str, Any], _: dict[str, Any]) -> Found:
    for key in ("dataloader_prefetch_factor", "dataloader_persistent_workers", "dataloader_multiprocessing_context"):
        if t.get(key) and not t.get("dataloader_num_workers"):
            yield key, "is for loading in other processes; set dataloader_num_workers: 1 or more, or remove it"
    if t.get("liger_kernel_config") and not t.get("use_liger_kernel"):
        yield "liger_kernel_config", "is ignored without use_liger_kernel: true"
    if (t.get("liger_kernel_config") or {}).get("fused_linear_cross_entropy"):
        yield "liger_kernel_config", "TRL has a fused head of its own and refuses fused_linear_cross_entropy; remove it"


def _tracking(t: dict[str, Any], _: dict[str, Any]) -> Found:
    named = t.get("report_to")
    if named is not None:  # `none` too: switched off on purpose
        return
    for key in TRACKER_FIELDS:
        if key in t:
            yield key, "names a run for a tracker, and none is asked for; set report_to, or remove it"


def _sft(t: dict[str, Any], stage: dict[str, Any]) -> Found:
    packing = t.get("packing")
    if packing and "max_length" in t and t["max_length"] is None:
        yield "max_length", "packing needs a max_length to fill"
    if packing and t.get("padding_free"):
        yield "padding_free", "packed rows have no padding to be free of; remove it"
    if t.get("eval_packing") and not packing:
        yield "eval_packing", "evaluation rows are packed with packing: true only"
    if "packing_strategy" in t and packing is None:
        yield "packing_strategy", "is ignored without packing: true"
    if isinstance(t.get("pad_to_multiple_of"), int) and packing:
        text = "packed and shared rows are not padded to a multiple; remove it, or packing"
        yield "pad_to_multiple_of", text
    if t.get("label_smoothing_factor") and t.get("loss_type") == "dft":
        yield "label_smoothing_factor", "loss_type: dft ignores it; keep one of them"
    if t.get("assistant_only_loss") and t.get("completion_only_loss") is False:
        yield "assistant_only_loss", "completion_only_loss: false trains the whole row; keep one of them"
    yield from _checkpointing(t, selective=True)
    yield from _padding(t)


def _dpo(t: dict[str, Any], stage: dict[str, Any]) -> Found:
    shared = stage.get("prefix_sharing", True)
    if isinstance(t.get("pad_to_multiple_of"), int) and shared:
        text = "packed and shared rows are not padded to a multiple; remove it, or set prefix_sharing: false"
        yield "pad_to_multiple_of", text
    if t.get("neftune_noise_alpha") and shared:
        text = "the noise would be drawn once for both answers; remove it, or set prefix_sharing: false"
        yield "neftune_noise_alpha", text
    yield from loss_problems(t)
    yield from _checkpointing(t, selective=False)
    yield from _padding(t)


def _checkpointing(t: dict[str, Any], selective: bool) -> Found:
    for key in ("gradient_checkpointing_kwargs", "activation_checkpointing_kwargs"):
        given = t.get(key)
        if not isinstance(given, dict) or "selective" not in given:
            continue
        if not selective:
            yield key, "selective checkpointing is SFTTrainer's alone; remove selective"
        elif given["selective"] and given.get("use_reentrant"):
            yield key, "selective checkpointing is not reentrant; keep one of selective and use_reentrant"
        elif given["selective"] and t.get(key.removesuffix("_kwargs")) is False:
            yield key, f"selective needs {key.removesuffix('_kwargs')}: true"


def _padding(t: dict[str, Any]) -> Found:
    value = t.get("pad_to_multiple_of")
    if isinstance(value, str) and value != "auto":
        yield "pad_to_multiple_of", f"found {short(value)}, expected a whole number, or auto"
    elif isinstance(value, int) and value < 1:
        yield "pad_to_multiple_of", f"found {value}, expected 1 or more"
