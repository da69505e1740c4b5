"""What the installed TRL, PEFT and transformers accept under `trainer`, `lora` and `quantization`.

The field tables are read from the installed source files, since importing `trl` takes seconds and a typo should be
answered at once. Tests prove them equal to the imported classes.
"""

import ast
import math
import re
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal, Optional, Union

from pydantic import TypeAdapter, ValidationError

from toolkit.wording import did_you_mean, short

_SOURCES = {
    "SFTConfig": ("trl", "trainer/sft_config.py"),
    "DPOConfig": ("trl", "trainer/dpo_config.py"),
    "_BaseConfig": ("trl", "trainer/base_config.py"),
    "TrainingArguments": ("transformers", "training_args.py"),
    "BitsAndBytesConfig": ("transformers", "utils/quantization_config.py"),
    "AcceleratorConfig": ("transformers", "trainer_pt_utils.py"),
    "LoraConfig": ("peft", "tuners/lora/config.py"),
    "PeftConfig": ("peft", "config.py"),
    "PeftConfigMixin": ("peft", "config.py"),
    "SchedulerType": ("transformers", "trainer_utils.py"),
    "IntervalStrategy": ("transformers", "trainer_utils.py"),
    "SaveStrategy": ("transformers", "trainer_utils.py"),
    "OptimizerNames": ("transformers", "training_args.py"),
    "INTEGRATION_TO_CALLBACK": ("transformers", "integrations/integration_utils.py"),
    "log_levels": ("transformers", "utils/logging.py"),
    "schedules": ("transformers", "optimization.py"),
}
_ENUMS = ("SchedulerType", "IntervalStrategy", "SaveStrategy", "OptimizerNames")
_PLAIN_TYPES: dict[str, Any] = {t.__name__: t for t in (str, int, float, bool, list, dict)} | {"tuple": list}


@dataclass(frozen=True)
class Known:
    """One field of an installed class."""

    type: Any
    """Python type; `Any` where the annotation names a class of the library."""
    help: str
    """The library's own sentence about it; may be empty."""


@cache
def fields(class_name: str) -> dict[str, Known]:
    """Field name -> what is known of it, read from the class's source without importing it."""
    node = _class(class_name)
    if class_name == "BitsAndBytesConfig":  # not a dataclass: the parameters of its __init__
        return _parameters(node)
    found: dict[str, Known] = {}
    for base in node.bases:
        if isinstance(base, ast.Name) and base.id in _SOURCES:
            found |= fields(base.id)
    for statement in node.body:
        if isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name) and _is_init(statement):
            name = statement.target.id
            found[name] = Known(_field_type(class_name, name, statement), _metadata(statement).get("help", ""))
    return found


def field_types(class_name: str) -> dict[str, Any]:
    """Field name -> Python type (`Any` where the annotation names a class of the library), without importing it."""
    return {name: known.type for name, known in fields(class_name).items()}


@cache
def enum_values(class_name: str) -> tuple[str, ...]:
    """The values of an installed enum, in its order."""
    body = _class(class_name).body
    return tuple(ast.literal_eval(statement.value) for statement in body if isinstance(statement, ast.Assign))


@cache
def trackers() -> tuple[str, ...]:
    """What `report_to` may name, besides `all` and `none`."""
    return _keys("INTEGRATION_TO_CALLBACK")


@cache
def log_levels() -> tuple[str, ...]:
    """What `log_level` may name."""
    return (*_keys("log_levels"), "passive")


