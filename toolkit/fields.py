"""What the installed TRL, PEFT and transformers accept under `trainer`, `lora` and `quantization`.

The field tables are read from the installed source files, since importing `trl` takes seconds and a typo should be
answered at once. A test proves them equal to the imported classes.
"""

import ast
import difflib
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal, Optional, Union

from pydantic import TypeAdapter, ValidationError

_SOURCES = {
    "SFTConfig": ("trl", "trainer/sft_config.py"),
    "DPOConfig": ("trl", "trainer/dpo_config.py"),
    "_BaseConfig": ("trl", "trainer/base_config.py"),
    "TrainingArguments": ("transformers", "training_args.py"),
    "BitsAndBytesConfig": ("transformers", "utils/quantization_config.py"),
    "LoraConfig": ("peft", "tuners/lora/config.py"),
    "PeftConfig": ("peft", "config.py"),
    "PeftConfigMixin": ("peft", "config.py"),
}
_PLAIN_TYPES: dict[str, Any] = {t.__name__: t for t in (str, int, float, bool, list, dict)} | {"tuple": list}


@cache
def field_types(class_name: str) -> dict[str, Any]:
    """Field name -> Python type (`Any` where the annotation names a class of the library), without importing it."""
    node = _class(class_name)
    if class_name == "BitsAndBytesConfig":  # not a dataclass: the parameters of its __init__
        return _parameters(node)
    types: dict[str, Any] = {}
    for base in node.bases:
        if isinstance(base, ast.Name) and base.id in _SOURCES:
            types |= field_types(base.id)
    for statement in node.body:
        if (
            isinstance(statement, ast.AnnAssign)
            and isinstance(statement.target, ast.Name)
            and _is_init_field(statement)
        ):
            types[statement.target.id] = _as_type(statement.annotation)
    return types


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
    try:
        TypeAdapter(types[key]).validate_python(value, strict=True)
    except ValidationError as error:
        expected = " or ".join(dict.fromkeys(e["msg"].removeprefix("Input should be ") for e in error.errors()))
        example = f", as in [{value}]" if expected == "a valid list" and isinstance(value, str) else ""
        return f"found {value!r}, expected {expected}{example}"
    return None


def did_you_mean(key: str, known: Any) -> str:
    """`; did you mean 'beta'?`, or nothing where nothing is near."""
    near = difflib.get_close_matches(key, [str(k) for k in known], n=1, cutoff=0.6)
    return f"; did you mean '{near[0]}'?" if near else ""


def _class(class_name: str) -> ast.ClassDef:
    package, file = _SOURCES[class_name]
    spec = find_spec(package)
    assert spec is not None and spec.origin is not None, f"{package} is not installed"
    tree = ast.parse((Path(spec.origin).parent / file).read_text(encoding="utf-8"))
    return next(n for n in tree.body if isinstance(n, ast.ClassDef) and n.name == class_name)


def _is_init_field(statement: ast.AnnAssign) -> bool:
    if "ClassVar" in ast.unparse(statement.annotation):
        return False
    call = statement.value
    keywords = call.keywords if isinstance(call, ast.Call) else []
    return not any(k.arg == "init" and isinstance(k.value, ast.Constant) and k.value.value is False for k in keywords)


def _parameters(node: ast.ClassDef) -> dict[str, Any]:
    init = next(n for n in node.body if isinstance(n, ast.FunctionDef) and n.name == "__init__")
    names = [argument.arg for argument in init.args.args[1:]]
    defaults = [ast.literal_eval(default) for default in init.args.defaults]
    return {name: Any if default is None else type(default) for name, default in zip(names, defaults, strict=True)}


def _as_type(node: ast.expr) -> Any:
    match node:
        case ast.Constant(value=None):
            return None
        case ast.Constant(value=str(text)):
            return _as_type(ast.parse(text, mode="eval").body)
        case ast.Name(id=name):
            return _PLAIN_TYPES.get(name, Any)
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
