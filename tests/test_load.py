"""YAML to Recipe: numbers, paths, extends, overrides, hostile files."""

from pathlib import Path
from typing import Any

import pytest

import toolkit
from toolkit.recipe.plan import Hardware, model_dtype, quantization, stage_plans

SMALL = """\
model: {name_or_path: some/model}
stages:
  - type: sft
    data: rows.jsonl
    trainer: {learning_rate: 2e-4}
  - {type: dpo, data: [{path: pairs.jsonl}, {path: more/pairs, split: test, limit: 5}]}
"""
CPU, GPU = Hardware("cpu", bf16=False), Hardware("cuda", bf16=True, processes=8)


def test_a_small_recipe(write: Any) -> None:
    recipe = toolkit.load_recipe(write(SMALL))
    assert [(stage.name, stage.type) for stage in recipe.stages] == [("sft", "sft"), ("dpo", "dpo")]
    assert recipe.stages[0].trainer["learning_rate"] == 0.0002
    assert [source.path for source in recipe.stages[1].data] == ["pairs.jsonl", "more/pairs"]
    assert recipe.where("stages", 1, "data", 1, "limit").endswith("recipe.yaml:6: stages[1].data[1].limit")


@pytest.mark.parametrize("text", ["2e-4", "2E-4", "2.e-4", "+2e-4", "0.0002", "2.0e-4"])
def test_yaml_reads_numbers_as_numbers(write: Any, text: str) -> None:
    recipe = toolkit.load_recipe(write(SMALL.replace("2e-4", text)))
    assert recipe.stages[0].trainer["learning_rate"] == 0.0002


def test_yaml_is_read_as_editors_read_it(write: Any) -> None:
    """YAML 1.2: `no` is text, as `save_strategy: no` means it; 010 is ten; dates are text."""
    text = SMALL.replace("{learning_rate: 2e-4}", "{save_strategy: no, max_steps: 010}")
    recipe = toolkit.load_recipe(write(text.replace("some/model", "some/model, revision: 2026-11-23")))
    assert recipe.stages[0].trainer == {"save_strategy": "no", "max_steps": 10}
    assert recipe.model.revision == "2026-11-23"


def test_a_dotted_path_is_relative_to_the_recipe(write: Any, tmp_path: Path) -> None:
    recipe = toolkit.load_recipe(write(SMALL.replace("some/model", "./model").replace("rows.jsonl", "../rows.jsonl")))
    assert recipe.model.name_or_path == str(tmp_path / "model")
    assert recipe.stages[0].data[0].path == str(tmp_path.parent / "rows.jsonl")


def test_extends_merges_mappings_and_replaces_lists(write: Any) -> None:
    write("seed: 1\nlora: {r: 8, lora_alpha: 4}\n" + SMALL, "shared.yaml")
    recipe = toolkit.load_recipe(write("extends: shared.yaml\nlora: {r: 2}\nstages: [{type: sft, data: x.jsonl}]"))
    assert (recipe.seed, recipe.lora, len(recipe.stages)) == (1, {"r": 2, "lora_alpha": 4}, 1)


def test_problems_in_the_shared_file_are_placed_there(write: Any) -> None:
    write("lorra: {r: 8}\n" + SMALL, "shared.yaml")
    with pytest.raises(toolkit.RecipeError, match=r"shared.yaml:1: lorra: unknown key; did you mean 'lora'\?"):
        toolkit.load_recipe(write("extends: shared.yaml"))


def test_extends_in_a_circle(write: Any) -> None:
    write("extends: recipe.yaml", "shared.yaml")
    with pytest.raises(toolkit.RecipeError, match="extend each other in a circle"):
        toolkit.load_recipe(write("extends: shared.yaml"))


