"""What pydantic cannot know about a recipe: fields that are passed through, and rules between fields."""

from collections.abc import Iterable
from typing import Any

from toolkit.errors import Problem
from toolkit.fields import did_you_mean, problem_with
from toolkit.recipe import Location, dotted, position

OWNED_BY_TOOLKIT = {
    "output_dir": "use --output",
    "overwrite_output_dir": "use --fresh",
    "resume_from_checkpoint": "an interrupted stage resumes by itself",
    "seed": "set seed at the top of the recipe",
    "model_init_kwargs": "use the recipe's model section",
    "trust_remote_code": "set model.trust_remote_code",
    "chat_template_path": "set model.chat_template",
    "eos_token": "the tokenizer's own end token is used; set model.chat_template",
    "pad_token": "the tokenizer's own padding token is used",
    "dataset_text_field": "use columns: {text: ...} in the data source",
    "dataset_kwargs": "the toolkit prepares the data itself",
    "remove_unused_columns": "the toolkit prepares the data itself",
    "disable_tqdm": "progress is live on a terminal and plain lines elsewhere",
    "precompute_ref_log_probs": "the toolkit decides where reference log-probs come from",
    "precompute_ref_batch_size": "the toolkit decides where reference log-probs come from",
    "do_train": "stages are trained",
    "do_eval": "give the stage eval_data",
    "do_predict": "use the evaluate section",
    "push_to_hub": "use the hub section",
    "hub_model_id": "use the hub section",
    "hub_token": "run `hf auth login`, or set HF_TOKEN; a token never belongs in a recipe",
    "hub_strategy": "use the hub section",
    "hub_private_repo": "use the hub section",
    "hub_always_push": "use the hub section",
    "hub_revision": "use the hub section",
    "local_rank": "hardware never enters a recipe; use accelerate launch",
    "use_cpu": "hardware never enters a recipe; use accelerate launch --cpu",
    "fsdp": "hardware never enters a recipe; use an accelerate config file",
    "fsdp_config": "hardware never enters a recipe; use an accelerate config file",
    "ddp_timeout": "the toolkit lets processes wait for hours, as the main one tokenizes and verifies for all",
    "ddp_backend": "hardware never enters a recipe; accelerate chooses it",
    "deepspeed": "hardware never enters a recipe; use an accelerate config file",
    "parallelism_config": "hardware never enters a recipe; use an accelerate config file",
}
REFUSED_IN_DPO = {
    "padding_free": "DPOConfig accepts it and TRL ignores it; remove it",
    "sync_ref_model": "the reference is the frozen start of the stage; TRL cannot move it under LoRA; remove it",
    "truncation_mode": "only keep_start, its default, leaves the shared prompt in place; remove it",
}
LOSS_TYPES = [
    "sigmoid",
    "hinge",
    "ipo",
    "exo_pair",
    "nca_pair",
    "robust",
    "bco_pair",
    "sppo_hard",
    "aot",
    "aot_unpaired",
    "apo_zero",
    "apo_down",
    "discopop",
    "sft",
    "sigmoid_norm",
]
BOUNDS: dict[str, tuple[float, str]] = {
    "learning_rate": (0, "0 or more"),
    "num_train_epochs": (0, "0 or more"),
    "per_device_train_batch_size": (1, "1 or more"),
    "per_device_eval_batch_size": (1, "1 or more"),
    "gradient_accumulation_steps": (1, "1 or more"),
    "max_length": (2, "2 or more tokens"),
}
LORA_OWNED = {
    "task_type": "it is CAUSAL_LM",
    "peft_type": "it is LORA",
    "auto_mapping": "PEFT sets it",
    "peft_version": "PEFT sets it",
    "base_model_name_or_path": "set model.name_or_path",
    "revision": "set model.revision",
    "inference_mode": "the toolkit sets it",
}
REWRITES_BASE = (
    "it rewrites the base weights, so `adapter off` is no longer the base and the saved adapter fits no base"
)
INITIALISATIONS = {
    "pissa": REWRITES_BASE,
    "olora": REWRITES_BASE,
    "corda": REWRITES_BASE,
    "loftq": REWRITES_BASE,
    "lora_ga": REWRITES_BASE,
    "eva": "it needs a pass over the data that the toolkit does not make",
    "mica": "it trains a variant whose adapters cannot be put together by rank",
}


def problems_in(data: dict[str, Any], lines: dict[Location, str]) -> Iterable[Problem]:
    """Problems of the passed-through fields and between fields, in data that may be wrong in other ways as well."""

    def problem(text: str, *at: str | int) -> Problem:
        return Problem(position(lines, at), dotted(at), text)

    quantization = _mapping(data.get("quantization"))
    for key, value in quantization.items():
        if wrong := problem_with("BitsAndBytesConfig", key, value):
            yield problem(wrong, "quantization", key)
    if quantization.get("bnb_4bit_quant_type", "nf4") not in ("nf4", "fp4"):
        text = f"found {quantization['bnb_4bit_quant_type']!r}, expected nf4 or fp4"
        yield problem(text, "quantization", "bnb_4bit_quant_type")
    if quantization.get("load_in_4bit") and quantization.get("load_in_8bit"):
        yield problem("8-bit and 4-bit together; keep one of them", "quantization", "load_in_8bit")
    yield from _check_lora(_mapping(data.get("lora")), problem, "lora")
    earlier: list[str] = []
    stages = data.get("stages")
    for i, entry in enumerate(stages if isinstance(stages, list) else []):
        stage = _mapping(entry)
        yield from _check_start(stage, earlier, problem, "stages", i)
        yield from _check_trainer(stage, problem, "stages", i, "trainer")
        yield from _check_lora(_mapping(stage.get("lora")), problem, "stages", i, "lora")
        earlier.append(str(stage.get("name", stage.get("type"))))


