"""A recipe file as plain values with positions: YAML, `extends`, paths, `--set` overrides."""

import re
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any, ClassVar

import yaml

from toolkit.errors import Problem, RecipeError
from toolkit.recipe.sections import Location, dotted
from toolkit.wording import did_you_mean, kind, short

MAX_BYTES = 200_000
MAX_NODES = 20_000
MAX_DIGITS = 30
MERGE = "tag:yaml.org,2002:merge"

Lines = dict[Location, str]


def read(file: Path, overrides: Iterable[str] = ()) -> tuple[dict[str, Any], Lines, dict[str, str]]:
    """The mapping in a recipe file with `extends` and overrides applied, and `file:line` of every key.

    The third part says of each local path, resolved, how it was written.

    Raises:
        RecipeError: the file cannot be read, or is no YAML mapping; an override does not fit.
    """
    written: dict[str, str] = {}
    data, lines = _read(file, (), written)
    for override in overrides:
        _apply_override(data, lines, override)
    return data, lines, written


# --- YAML with positions ---------------------------------------------------------------------------------------------


class _Loader(yaml.SafeLoader):
    """Safe YAML 1.2, as editors read it: 2e-4 is a number, and `no`, `on` and dates are text. PyYAML reads YAML 1.1."""

    yaml_implicit_resolvers: ClassVar[dict[str, Any]] = {}  # type: ignore[misc]

    def construct_integer(self, node: yaml.ScalarNode) -> int:
        """A whole number, of a length that one has."""
        text = self.construct_scalar(node)
        if len(text) > MAX_DIGITS:
            raise yaml.constructor.ConstructorError(problem="a number of too many digits", problem_mark=node.start_mark)
        return int(text, {"0o": 8, "0x": 16}.get(text[:2], 10))


