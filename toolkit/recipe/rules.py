"""What pydantic cannot know about a recipe: fields that are passed through, and rules between fields."""

from collections.abc import Iterable
from typing import Any

from toolkit.errors import Problem
from toolkit.recipe.fields import field_types, problem_with
from toolkit.recipe.lora_rules import Say, lora_problems, merged_problems, not_by_rank
from toolkit.recipe.sections import Location, dotted, position
from toolkit.recipe.trainer_rules import trainer_problems
from toolkit.wording import did_you_mean, short

QUANTIZED_TYPES = {
    "bnb_4bit_compute_dtype": ("bfloat16", "float16", "float32"),
    "bnb_4bit_quant_storage": ("uint8", "int8", "float16", "bfloat16", "float32", "float64"),
}


def problems_in(data: dict[str, Any], lines: dict[Location, str]) -> Iterable[Problem]:
    """Problems of the passed-through fields and between fields, in data that may be wrong in other ways as well."""

    def say(text: str, *at: str | int) -> Problem:
        return Problem(position(lines, at), dotted(at), text)

    yield from _quantization(_mapping(data.get("quantization")), say)
    yield from lora_problems(_mapping(data.get("lora")), say, "lora")
    stages = data.get("stages")
    stages = [_mapping(entry) for entry in stages] if isinstance(stages, list) else []
    earlier: list[str] = []
    for i, stage in enumerate(stages):
        yield from _start(stage, earlier, say, "stages", i)
        if isinstance(stage.get("trainer"), dict):
            yield from trainer_problems(stage, say, "stages", i, "trainer")
        yield from lora_problems(_mapping(stage.get("lora")), say, "stages", i, "lora")
        earlier.append(_name(stage))
    yield from _adapters(data, stages, say)
    pushed = _mapping(data.get("hub")).get("stage")
    if isinstance(pushed, str) and pushed not in earlier:
        text = f"no stage is named {pushed!r}; found {', '.join(earlier)}{did_you_mean(pushed, earlier)}"
        yield say(text, "hub", "stage")


def _quantization(quantization: dict[str, Any], say: Say) -> Iterable[Problem]:
    for key, value in quantization.items():
        if wrong := problem_with("BitsAndBytesConfig", key, value):
            yield say(wrong, "quantization", key)
        elif key in QUANTIZED_TYPES and value is not None and value not in QUANTIZED_TYPES[key]:
            allowed = QUANTIZED_TYPES[key]
            text = f"found {short(value)}, expected {', '.join(allowed)}{did_you_mean(value, allowed)}"
            yield say(text, "quantization", key)
        elif key == "bnb_4bit_quant_type" and value not in ("nf4", "fp4"):
            yield say(f"found {value!r}, expected nf4 or fp4", "quantization", key)
        elif key.startswith("bnb_4bit_") and quantization.get("load_in_4bit") is not True:
            yield say("is ignored without load_in_4bit: true", "quantization", key)
        elif key in ("llm_int8_threshold", "llm_int8_has_fp16_weight") and quantization.get("load_in_8bit") is not True:
            yield say("is ignored without load_in_8bit: true", "quantization", key)
    if quantization.get("load_in_4bit") and quantization.get("load_in_8bit"):
        yield say("8-bit and 4-bit together; keep one of them", "quantization", "load_in_8bit")
    known = set(quantization) & set(field_types("BitsAndBytesConfig"))
    if known and not {"load_in_4bit", "load_in_8bit"} & known:
        yield say("neither load_in_4bit nor load_in_8bit is set; nothing would be quantized", "quantization")