@cache
def schedule_arguments(scheduler: str) -> tuple[tuple[str, ...], tuple[str, ...]] | None:
    """Names that `lr_scheduler_kwargs` may, and must, hold for this scheduler; `None` where it takes any."""
    tree = _tree("schedules")
    members = {s.targets[0].id: ast.literal_eval(s.value) for s in _class("SchedulerType").body if _is_member(s)}  # type: ignore[attr-defined]
    table = _assigned(tree, "TYPE_TO_SCHEDULER_FUNCTION")
    name = next(
        function.id
        for member, function in zip(table.keys, table.values, strict=True)
        if isinstance(member, ast.Attribute) and isinstance(function, ast.Name) and members[member.attr] == scheduler
    )
    function = next(n for n in tree.body if isinstance(n, ast.FunctionDef) and n.name == name)
    if function.args.kwarg is not None:
        return None
    given = ("optimizer", "num_warmup_steps", "num_training_steps", "last_epoch")
    names = [argument.arg for argument in function.args.args]
    required = names[: len(names) - len(function.args.defaults)]
    return tuple(n for n in names if n not in given), tuple(n for n in required if n not in given)


@cache
def field_defaults(class_name: str) -> dict[str, Any]:
    """Field name -> default, for the fields whose default is written as a plain value, without importing the class."""
    defaults: dict[str, Any] = {}
    node = _class(class_name)
    for base in node.bases:
        if isinstance(base, ast.Name) and base.id in _SOURCES:
            defaults |= field_defaults(base.id)
    for statement in node.body:
        if isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name) and statement.value:
            name, value = statement.target.id, statement.value
            if isinstance(value, ast.Call):
                value = next((k.value for k in value.keywords if k.arg == "default"), value)
            defaults.pop(name, None)
            try:
                defaults[name] = ast.literal_eval(value)
            except ValueError:
                continue
    return defaults


def problem_with(class_name: str, key: str, value: Any) -> str | None:
    """What is wrong with this key or value for the installed class, or `None`."""
    types = field_types(class_name)
    if key not in types:
        return f"unknown key, {class_name} has no such field{did_you_mean(key, types)}"
    if isinstance(value, float) and not math.isfinite(value):
        return f"found {value}, expected a finite number"
    try:
        TypeAdapter(types[key]).validate_python(value, strict=True)
    except ValidationError as error:
        return _mismatch(error, value)
    return None


def _mismatch(error: ValidationError, value: Any) -> str:
    expected = " or ".join(dict.fromkeys(e["msg"].removeprefix("Input should be ") for e in error.errors()))
    text = f"found {short(value)}, expected {expected}"
    if expected == "a valid list" and isinstance(value, str):
        return f"{text}, as in [{short(value)[1:-1]}]"
    if expected == "a valid string" and isinstance(value, int | float):
        return f"{text}; put it in quotes"
    if expected == "a valid boolean" and isinstance(value, str):
        return f"{text}, which YAML 1.2 writes true or false"
    allowed = [word for e in error.errors() if e["type"] == "literal_error" for word in re.findall("'(.*?)'", e["msg"])]
    return text + did_you_mean(value, allowed)


def choices(type_: Any) -> list[Any]:
    """The values of a `Literal`, also inside a union; empty for other types."""
    if getattr(type_, "__origin__", None) is Literal:
        return list(type_.__args__)
    return [value for inner in getattr(type_, "__args__", ()) for value in choices(inner)]


# --- reading the installed sources ------------------------------------------------------------------------------------


@cache
def _parsed(package: str, file: str) -> ast.Module:
    spec = find_spec(package)
    assert spec is not None and spec.origin is not None, f"{package} is not installed"
    return ast.parse((Path(spec.origin).parent / file).read_text(encoding="utf-8"))


def _tree(name: str) -> ast.Module:
    return _parsed(*_SOURCES[name])


def _class(name: str) -> ast.ClassDef:
    return next(n for n in _tree(name).body if isinstance(n, ast.ClassDef) and n.name == name)


def _assigned(tree: ast.Module, name: str) -> ast.Dict:
    statements = [n for n in tree.body if isinstance(n, ast.Assign) and isinstance(n.targets[0], ast.Name)]
    found = next(n.value for n in statements if n.targets[0].id == name)  # type: ignore[attr-defined]
    assert isinstance(found, ast.Dict), f"{name} is no longer written out as a dict"
    return found


def _keys(name: str) -> tuple[str, ...]:
    return tuple(ast.literal_eval(key) for key in _assigned(_tree(name), name).keys if key is not None)


