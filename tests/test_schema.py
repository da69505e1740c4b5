"""The JSON Schema says to editors what `load_recipe` says: shipped recipes pass, typos and wrong values do not."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from jsonschema import Draft202012Validator

from tests.test_bad_recipes import FILES as BAD
from toolkit.cli import main
from toolkit.recipe.refused import LORA_REFUSED
from toolkit.recipe.schema import recipe_schema, schema_text
from toolkit.recipe.trainer_rules import refused

RECIPES = Path(__file__).parent.parent / "recipes"
FILES = sorted(RECIPES.rglob("*.yaml"))
VALIDATOR = Draft202012Validator(recipe_schema())
STAGE = {"type": "dpo", "data": [{"path": "pairs.jsonl"}], "trainer": {"beta": 0.1}}
GOOD: dict[str, Any] = {"model": {"name_or_path": "some/model"}, "lora": {"r": 4}, "stages": [STAGE], "seed": 1}


def answers(recipe: Any) -> list[str]:
    """Where, and what is said."""
    return [f"{error.json_path}: {error.message}" for error in VALIDATOR.iter_errors(recipe)]


def test_it_is_a_schema() -> None:
    Draft202012Validator.check_schema(recipe_schema())


def test_the_shipped_file_is_current(capsys: pytest.CaptureFixture[str]) -> None:
    """After a change: `toolkit schema > recipes/recipe.schema.json`."""
    assert (RECIPES / "recipe.schema.json").read_text(encoding="utf-8") == schema_text()
    assert main(["schema"]) == 0
    assert json.loads(capsys.readouterr().out) == recipe_schema()


@pytest.mark.parametrize("file", FILES, ids=[f"{file.parent.name}/{file.stem}" for file in FILES])
def test_a_shipped_recipe_fits_and_names_its_schema(file: Path) -> None:
    text = file.read_text(encoding="utf-8")
    assert answers(yaml.safe_load(text)) == []
    name = text.splitlines()[0].removeprefix("# yaml-language-server: $schema=")
    assert (file.parent / name).samefile(RECIPES / "recipe.schema.json")


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"lorra": {}}, "'lorra' was unexpected"),
        ({"lora": {"lora_alfa": 4}}, "$.lora: Additional properties are not allowed ('lora_alfa' was unexpected)"),
        ({"lora": {"init_lora_weights": "pissa"}}, "$.lora.init_lora_weights: 'pissa' is not one of"),
        ({"quantization": {"load_in_4bits": True}}, "$.quantization"),
        ({"stages": [STAGE | {"trainer": {"bta": 0.1}}]}, "'bta' was unexpected"),
        ({"stages": [STAGE | {"trainer": {"packing": True}}]}, "'packing' was unexpected"),
        ({"stages": [STAGE | {"trainer": {"beta": "high"}}]}, "$.stages[0].trainer.beta: 'high' is not of type 'number'"),
        ({"stages": [STAGE | {"trainer": {"beta": 0}}]}, "0 is less than or equal to the minimum of 0"),
        ({"stages": [STAGE | {"trainer": {"lr_scheduler_type": "cosin"}}]}, "'cosin' is not one of ['linear', 'cosine'"),
        ({"stages": [STAGE | {"trainer": {"loss_type": ["sigmod"]}}]}, "'sigmod' is not one of ['sigmoid'"),
        ({"stages": [STAGE | {"trainer": {"report_to": "wandbb"}}]}, "'wandbb'"),
        ({"stages": [STAGE | {"type": "sft", "trainer": {"beta": 0.1}}]}, "'beta' was unexpected"),
        ({"stages": [STAGE | {"type": "sft", "trainer": {}, "prefix_sharing": True}]}, "False schema does not allow True"),
        ({"stages": [STAGE | {"type": "ppo"}]}, "'ppo' is not one of ['sft', 'dpo']"),
        ({"model": {}}, "$.model: 'name_or_path' is a required property"),
    ],
)  # fmt: skip
def test_a_wrong_value_does_not_fit(change: dict[str, Any], expected: str) -> None:
    assert answers(GOOD) == []
    assert any(expected in answer for answer in answers(GOOD | change))


def test_what_may_be_left_out() -> None:
    assert answers({"extends": "other.yaml", "lora": {"r": 2}}) == []
    assert answers({"model": {"name_or_path": "x"}, "stages": [{"type": "sft", "data": "rows.jsonl"}]}) == []
    assert answers({"model": {"name_or_path": "x"}}) != []


def test_refused_fields_are_absent_and_the_others_are_described() -> None:
    definitions = recipe_schema()["$defs"]
    for name, absent in (("SFTConfig", refused("sft")), ("DPOConfig", refused("dpo")), ("LoraConfig", LORA_REFUSED)):
        fields = definitions[name]["properties"]
        assert not set(fields) & set(absent)
        assert [key for key, field in fields.items() if not field.get("description")] == []
    described = definitions["Stage"]["properties"]["adapter"]["description"]
    assert described == "`new`: a new adapter over the frozen one it starts from. `continue`: train that one further."


@pytest.mark.parametrize(
    "file", [f for f in BAD if "unknown key" in f.read_text().splitlines()[0]], ids=lambda f: f.stem
)
def test_an_unknown_key_does_not_fit(file: Path) -> None:
    assert answers(yaml.safe_load(file.read_text(encoding="utf-8"))) != []
