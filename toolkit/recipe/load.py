"""A recipe file to a `Recipe`: validation, and error texts that name file, line and key."""

import re
from collections.abc import Iterable
from itertools import islice
from pathlib import Path
from typing import Any, get_args

from pydantic import BaseModel, ValidationError

from toolkit.errors import Problem, RecipeError
from toolkit.recipe.fields import field_types
from toolkit.recipe.peers import what_it_is
from toolkit.recipe.refused import LORA_REFUSED, OTHER_NAMES
from toolkit.recipe.rules import problems_in
from toolkit.recipe.sections import Location, Recipe, dotted, position
from toolkit.recipe.source import read
from toolkit.recipe.trainer_rules import CONFIGS, refused
from toolkit.wording import did_you_mean, kind, short

MAX_PROBLEMS = 100
REMOTE_CODE = (
    "the recipe asks to run Python code that comes with the base; read that code, then allow it with "
    "--trust-remote-code on the command line"
)


def load_recipe(
    path: str | Path, overrides: Iterable[str] = (), trust_remote_code: bool = False, allow_pickle: bool = False
) -> Recipe:
    """Read, merge, override and validate a recipe. Imports neither torch nor trl.

    Args:
        path: The YAML file.
        overrides: `--set` expressions such as `stages.dpo.trainer.beta=0.2`; stages are named by name or index.
        trust_remote_code: Whoever runs the recipe trusts the code that comes with its base; a recipe that asks for it
            is refused otherwise, since recipes are passed around.
        allow_pickle: Load base weights that are there as pickles only, which can run code, not as safetensors.

    Raises:
        RecipeError: with every problem found, each with file, line and key.
    """
    file = Path(path)
    data, lines, written = read(file, overrides)
    if other := what_it_is(data):
        raise RecipeError([Problem(str(file), "", other)])
    wrong: list[Any] = []
    try:
        recipe = Recipe.model_validate(data)
    except ValidationError as error:
        wrong = error.errors(include_url=False)
    untyped = {e["loc"][:-1] for e in wrong if e["loc"][-1:] == ("type",)}  # a stage's name defaults to its type
    wrong = [e for e in wrong if not (e["type"] == "missing" and e["loc"][-1] == "name" and e["loc"][:-1] in untyped)]
    problems = [_problem(e, data, lines) for e in wrong[:MAX_PROBLEMS]]
    problems += islice(problems_in(data, lines), MAX_PROBLEMS)
    problems = [_placed(p, data) for p in problems]
    if not trust_remote_code and _asks_for_remote_code(data):
        at: Location = ("model", "trust_remote_code")
        problems.append(Problem(position(lines, at), dotted(at), REMOTE_CODE))
    if len(problems) >= MAX_PROBLEMS:
        problems = [*problems[:MAX_PROBLEMS], Problem(str(file), "", "and more; is this a recipe?")]
    if problems:
        raise RecipeError(problems)
    recipe._file, recipe._lines, recipe._written, recipe._allow_pickle = file, lines, written, allow_pickle
    return recipe


def _asks_for_remote_code(data: dict[str, Any]) -> bool:
    model = data.get("model")
    return isinstance(model, dict) and model.get("trust_remote_code") is True


# --- error texts -----------------------------------------------------------------------------------------------------


def _problem(error: Any, data: dict[str, Any], lines: dict[Location, str]) -> Problem:
    at = tuple("from" if part == "from_" else part for part in error["loc"])
    return Problem(position(lines, at), dotted(at)[:300], _text(error, at, data))


