"""Imports point down, heavy libraries stay out of the lower layers, and the field tables are the installed ones."""

import ast
import dataclasses
import inspect
import os
import re
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

from toolkit.recipe import fields
from toolkit.recipe.fields import field_types, problem_with

PACKAGE = Path(__file__).parent.parent / "toolkit"
LAYERS = [  # packages and single modules; what stands on one line does not import each other
    {"errors", "wording", "findings"},
    {"recipe"},
    {"records", "launching"},
    {"models"},
    {"rows", "pages"},
    {"job"},
    {"resources", "evaluation"},
    {"training"},
    {"checks", "publishing"},
    {"run"},
    {"cli"},
    {"__init__", "__main__"},
]
WITHOUT_TORCH = {"errors", "wording", "findings", "recipe", "records", "pages"}
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


def part(file: Path) -> str:
    """The package under `toolkit` that a module belongs to, or the module itself where it stands alone."""
    return file.relative_to(PACKAGE).parts[0].removesuffix(".py")


MODULES = sorted(PACKAGE.rglob("*.py"))


def test_every_part_has_a_layer() -> None:
    assert {part(file) for file in MODULES} == set().union(*LAYERS)


@pytest.mark.parametrize("file", MODULES, ids=lambda f: str(f.relative_to(PACKAGE)))
def test_imports_point_down(file: Path) -> None:
    below = set().union(*LAYERS[: next(i for i, layer in enumerate(LAYERS) if part(file) in layer)])
    ours = {name.split(".")[1] for name in imports(file) if name.startswith("toolkit.")}
    assert ours & set().union(*LAYERS) <= below | {part(file)}


def test_no_modules_import_each_other_in_a_circle() -> None:
    names = {".".join(file.relative_to(PACKAGE.parent).with_suffix("").parts): file for file in MODULES}
    graph = {name: imports(file) & set(names) - {name} for name, file in names.items()}
    assert list(TopologicalSorter(graph).static_order())  # raises CycleError otherwise


@pytest.mark.parametrize(
    "file", [f for f in MODULES if part(f) in WITHOUT_TORCH], ids=lambda f: str(f.relative_to(PACKAGE))
)
def test_the_lower_layers_import_nothing_heavy(file: Path) -> None:
    assert not {name.split(".")[0] for name in imports(file)} & HEAVY


@pytest.mark.parametrize(
    "arguments",
    [
        "--help",
        "--version",
        "train --help",
        "schema",
        "train recipes/quickstart/nothing.yaml",
        "report --list .",
        "diff README.md README.md",
    ],
)
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


def test_training_starts_without_torchs_compiler_and_leaves_it_to_others() -> None:
    code = """
import os, sys, toolkit
toolkit.train
import torch
assert "bitsandbytes" in sys.modules and "torch._inductor.compile_fx" not in sys.modules
assert os.environ["TORCHDYNAMO_DISABLE"] == ""
compiled = torch.compile(lambda x: x + 1, backend=lambda graph, inputs: lambda *given: (torch.full((1,), 7.0),))
assert compiled(torch.zeros(1)).item() == 7.0
"""
    subprocess.run([sys.executable, "-c", code], check=True, env={**os.environ, "TORCHDYNAMO_DISABLE": ""})


@pytest.mark.parametrize("name", ["SFTConfig", "DPOConfig", "LoraConfig"])
def test_the_field_tables_are_those_of_the_installed_classes(name: str) -> None:
    import peft
    import trl

    installed = getattr(peft if name == "LoraConfig" else trl, name)
    declared = {field.name: field for field in dataclasses.fields(installed) if field.init}
    assert set(field_types(name)) == set(declared)
    for key, field in declared.items():  # every default fits the type that was read from the source
        default = field.default if field.default is not dataclasses.MISSING else None
        if field.default_factory is not dataclasses.MISSING:
            default = field.default_factory()
        plain = isinstance(default, str | int | float | bool | list | dict) and type(default).__module__ == "builtins"
        assert not plain or problem_with(name, key, default) is None


def test_the_names_of_enums_are_those_of_the_installed_transformers() -> None:
    from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK
    from transformers.trainer_utils import IntervalStrategy, SaveStrategy, SchedulerType
    from transformers.training_args import OptimizerNames, trainer_log_levels

    for enum in (IntervalStrategy, SaveStrategy, SchedulerType, OptimizerNames):
        assert fields.enum_values(enum.__name__) == tuple(member.value for member in enum)
    assert fields.trackers() == tuple(INTEGRATION_TO_CALLBACK)
    assert fields.log_levels() == tuple(trainer_log_levels)