def test_overrides_name_stages_by_name_or_index(write: Any) -> None:
    file = write(SMALL)
    overrides = ["stages.dpo.trainer.beta=0.2", "stages.0.trainer.learning_rate=1e-5", "lora.r=4", "seed=3"]
    recipe = toolkit.load_recipe(file, [*overrides, "stages.dpo.data.1.limit=7", "model.revision=null"])
    assert recipe.stages[1].trainer["beta"] == 0.2
    assert recipe.stages[0].trainer["learning_rate"] == 1e-5
    assert (recipe.lora["r"], recipe.seed, recipe.stages[1].data[1].limit) == (4, 3, 7)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", "found nothing, expected a mapping"),
        ("- a\n- b", "found a list, expected a mapping"),
        ("a: " + "[" * 3000, "nested too deeply|not valid YAML"),
        ("a: &a [x, x, x, x, x, x, x, x, x]\n" + "\n".join(f"{chr(98 + i)}: &{chr(98 + i)} [{', '.join(['*' + chr(97 + i)] * 9)}]" for i in range(8)), "more than 20,000 values"),
        ("? [a]\n: b", "expected text|unhashable|a list"),
        ("1: x", "the key 1 is a whole number, expected text"),
        ("model: !!python/object:os.system x", "not valid YAML: could not determine a constructor"),
        ("when: 2026-13-45", "when: unknown key"),
    ],
    ids=["empty", "list", "deep", "bomb", "list-key", "number-key", "tag", "date"],
)  # fmt: skip
def test_a_hostile_file_is_answered(write: Any, text: str, expected: str) -> None:
    with pytest.raises(toolkit.RecipeError, match=expected):
        toolkit.load_recipe(write(text))


def test_not_utf8(tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_bytes(b"model:\n  name: \xff\xfe")
    with pytest.raises(toolkit.RecipeError, match=r"r.yaml:2: byte 0xff is not UTF-8"):
        toolkit.load_recipe(tmp_path / "r.yaml")


def test_a_data_file_given_for_a_recipe(tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text("x" * 1_000_001)
    with pytest.raises(toolkit.RecipeError, match="1,000,001 bytes; a recipe has at most 200,000"):
        toolkit.load_recipe(tmp_path / "r.yaml")


def test_defaults_follow_the_hardware(write: Any) -> None:
    recipe = toolkit.load_recipe(write(SMALL))
    assert (model_dtype(recipe, CPU), model_dtype(recipe, GPU)) == ("float32", "bfloat16")
    assert [plan.trainer["bf16"] for plan in stage_plans(recipe, GPU)] == [True, True]
    assert stage_plans(recipe, GPU)[1].batch_size(GPU) == 64
    sft, dpo = stage_plans(recipe, CPU)
    assert (sft.trainer["learning_rate"], dpo.trainer["learning_rate"]) == (2e-4, 5e-6)
    assert (dpo.trainer["num_train_epochs"], dpo.trainer["beta"], dpo.trainer["bf16"]) == (1, 0.1, False)
    assert sft.lora == {"r": 16, "lora_alpha": 32, "lora_dropout": 0.0, "target_modules": "all-linear"}


def test_four_bits_are_nf4_with_double_quantization_and_bf16_compute(write: Any) -> None:
    recipe = toolkit.load_recipe(write(SMALL + "quantization: {load_in_4bit: true}"))
    assert quantization(recipe) == {
        "load_in_4bit": True,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": True,
        "bnb_4bit_compute_dtype": "bfloat16",
    }
    asked = toolkit.load_recipe(write(SMALL + "quantization: {load_in_4bit: true, bnb_4bit_quant_type: fp4}"))
    assert (quantization(asked) or {})["bnb_4bit_quant_type"] == "fp4"


def test_policy_and_reference_in_words(write: Any) -> None:
    text = SMALL + "  - {name: more, type: dpo, data: p.jsonl, adapter: continue}\n"
    text += "  - {name: aside, type: dpo, data: p.jsonl, from: base}\n"
    plans = stage_plans(toolkit.load_recipe(write(text)), CPU)
    assert [(plan.start, plan.mode, plan.reference) for plan in plans] == [
        ("base", "fresh", None),
        ("sft", "stack", "base + sft adapter (the new adapter disabled)"),
        ("dpo", "continue", "base + dpo adapter as it was (a frozen copy)"),
        ("base", "fresh", "base (the stage's adapter disabled)"),
    ]
