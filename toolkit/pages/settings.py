"""Recipes and runs as flat settings, `stages.dpo.trainer.beta`, and where several of them differ. Without torch."""

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from toolkit.recipe.plan import Hardware, quantization, stage_plans
from toolkit.recipe.sections import Recipe
from toolkit.records.history import Run

NOT_SETTINGS = ("index", "name", "digest", "token_lengths", "rows", "eval_rows", "steps", "trainable_parameters")
ABOUT_THE_RUN = ("base", "dtype", "hardware", "machine", "versions")
MISSING = "-"


def of_recipe(recipe: Recipe) -> dict[str, Any]:
    """A loaded recipe with every default filled in that does not depend on the machine."""
    stages = []
    for plan, stage in zip(stage_plans(recipe, Hardware("cpu", bf16=False)), recipe.stages, strict=True):
        resolved = asdict(plan)
        if "bf16" not in stage.trainer:
            del resolved["trainer"]["bf16"]  # the machine decides
        stages.append(resolved)
    dumped = recipe.model_dump(mode="json", by_alias=True)
    return nested({"recipe": dumped, "quantization": quantization(recipe), "stages": stages})


def of_run(run: Run) -> dict[str, Any]:
    """A run's recipe with every default filled in, and what it stood on: base, machine, versions."""
    about = {key: run.resolved[key] for key in ABOUT_THE_RUN if run.resolved.get(key)}
    return nested(run.resolved) | about


def nested(resolved: dict[str, Any]) -> dict[str, Any]:
    """In the order of a recipe, and with its names; what is null or empty is left out."""
    recipe = dict(resolved.get("recipe") or {})
    recipe["quantization"] = resolved.get("quantization")
    asked = {stage.get("name"): stage for stage in recipe.get("stages") or [] if isinstance(stage, dict)}
    stages = []
    for plan in resolved.get("stages") or []:
        own = {key: value for key, value in plan.items() if key not in NOT_SETTINGS}
        stages.append({"name": plan.get("name"), **asked.get(plan.get("name"), {}), **own, "from": own.get("start")})
        for twice in ("start", "mode"):  # said by `from` and `adapter`
            stages[-1].pop(twice, None)
    return dict(_filled(recipe | {"stages": stages or recipe.get("stages")}) or {})


def flat(value: Any, at: str = "") -> dict[str, Any]:
    """Dotted key -> value; stages go by their names, lists of plain values are values."""
    if isinstance(value, dict):
        pairs = [(f"{at}.{key}" if at else str(key), inner) for key, inner in value.items()]
    elif isinstance(value, list) and any(isinstance(item, dict) for item in value):
        names = [item.get("name") if at == "stages" and isinstance(item, dict) else None for item in value]
        pairs = [
            (f"{at}.{n}" if n else f"{at}[{i}]", item) for i, (n, item) in enumerate(zip(names, value, strict=True))
        ]
    else:
        return {at: value}
    return {key: leaf for name, inner in pairs for key, leaf in flat(inner, name).items() if key != f"{name}.name"}


def differing(several: Sequence[dict[str, Any]]) -> dict[str, list[Any]]:
    """Key -> its value in each of several flat settings, where they are not all the same; `None` where it is not."""
    keys = dict.fromkeys(key for one in several for key in one)
    found = {key: [one.get(key) for one in several] for key in keys}
    return {key: values for key, values in found.items() if any(value != values[0] for value in values)}


def tails(values: Sequence[Any]) -> list[str]:
    """Values as text; absolute paths by as many of their last parts as tell them apart."""
    texts = [MISSING if value is None else _text(value) for value in values]
    for parts in range(1, 5):
        short = ["/".join(Path(text).parts[-parts:]) if text.startswith("/") else text for text in texts]
        if len(set(short)) == len(set(texts)):
            break
    return short


def _text(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list):
        return ", ".join(_text(item) for item in value)
    return f"{value:g}" if isinstance(value, float) else str(value)


def _filled(value: Any) -> Any:
    if isinstance(value, dict):
        kept = {key: _filled(inner) for key, inner in value.items()}
        return {key: inner for key, inner in kept.items() if inner is not None} or None
    if isinstance(value, list):
        return [_filled(item) for item in value] or None
    return value