def _check_start(stage: dict[str, Any], earlier: list[str], problem: Any, *at: str | int) -> Iterable[Problem]:
    name, start = stage.get("name", stage.get("type")), stage.get("from")
    if name in earlier:
        yield problem(f"two stages are named {name!r}; give each stage its own name", *at, "name")
    if name in ("base", "adapter", "adapter.partial") or str(name).endswith(".previous"):
        yield problem(f"{name!r} has a meaning of its own in a run; choose another name", *at, "name")
    known = ["base", *earlier]
    if isinstance(start, str) and "/" not in start and start not in known:
        text = (
            f"no earlier stage is named {start!r}; found {', '.join(known)}; or give an adapter's path, as in ./adapter"
        )
        yield problem(text + did_you_mean(start, known), *at, "from")
    if stage.get("type") == "sft":
        for key in ("reference", "prefix_sharing", "guard", "keep"):
            if key in stage:
                yield problem("is for dpo stages; sft has no reference and no pairs", *at, key)
    if stage.get("keep") == "best" and not stage.get("eval_data"):
        yield problem("the best checkpoint is found on held-out pairs; give the stage eval_data", *at, "keep")
    if stage.get("adapter") == "continue":
        if start == "base" or (start is None and not earlier):
            yield problem("there is no adapter to continue: the stage starts from the base", *at, "adapter")
        if stage.get("lora") is not None:
            text = "an adapter that is continued keeps its own LoRA settings; remove lora, or use adapter: new"
            yield problem(text, *at, "lora")


def _check_trainer(stage: dict[str, Any], problem: Any, *at: str | int) -> Iterable[Problem]:
    trainer = _mapping(stage.get("trainer"))
    config = {"sft": "SFTConfig", "dpo": "DPOConfig"}.get(str(stage.get("type")))
    refused = OWNED_BY_TOOLKIT | (REFUSED_IN_DPO if config == "DPOConfig" else {})
    for key, value in trainer.items():
        if key in refused:
            yield problem(f"is not for a recipe's trainer: {refused[key]}", *at, key)
        elif config and (wrong := problem_with(config, key, value)):
            yield problem(wrong, *at, key)
    yield from _check_values(trainer, config, problem, *at)
    yield from _check_combinations(stage, trainer, config, problem, *at)


def _check_values(trainer: dict[str, Any], config: str | None, problem: Any, *at: str | int) -> Iterable[Problem]:
    for key, (least, text) in BOUNDS.items():
        value = trainer.get(key)
        if isinstance(value, int | float) and value < least:
            yield problem(f"found {value}, expected {text}", *at, key)
    loss_types = trainer.get("loss_type")
    for name in loss_types if config == "DPOConfig" and isinstance(loss_types, list) else []:
        if name not in LOSS_TYPES:
            text = f"found {name!r}, expected some of {', '.join(LOSS_TYPES)}{did_you_mean(str(name), LOSS_TYPES)}"
            yield problem(text, *at, "loss_type")
    if isinstance(trainer.get("beta"), int | float) and trainer["beta"] <= 0:
        yield problem(f"found {trainer['beta']}, expected more than 0, or it prefers what was rejected", *at, "beta")


def _check_combinations(
    stage: dict[str, Any], trainer: dict[str, Any], config: str | None, problem: Any, *at: str | int
) -> Iterable[Problem]:
    for key in ("load_best_model_at_end", "metric_for_best_model", "greater_is_better"):
        if key in trainer and stage.get("keep") == "best":
            yield problem("keep: best decides which checkpoint is kept; remove one of the two", *at, key)
    packing = trainer.get("packing")
    if packing and "max_length" in trainer and trainer["max_length"] is None:
        yield problem("packing needs a max_length to fill", *at, "max_length")
    if packing and trainer.get("padding_free"):
        yield problem("packed rows have no padding to be free of; remove it", *at, "padding_free")
    if trainer.get("eval_packing") and not packing:
        yield problem("evaluation rows are packed with packing: true only", *at, "eval_packing")
    shared = config == "DPOConfig" and stage.get("prefix_sharing", True)
    if isinstance(trainer.get("pad_to_multiple_of"), int) and (packing or shared):
        way_out = "remove it, or " + ("packing" if packing else "set prefix_sharing: false")
        yield problem(f"packed and shared rows are not padded to a multiple; {way_out}", *at, "pad_to_multiple_of")
    if trainer.get("eval_strategy", "no") not in ("no", False) and not stage.get("eval_data"):
        yield problem("evaluation is asked for without eval_data", *at, "eval_strategy")


def _check_lora(lora: dict[str, Any], problem: Any, *at: str | int) -> Iterable[Problem]:
    for key, value in lora.items():
        if key in LORA_OWNED:
            yield problem(f"is not for a recipe: {LORA_OWNED[key]}", *at, key)
        elif key == "init_lora_weights" and value not in (True, "gaussian", "orthogonal"):
            reason = INITIALISATIONS.get(str(value).split("_niter")[0].lower())
            if value is False:
                reason = "the policy would not start where the reference stands"
            because = f" is not supported: {reason};" if reason else ","
            yield problem(f"{value!r}{because} expected true, gaussian or orthogonal", *at, key)
        elif wrong := problem_with("LoraConfig", key, value):
            yield problem(wrong, *at, key)
        elif key == "r" and value < 1:
            yield problem(f"found {value}, expected a rank of 1 or more", *at, key)
        elif key == "lora_dropout" and not 0 <= value < 1:
            yield problem(f"found {value}, expected a share from 0 to below 1", *at, key)


def _mapping(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}
