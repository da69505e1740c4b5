"""YAML to `Recipe`: positions, `extends`, `--set` overrides, and error texts that name file, line and key."""

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any, get_args

import yaml
from pydantic import BaseModel, ValidationError

from toolkit.errors import Problem, RecipeError
from toolkit.fields import did_you_mean
from toolkit.recipe import Location, Recipe, dotted, position
from toolkit.rules import problems_in

MAX_BYTES = 1_000_000
MAX_NODES = 100_000


def load_recipe(path: str | Path, overrides: Iterable[str] = ()) -> Recipe:
    """Read, merge, override and validate a recipe. Imports neither torch nor trl.

    Args:
        path: The YAML file.
        overrides: `--set` expressions such as `stages.dpo.trainer.beta=0.2`; stages are named by name or index.

    Raises:
        RecipeError: with every problem found, each with file, line and key.
    """
    file = Path(path)
    written: dict[str, str] = {}
    data, lines = _read(file, (), written)
    for override in overrides:
        _apply_override(data, lines, override)
    problems: list[Problem] = []
    try:
        recipe = Recipe.model_validate(data)
    except ValidationError as error:
        problems = [_problem(e, lines) for e in error.errors()]
    problems += problems_in(data, lines)
    if problems:
        raise RecipeError(problems)
    recipe._file, recipe._lines, recipe._written = file, lines, written
    return recipe


# --- YAML with positions ---------------------------------------------------------------------------------------------


class _Loader(yaml.SafeLoader):
    """Safe YAML in which 2e-4 is a number, as YAML 1.2 has it; PyYAML reads YAML 1.1, where it is text."""


_Loader.yaml_implicit_resolvers = {k: list(v) for k, v in yaml.SafeLoader.yaml_implicit_resolvers.items()}
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?[0-9][0-9_]*(\.[0-9_]*)?[eE][-+]?[0-9]+$"), list("-+0123456789")
)


def _read(file: Path, seen: tuple[Path, ...], written: dict[str, str]) -> tuple[dict[str, Any], dict[Location, str]]:
    if file.resolve() in seen:
        raise _error(str(file), "extends", "the files extend each other in a circle")
    lines: dict[Location, str] = {}
    data = _construct(file, _text(file), lines)
    if not isinstance(data, dict):
        raise _error(f"{file}:1", "", f"found {_kind(data)}, expected a mapping with model and stages; see recipes/")
    parent = data.pop("extends", None)
    if parent is not None and not isinstance(parent, str):
        raise _error(lines[("extends",)], "extends", f"found {_kind(parent)}, expected the name of a recipe file")
    _resolve_paths(data, file.parent, written)
    if parent is None:
        return data, lines
    base, base_lines = _read(file.parent / parent, (*seen, file.resolve()), written)
    return _merge(base, data), base_lines | lines


def _text(file: Path) -> str:
    try:
        raw = file.read_bytes()
    except OSError as error:
        reason = (error.strerror or str(error)).lower()
        raise _error(str(file), "", f"cannot be read ({reason}); expected a recipe file") from None
    if len(raw) > MAX_BYTES:
        raise _error(str(file), "", f"{len(raw):,} bytes; a recipe has at most {MAX_BYTES:,}. Is this a data file?")
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        line = raw[: error.start].count(b"\n") + 1
        raise _error(f"{file}:{line}", "", f"byte {raw[error.start]:#x} is not UTF-8; save the file as UTF-8") from None


def _construct(file: Path, text: str, lines: dict[Location, str]) -> Any:
    loader = _Loader(text)
    loader.name = str(file)
    try:
        node = loader.get_single_node()
        return None if node is None else _value(loader, node, (), file, lines)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f"{file}:{mark.line + 1}:{mark.column + 1}" if mark else str(file)
        text = " ".join(part for part in (error.context, error.problem) if part)
        raise _error(where, "", f"not valid YAML: {text}") from None
    except (yaml.YAMLError, ValueError) as error:
        raise _error(str(file), "", f"not valid YAML: {error}") from None
    except RecursionError:
        raise _error(str(file), "", "nested too deeply to be a recipe") from None
    finally:
        loader.dispose()


