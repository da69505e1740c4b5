"""Imports point down, heavy libraries stay out of the lower layers, and the field tables are the installed ones."""

import ast
import dataclasses
import inspect
import re
import subprocess
import sys
from pathlib import Path

import pytest

from toolkit.fields import field_types, problem_with

PACKAGE = Path(__file__).parent.parent / "toolkit"
LAYERS = [
    {"errors", "findings"},
    {"fields", "recipe"},
    {"rules", "plan"},
    {"load"},
    {"chat", "formats", "data", "model", "adapter", "rundir", "progress", "prefix", "grouping", "packing"},
    {"job", "prefix_check", "measure", "guards"},
    {"generate", "heldout"},
    {"proof", "trainer", "cache", "watch"},
    {"reference"},
    {"sft", "dpo", "evaluate", "hub"},
    {"prepare"},
    {"run"},
    {"cli"},
    {"__init__", "__main__"},
]
HEAVY = {"torch", "trl", "transformers", "peft", "accelerate", "datasets", "bitsandbytes"}


def imports(file: Path) -> set[str]:
    """Every module a file imports, at its top or inside a function."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        if isinstance(node, ast.ImportFrom) and node.module:
            found |= {f"{node.module}.{alias.name}" for alias in node.names} | {node.module}
    return found


def test_every_module_has_a_layer() -> None:
    assert {file.stem for file in PACKAGE.glob("*.py")} <= set().union(*LAYERS)


@pytest.mark.parametrize("file", sorted(PACKAGE.glob("*.py")), ids=lambda f: f.stem)
def test_imports_point_down_or_sideways_without_circles(file: Path) -> None:
    level = next(i for i, layer in enumerate(LAYERS) if file.stem in layer)
    allowed = set().union(*LAYERS[: level + 1])
    ours = {name.split(".")[1] for name in imports(file) if name.startswith("toolkit.")}
    assert ours & set().union(*LAYERS) <= allowed


@pytest.mark.parametrize("module", sorted(set().union(*LAYERS[:4])))
def test_the_lower_layers_import_nothing_heavy(module: str) -> None:
    assert not {name.split(".")[0] for name in imports(PACKAGE / f"{module}.py")} & HEAVY


@pytest.mark.parametrize("arguments", ["--help", "--version", "train --help", "train recipes/quickstart/nothing.yaml"])
def test_the_command_line_answers_without_torch(arguments: str) -> None:
    code = f"""
import sys
from toolkit.cli import main
try:
    main({arguments.split()!r})
except SystemExit:
    pass
assert not {HEAVY!r} & set(sys.modules), {HEAVY!r} & set(sys.modules)
"""
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


def test_a_good_recipe_loads_without_torch() -> None:
    code = f"""
import sys, toolkit
toolkit.load_recipe("recipes/quickstart/sft_dpo_lora.yaml")
assert not {HEAVY!r} & set(sys.modules)
"""
    subprocess.run([sys.executable, "-c", code], check=True, cwd=PACKAGE.parent)


@pytest.mark.parametrize("name", ["SFTConfig", "DPOConfig", "LoraConfig"])
def test_the_field_tables_are_those_of_the_installed_classes(name: str) -> None:
    import peft
    import trl

    installed = getattr(peft if name == "LoraConfig" else trl, name)
    fields = {field.name: field for field in dataclasses.fields(installed) if field.init}
    assert set(field_types(name)) == set(fields)
    for key, field in fields.items():  # every default fits the type that was read from the source
        default = field.default if field.default is not dataclasses.MISSING else None
        if field.default_factory is not dataclasses.MISSING:
            default = field.default_factory()
        plain = isinstance(default, str | int | float | bool | list | dict) and type(default).__module__ == "builtins"
        assert not plain or problem_with(name, key, default) is None


def test_the_loss_types_are_those_of_the_installed_trl() -> None:
    from trl import DPOTrainer

    from toolkit.rules import LOSS_TYPES

    source = inspect.getsource(DPOTrainer._compute_loss)
    assert sorted(LOSS_TYPES) == sorted(re.findall(r'loss_type == "(\w+)"', source))


def test_the_quantization_fields_are_those_of_the_installed_class() -> None:
    from transformers import BitsAndBytesConfig

    parameters = inspect.signature(BitsAndBytesConfig.__init__).parameters
    assert set(field_types("BitsAndBytesConfig")) == set(parameters) - {"self", "kwargs"}