def _is_member(statement: ast.stmt) -> bool:
    return isinstance(statement, ast.Assign) and isinstance(statement.targets[0], ast.Name)


def _is_init(statement: ast.AnnAssign) -> bool:
    if "ClassVar" in ast.unparse(statement.annotation):
        return False
    return not any(
        k.arg == "init" and isinstance(k.value, ast.Constant) and k.value.value is False for k in _keywords(statement)
    )


def _keywords(statement: ast.AnnAssign) -> list[ast.keyword]:
    return statement.value.keywords if isinstance(statement.value, ast.Call) else []


def _metadata(statement: ast.AnnAssign) -> dict[str, Any]:
    """The parts of `field(metadata={...})` that are written out: `help` and `choices`."""
    found: dict[str, Any] = {}
    for keyword in _keywords(statement):
        if keyword.arg != "metadata" or not isinstance(keyword.value, ast.Dict):
            continue
        for key, value in zip(keyword.value.keys, keyword.value.values, strict=True):
            try:
                found[ast.literal_eval(key)] = ast.literal_eval(value)  # type: ignore[arg-type]
            except ValueError:
                continue  # computed when the module is imported
    return {key: " ".join(value.replace("%%", "%").split()) if key == "help" else value for key, value in found.items()}


def _field_type(class_name: str, name: str, statement: ast.AnnAssign) -> Any:
    declared = _as_type(statement.annotation)
    allowed = _metadata(statement).get("choices")
    if name in ("log_level", "log_level_replica"):
        allowed = log_levels()
    if not allowed:
        return declared
    literal: Any = Literal[tuple(allowed)]
    return Optional[literal] if type(None) in getattr(declared, "__args__", ()) else literal


def _parameters(node: ast.ClassDef) -> dict[str, Known]:
    init = next(n for n in node.body if isinstance(n, ast.FunctionDef) and n.name == "__init__")
    names = [argument.arg for argument in init.args.args[1:]]
    defaults = [ast.literal_eval(default) for default in init.args.defaults]
    described = re.findall(r"^ {8}(\w+) \(.*?\):\n((?: {12}.*\n)+)", ast.get_docstring(node, clean=False) or "", re.M)
    texts = {name: " ".join(text.split()) for name, text in described}
    types = {name: Any if default is None else type(default) for name, default in zip(names, defaults, strict=True)}
    return {name: Known(type_, texts.get(name, "")) for name, type_ in types.items()}


def _as_type(node: ast.expr) -> Any:
    match node:
        case ast.Constant(value=None):
            return None
        case ast.Constant(value=str(text)):
            return _as_type(ast.parse(text, mode="eval").body)
        case ast.Name(id=name) if name in _ENUMS:
            return Literal[enum_values(name)]
        case ast.Name(id=name):
            return _PLAIN_TYPES.get(name, Any)
        case ast.BinOp(left=ast.Name(id=name), op=ast.BitOr(), right=ast.Name(id="str")) if name in _ENUMS:
            return _as_type(node.left)  # the text is turned into the enum, so only its values will do
        case ast.BinOp(left=left, op=ast.BitOr(), right=right):
            return Union[_as_type(left), _as_type(right)]
        case ast.Subscript(value=ast.Name(id=name), slice=inner):
            return _subscripted(name, inner.elts if isinstance(inner, ast.Tuple) else [inner])
    return Any


def _subscripted(name: str, inner: list[ast.expr]) -> Any:
    match name:
        case "Literal":
            return Literal[tuple(ast.literal_eval(e) for e in inner)]
        case "Optional":
            return Optional[_as_type(inner[0])]
        case "Union":
            return Union[tuple(_as_type(e) for e in inner)]
        case "list" | "List":
            return list[_as_type(inner[0])]  # type: ignore[misc]
        case "dict" | "Dict":
            return dict[_as_type(inner[0]), _as_type(inner[1])]  # type: ignore[misc]
    return list if name in ("tuple", "Tuple") else Any