def _value(loader: _Loader, node: yaml.Node, at: Location, file: Path, lines: dict[Location, str]) -> Any:
    line = f"{file}:{node.start_mark.line + 1}"
    lines.setdefault(at, line)
    if len(lines) > MAX_NODES:
        raise _error(line, dotted(at), f"more than {MAX_NODES:,} values; expected a recipe")
    if isinstance(node, yaml.SequenceNode):
        return [_value(loader, item, (*at, i), file, lines) for i, item in enumerate(node.value)]
    if not isinstance(node, yaml.MappingNode):
        return loader.construct_object(node)
    written = [key.value for key, _ in node.value if key.tag != "tag:yaml.org,2002:merge"]
    loader.flatten_mapping(node)
    result: dict[Any, Any] = {}
    for key_node, value_node in node.value:
        key = loader.construct_object(key_node, deep=True)
        where = f"{file}:{key_node.start_mark.line + 1}"
        if not isinstance(key, str):
            raise _error(where, dotted(at), f"the key {key!r} is {_kind(key)}, expected text; put it in quotes")
        if written.count(key) > 1:
            raise _error(where, dotted((*at, key)), "the key stands here twice; remove one")
        lines[(*at, key)] = where
        result[key] = _value(loader, value_node, (*at, key), file, lines)
    return result


def _merge(base: Any, over: Any) -> Any:
    """Mappings merge key by key; everything else, lists included, is replaced."""
    if isinstance(base, dict) and isinstance(over, dict):
        return base | {key: _merge(base[key], value) if key in base else value for key, value in over.items()}
    return over


def _resolve_paths(value: Any, folder: Path, written: dict[str, str]) -> None:
    """`./x` and `../x` mean: beside the recipe file that says so, wherever the command is run."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in items:
        if isinstance(item, str) and item.startswith(("./", "../")):
            value[key] = str((folder / item).resolve())
            written[value[key]] = item
        else:
            _resolve_paths(item, folder, written)


def _apply_override(data: dict[str, Any], lines: dict[Location, str], override: str) -> None:
    where = f"--set {override}"
    path, equals, text = override.partition("=")
    if not equals or not path:
        raise _error(where, "", "expected key=value, as in --set stages.dpo.trainer.beta=0.2")
    value = _construct(Path("--set"), text, {})
    *parents, last = path.split(".")
    target: Any = data
    at: Location = ()
    for part in [*parents, last]:
        key = _step(target, part, where, at)
        at = (*at, key)
        if len(at) <= len(parents):
            if isinstance(target, dict) and target.get(key) is None:
                target[key] = {}
            target = target[key]
    target[at[-1]] = value
    lines[at] = where


def _step(target: Any, part: str, where: str, at: Location) -> str | int:
    if isinstance(target, dict):
        return part
    if not isinstance(target, list):
        raise _error(where, dotted(at), f"holds {_kind(target)}, so it has no key {part!r}")
    names = [item.get("name", item.get("type")) if isinstance(item, dict) else None for item in target]
    if part in names:
        return names.index(part)
    if part.isdigit() and int(part) < len(target):
        return int(part)
    known = [str(name) for name in names if name is not None] or [str(i) for i in range(len(target))]
    raise _error(
        where, dotted(at), f"nothing is named {part!r} here; found {', '.join(known)}{did_you_mean(part, known)}"
    )


# --- error texts -----------------------------------------------------------------------------------------------------


def _problem(error: Any, lines: dict[Location, str]) -> Problem:
    at = tuple("from" if part == "from_" else part for part in error["loc"])
    found = error["input"]
    match error["type"]:
        case "extra_forbidden":
            known = _known_keys(at[:-1])
            text = f"unknown key{did_you_mean(str(at[-1]), known)} Expected one of: {', '.join(known)}"
            text = text.replace("unknown key Expected", "unknown key. Expected")
        case "missing":
            text = "is missing; the recipe needs it"
        case "value_error":
            text = str(error["ctx"]["error"])
        case _:
            text = f"found {_kind(found)} {_short(found)}, {error['msg'].replace('Input should be', 'expected')}"
    return Problem(position(lines, at), dotted(at), text)


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


def _kind(value: Any) -> str:
    names = {
        dict: "a mapping",
        list: "a list",
        str: "text",
        bool: "a boolean",
        int: "a whole number",
        float: "a number",
    }
    return "nothing" if value is None else names.get(type(value), type(value).__name__)


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _error(where: str, key: str, text: str) -> RecipeError:
    return RecipeError([Problem(where, key, text)])