@pytest.mark.parametrize("name", ["SFTConfig", "DPOConfig", "AcceleratorConfig"])
def test_choices_and_help_are_those_of_the_installed_classes(name: str) -> None:
    import trl
    from transformers.trainer_pt_utils import AcceleratorConfig

    installed = AcceleratorConfig if name == "AcceleratorConfig" else getattr(trl, name)
    assert set(fields.fields(name)) == {field.name for field in dataclasses.fields(installed) if field.init}
    for field in dataclasses.fields(installed):
        if allowed := field.metadata.get("choices"):
            assert [c for c in fields.choices(fields.field_types(name)[field.name]) if c is not None] == list(allowed)
        if field.init and "help" in field.metadata:
            assert fields.fields(name)[field.name].help == " ".join(field.metadata["help"].replace("%%", "%").split())


def test_the_arguments_of_schedules_are_those_of_the_installed_transformers() -> None:
    from transformers.optimization import TYPE_TO_SCHEDULER_FUNCTION

    given = {"optimizer", "num_warmup_steps", "num_training_steps", "last_epoch"}
    for name, function in TYPE_TO_SCHEDULER_FUNCTION.items():
        parameters = dict(inspect.signature(function).parameters)
        if any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
            assert fields.schedule_arguments(name.value) is None
            continue
        required = {k for k, p in parameters.items() if p.default is p.empty}
        allowed, needed = fields.schedule_arguments(name.value) or ((), ())
        assert (set(allowed), set(needed)) == (set(parameters) - given, required - given)


def test_what_the_rules_know_of_trl_and_plan_is_so() -> None:
    from trl import DPOTrainer

    from toolkit.recipe import loss_rules, plan, trainer_rules

    source = inspect.getsource(DPOTrainer)
    divergences = re.findall(r'f_divergence_type == "(\w+)"', source)
    assert sorted(loss_rules.DIVERGENCES) == sorted(divergences)
    (with_divergence,) = re.findall(r"f_divergence_loss_types = (\{.*?\})", source)
    assert ast.literal_eval(with_divergence) == loss_rules.WITH_DIVERGENCE
    reported = set(re.findall(r'_metrics\[mode\]\["([\w/]+)"\]', source)) - {"aux_loss"}
    assert reported <= set(trainer_rules.METRICS["dpo"])
    assert plan.EVAL_DEFAULTS["eval_steps"] == trainer_rules.DEFAULT_EVAL_STEPS
    assert plan.KEEPING_DEFAULTS["save_steps"] == trainer_rules.DEFAULT_SAVE_STEPS
    for stage_type in ("sft", "dpo"):
        defaults = plan.TRAINER_DEFAULTS[stage_type] | plan.KEEPING_DEFAULTS | plan.EVAL_DEFAULTS
        stage = {"type": stage_type, "eval_data": ["x"], "trainer": defaults}
        assert list(trainer_rules.trainer_problems(stage, lambda text, *at: (text, at), "trainer")) == []


@pytest.mark.parametrize("name", ["SFTConfig", "DPOConfig"])
def test_every_refused_field_is_one_that_somebody_could_write(name: str) -> None:
    from toolkit.recipe.refused import LORA_REFUSED, OTHER_NAMES, OWNED_BY_TOOLKIT, REFUSED_IN_DPO

    both = set(field_types("SFTConfig")) | set(field_types("DPOConfig"))
    assert set(OWNED_BY_TOOLKIT) - both == {"overwrite_output_dir"}  # which transformers 4 had
    assert set(REFUSED_IN_DPO) <= set(field_types("DPOConfig"))
    assert set(LORA_REFUSED) <= set(field_types("LoraConfig"))
    assert not set(OTHER_NAMES) & (set(field_types(name)) | set(field_types("LoraConfig")))


@pytest.mark.parametrize("name", ["SFTTrainer", "DPOTrainer"])
def test_the_installed_trl_refuses_an_adapter_on_the_head(name: str) -> None:
    """Why `lora_rules` refuses it in both kinds of stages; once TRL trains it, the rule goes."""
    import trl

    source = inspect.getsource(getattr(trl, name))
    assert "isinstance(model.get_output_embeddings(), BaseTunerLayer)" in source


def test_the_loss_types_are_those_of_the_installed_trl() -> None:
    from trl import DPOTrainer

    from toolkit.recipe.loss_rules import LOSS_TYPES

    source = inspect.getsource(DPOTrainer._compute_loss)
    assert sorted(LOSS_TYPES) == sorted(re.findall(r'loss_type == "(\w+)"', source))


def test_the_quantization_fields_are_those_of_the_installed_class() -> None:
    from transformers import BitsAndBytesConfig

    parameters = inspect.signature(BitsAndBytesConfig.__init__).parameters
    assert set(field_types("BitsAndBytesConfig")) == set(parameters) - {"self", "kwargs"}