for _tag, _pattern, _first in (
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("bool", r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    ("int", r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+", list("-+0123456789")),
    ("float", r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?", list("-+.0123456789")),
    ("float", r"[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)", list("-+.")),
    ("merge", r"<<", ["<"]),
):
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(rf"^(?:{_pattern})$"), _first)
_Loader.add_constructor("tag:yaml.org,2002:int", _Loader.construct_integer)


def _read(file: Path, seen: tuple[Path, ...], written: dict[str, str]) -> tuple[dict[str, Any], Lines]:
    text = _text(file)
    if file.resolve() in seen:
        raise _error(str(file), "extends", "the files extend each other in a circle")
    lines: Lines = {}
    data = _construct(str(file), text, lines)
    if not isinstance(data, dict):
        raise _error(f"{file}:1", "", f"found {kind(data)}, expected a mapping with model and stages; see recipes/")
    parent = data.pop("extends", None)
    if parent is not None and not isinstance(parent, str):
        raise _error(lines[("extends",)], "extends", f"found {kind(parent)}, expected the name of a recipe file")
    _resolve_paths(data, file.parent, written)
    if parent is None:
        return data, lines
    try:
        base, base_lines = _read(file.parent / parent, (*seen, file.resolve()), written)
    except RecursionError:
        raise _error(lines[("extends",)], "extends", "too many files extend each other") from None
    return _merge(base, data), base_lines | lines


def _text(file: Path) -> str:
    try:
        if file.exists() and not file.is_file():
            what = "a folder" if file.is_dir() else "not a plain file"
            raise _error(str(file), "", f"is {what}; expected a recipe, a YAML file")
        with file.open("rb") as stream:
            raw = stream.read(MAX_BYTES + 1)
            size = len(raw) if len(raw) <= MAX_BYTES else file.stat().st_size
    except (OSError, ValueError) as error:
        reason = str(getattr(error, "strerror", None) or error).lower()
        near = did_you_mean(file.name, _siblings(file))
        raise _error(str(file)[:500], "", f"cannot be read ({reason}); expected a recipe file{near}") from None
    if size > MAX_BYTES:
        raise _error(str(file), "", f"{size:,} bytes; a recipe has at most {MAX_BYTES:,}. Is this a data file?")
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw[: error.start].count(b"\n") + 1
        raise _error(f"{file}:{line}", "", f"byte {raw[error.start]:#x} is not UTF-8; save the file as UTF-8") from None


def _siblings(file: Path) -> list[str]:
    try:
        return [p.name for p in file.parent.iterdir()]
    except (OSError, ValueError):
        return []


def _construct(name: str, text: str, lines: Lines) -> Any:
    """The values in a YAML text; `name` is where it came from, a file or an override."""
    reader = None
    try:
        reader = _Reader(name, text, lines)
        node = reader.loader.get_single_node()
        return None if node is None else reader.value(node, ())
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f"{name}:{mark.line + 1}:{mark.column + 1}" if mark and not name.startswith("--set") else name
        said = " ".join(part for part in (error.context, error.problem) if part)
        raise _error(where, "", f"not valid YAML: {_one_line(said)}") from None
    except (yaml.YAMLError, ValueError, TypeError, AttributeError, OverflowError) as error:
        raise _error(name, "", f"not valid YAML: {_one_line(str(error))}") from None
    except RecursionError:
        raise _error(name, "", "nested too deeply to be a recipe") from None
    finally:
        if reader is not None:
            reader.loader.dispose()


class _Reader:
    """Turns the nodes of one YAML text into values, and notes where each stands."""

    def __init__(self, name: str, text: str, lines: Lines):
        self.name, self.lines, self.loader = name, lines, _Loader(text)
        self.inside: list[yaml.Node] = []

    def value(self, node: yaml.Node, at: Location) -> Any:
        line = self._line(node)
        self.lines.setdefault(at, line)
        if len(self.lines) > MAX_NODES:
            raise _error(line, dotted(at)[:200], f"more than {MAX_NODES:,} values; expected a recipe")
        if any(node is outer for outer in self.inside):
            raise _error(line, dotted(at)[:200], "an alias stands inside of what it names; expected a recipe")
        self.inside.append(node)
        try:
            if isinstance(node, yaml.SequenceNode):
                return [self.value(item, (*at, i)) for i, item in enumerate(node.value)]
            return self._mapping(node, at) if isinstance(node, yaml.MappingNode) else self.loader.construct_object(node)
        finally:
            self.inside.pop()

    def _mapping(self, node: yaml.MappingNode, at: Location) -> dict[str, Any]:
        written = [key.value for key, _ in node.value if key.tag != MERGE]
        self._merged_size(node, (), MAX_NODES)
        self.loader.flatten_mapping(node)
        twice = {key for key, count in Counter(k for k in written if isinstance(k, str)).items() if count > 1}
        result: dict[str, Any] = {}
        for key_node, value_node in node.value:
            key, where = self.loader.construct_object(key_node, deep=True), self._line(key_node)
            if not isinstance(key, str):
                raise _error(where, dotted(at), f"the key {short(key)} is {kind(key)}, expected text; put it in quotes")
            if key in twice:
                raise _error(where, dotted((*at, key))[:200], "the key stands here twice; remove one")
            self.lines[(*at, key)] = where
            result[key] = self.value(value_node, (*at, key))
        return result

    def _merged_size(self, node: yaml.MappingNode, inside: tuple[yaml.Node, ...], budget: int) -> int:
        """Pairs that a mapping holds with all it merges; PyYAML merges `<<` even into itself, and without any end."""
        size = len(node.value)
        for key, value in node.value:
            if key.tag != MERGE:
                continue
            for source in value.value if isinstance(value, yaml.SequenceNode) else [value]:
                if any(source is outer for outer in (*inside, node)):
                    raise _error(self._line(key), "<<", "a mapping is merged into itself; expected a recipe")
                if isinstance(source, yaml.MappingNode):
                    size += 1 + self._merged_size(source, (*inside, node), budget - size)
                if size > budget:
                    raise _error(self._line(key), "<<", f"merges more than {MAX_NODES:,} values; expected a recipe")
        return size

    def _line(self, node: yaml.Node) -> str:
        return self.name if self.name.startswith("--set") else f"{self.name}:{node.start_mark.line + 1}"


def _one_line(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= 300 else line[:297] + "..."


def _merge(base: Any, over: Any) -> Any:
    """Mappings merge key by key; everything else, lists included, is replaced."""
    if isinstance(base, dict) and isinstance(over, dict):
        return base | {key: _merge(base[key], value) if key in base else value for key, value in over.items()}
    return over


def _resolve_paths(value: Any, folder: Path, written: dict[str, str]) -> None:
    """`./x` and `../x` mean: beside the recipe file that says so, wherever the command is run."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in items:
        if isinstance(item, str) and item.startswith(("./", "../")) and "\0" not in item:
            value[key] = str((folder / item).resolve())
            written[value[key]] = item
        else:
            _resolve_paths(item, folder, written)


# --- --set -----------------------------------------------------------------------------------------------------------


def _apply_override(data: dict[str, Any], lines: Lines, override: str) -> None:
    where = f"--set {_one_line(override)}"
    path, equals, text = override.partition("=")
    if not equals or not path:
        raise _error(where, "", "expected key=value, as in --set stages.dpo.trainer.beta=0.2")
    value = _construct(where, text, {})
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
        raise _error(where, dotted(at), f"holds {kind(target)}, so it has no key {part!r}")
    names = [item.get("name", item.get("type")) if isinstance(item, dict) else None for item in target]
    if part in names:
        return names.index(part)
    if part.isascii() and part.isdigit() and len(part) < 6 and int(part) < len(target):
        return int(part)
    known = [str(name) for name in names if name is not None] or [str(i) for i in range(len(target))]
    raise _error(
        where, dotted(at), f"nothing is named {part!r} here; found {', '.join(known)}{did_you_mean(part, known)}"
    )


def _error(where: str, key: str, text: str) -> RecipeError:
    return RecipeError([Problem(where, key, text)])