def _text(error: Any, at: Location, data: dict[str, Any]) -> str:
    found, context = error["input"], error.get("ctx", {})
    what = f"found {kind(found)}" + ("" if isinstance(found, dict | list) or found is None else f" {short(found)}")
    match error["type"]:
        case "extra_forbidden":
            return _unknown(str(at[-1]), at[:-1], data)
        case "missing":
            return "is missing; the recipe needs it"
        case "value_error":
            return str(context["error"])
        case "list_type":
            return f"{what}, expected a list: each entry begins with a dash"
        case "too_short":
            return "is empty, expected at least one entry"
        case "string_too_short":
            return "is empty, expected text"
        case "model_type" | "model_attributes_type":
            return f"{what}, expected a mapping of {', '.join(_known_keys(at))}"
        case "dict_type":
            return f"{what}, expected a mapping"
        case "string_pattern_mismatch":
            form = "owner/name" if at[-1] == "repo_id" else "letters, digits, dots, dashes and underscores"
            return f"{what}, expected {form}"
        case "literal_error":
            allowed = [word.strip("'") for word in context["expected"].replace(" or ", ", ").split(", ")]
            return f"{what}, {_expected(error['msg'])}{did_you_mean(found, allowed)}"
        case "string_type" if isinstance(found, int | float):
            return f"{what}, {_expected(error['msg'])}; put it in quotes"
        case "bool_type" if isinstance(found, str):
            return f"{what}, expected true or false"
    return f"{what}, {_expected(error['msg'])}"


def _expected(message: str) -> str:
    message = re.sub(r"greater than or equal to (\S+)", r"\1 or more", message)
    return message.replace("Input should be", "expected")


def _unknown(key: str, at: Location, data: dict[str, Any]) -> str:
    known = _known_keys(at)
    expected = f"Expected one of: {', '.join(known)}"
    if home := _home(key, at, data):
        return f"unknown key; it belongs under {home}"
    if key in OTHER_NAMES:
        return f"unknown key: {OTHER_NAMES[key]}. {expected}"
    meant = did_you_mean(key, known)
    return f"unknown key{meant} {expected}" if meant else f"unknown key. {expected}"


def _placed(problem: Problem, data: dict[str, Any]) -> Problem:
    """Say of a key that no installed class knows under `trainer`, `lora` or `quantization` where it belongs."""
    if ", as in" in problem.text or not problem.text.startswith("unknown key, "):
        return problem
    *_, key = problem.key.split(".")
    at: Location = ()
    if problem.key.startswith("stages["):
        at = ("stages", int(problem.key[len("stages[") : problem.key.index("]")]), problem.key.split(".")[1])
    elif "." in problem.key:
        at = (problem.key.split(".")[0],)
    home = _home(key, at, data)
    return Problem(problem.where, problem.key, f"unknown key; it belongs under {home}") if home else problem


def _home(key: str, at: Location, data: dict[str, Any]) -> str | None:
    """Where a recipe has exactly this key, seen from the place where it stands wrongly."""
    stages = data.get("stages")
    stages = [s if isinstance(s, dict) else {} for s in stages] if isinstance(stages, list) else []
    inside = at[1] if len(at) > 1 and at[0] == "stages" else None
    numbers = [inside] if isinstance(inside, int) else [*range(len(stages))]
    for i in numbers:
        stage_type = str(stages[i].get("type")) if i < len(stages) else ""
        config = CONFIGS.get(stage_type)
        if config and key in field_types(config) and key not in refused(stage_type) and at[2:] != ("trainer",):
            return f"stages[{i}].trainer"
        if inside is not None and len(at) > 2 and key in _known_keys(("stages", i)) and key not in ("name", "lora"):
            return f"stages[{i}]"
    if at[:1] != ("lora",) and at[2:] != ("lora",) and key in field_types("LoraConfig") and key not in LORA_REFUSED:
        return "lora"
    if at != ("quantization",) and key in field_types("BitsAndBytesConfig"):
        return "quantization"
    for place, model in (("model", "model"), ("hub", "hub"), ("evaluate", "evaluate")):
        if at != (place,) and key in _known_keys((model,)) and key not in ("revision", "data", "name"):
            return place
    if at and key in _known_keys(()):
        return "the top of the recipe"
    return None


def _known_keys(at: Location) -> list[str]:
    """The keys that the model at this place of the recipe accepts."""
    model: type[BaseModel] = Recipe
    for part in at:
        if isinstance(part, int):
            continue
        field = next((f for name, f in model.model_fields.items() if part in (name, f.alias)), None)
        inner = _model_in(field.annotation) if field is not None else None
        if inner is None:
            continue  # the key of a mapping, such as a score's title
        model = inner
    return [field.alias or name for name, field in model.model_fields.items()]


def _model_in(annotation: Any) -> type[BaseModel] | None:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next((found for arg in get_args(annotation) if (found := _model_in(arg)) is not None), None)