def _start(stage: dict[str, Any], earlier: list[str], say: Say, *at: str | int) -> Iterable[Problem]:
    name, start = _name(stage), stage.get("from")
    if name in earlier:
        yield say(f"two stages are named {name!r}; give each stage its own name", *at, "name")
    if name in ("base", "adapter", "adapter.partial", "report", "report.html") or name.endswith(".previous"):
        yield say(f"{name!r} has a meaning of its own in a run; choose another name", *at, "name")
    known = ["base", *earlier]
    if isinstance(start, str) and "/" not in start and start not in known:
        found = ", ".join(known)
        text = f"no earlier stage is named {start!r}; found {found}; or give an adapter's path, as in ./adapter"
        yield say(text + did_you_mean(start, known), *at, "from")
    if stage.get("type") == "sft":
        for key in ("reference", "prefix_sharing", "guard", "keep"):
            if key in stage:
                yield say("is for dpo stages; sft has no reference and no pairs", *at, key)
    if stage.get("keep") == "best" and not stage.get("eval_data"):
        yield say("the best checkpoint is found on held-out pairs; give the stage eval_data", *at, "keep")
    for key in ("load_best_model_at_end", "metric_for_best_model", "greater_is_better"):
        if key in _mapping(stage.get("trainer")) and stage.get("keep") == "best":
            yield say("keep: best decides which checkpoint is kept; remove one of the two", *at, "trainer", key)
    if stage.get("adapter") == "continue":
        if start == "base" or (start is None and not earlier):
            yield say("there is no adapter to continue: the stage starts from the base", *at, "adapter")
        if stage.get("lora") is not None:
            text = "an adapter that is continued keeps its own LoRA settings; remove lora, or use adapter: new"
            yield say(text, *at, "lora")


def _adapters(data: dict[str, Any], stages: list[dict[str, Any]], say: Say) -> Iterable[Problem]:
    """Rules about the LoRA fields that a stage gets from the recipe and from itself, and from the stage below it."""
    shared = _mapping(data.get("lora"))
    said: set[tuple[Any, ...]] = set()
    made: dict[str, tuple[int, dict[str, Any]]] = {}  # stage -> which stage made its adapter, and with what
    for i, stage in enumerate(stages):
        own = _mapping(stage.get("lora"))
        lora = shared | own
        start = stage.get("from") or (_name(stages[i - 1]) if i else "base")
        if stage.get("adapter") == "continue":
            if start in made:
                made[_name(stage)] = made[start]
            continue

        def say_at(key: str, text: str, own: dict[str, Any] = own, i: int = i) -> Problem:
            return say(text, "stages", i, "lora", key) if key in own else say(text, "lora", key)

        found = [*merged_problems(lora, say_at), *_activated(stage, lora, say_at)]
        if start != "base" and isinstance(start, str):
            found += _stacked(i, start, lora, made, say)
        for problem in found:
            if (problem.key, problem.text) not in said:
                said.add((problem.key, problem.text))
                yield problem
        made[_name(stage)] = (i, lora)


def _stacked(i: int, start: str, lora: dict[str, Any], made: dict[str, Any], say: Say) -> Iterable[Problem]:
    reasons = not_by_rank(made.get(start, (i, {}))[1]) | not_by_rank(lora)
    if reasons:
        found = "; ".join(f"{key}: {reason}" for key, reason in reasons.items())
        text = f"a new adapter cannot be stacked here ({found}); use adapter: continue"
        yield say(text, "stages", i, "adapter")


def _activated(stage: dict[str, Any], lora: dict[str, Any], say_at: Any) -> Iterable[Problem]:
    if not lora.get("alora_invocation_tokens"):
        return
    because = "PEFT counts from the end of each row where the adapter begins to act"
    if stage.get("type") == "dpo" and stage.get("prefix_sharing", True) is not False:
        text = f"{because}, and shared prompts move that; set prefix_sharing: false in stage {_name(stage)}"
        yield say_at("alora_invocation_tokens", text)
    if stage.get("type") == "sft" and _mapping(stage.get("trainer")).get("packing"):
        text = f"{because}, and packing moves that; remove packing in stage {_name(stage)}"
        yield say_at("alora_invocation_tokens", text)


def _name(stage: dict[str, Any]) -> str:
    return str(stage.get("name", stage.get("type")))


def _mapping(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}
