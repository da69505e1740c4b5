"""Another tool's file, given for a recipe by mistake: one answer that says what it is and what a recipe looks like."""

from typing import Any

import pytest
import yaml

import toolkit

TRL = """\
model_name_or_path: Qwen/Qwen2-0.5B
dataset_name: trl-lib/Capybara
learning_rate: 2.0e-4
per_device_train_batch_size: 2
use_peft: true
lora_r: 32
lora_alpha: 16
output_dir: Qwen2-0.5B-SFT
push_to_hub: true
"""
AXOLOTL = """\
base_model: NousResearch/Llama-3.2-1B
load_in_4bit: true
datasets:
  - path: teknium/GPT4-LLM-Cleaned
    type: alpaca
adapter: qlora
lora_r: 32
lora_target_linear: true
sequence_len: 2048
sample_packing: true
micro_batch_size: 2
"""
LLAMA_FACTORY = """\
model_name_or_path: meta-llama/Meta-Llama-3-8B-Instruct
stage: dpo
do_train: true
finetuning_type: lora
lora_rank: 8
lora_target: all
pref_beta: 0.1
dataset: dpo_en_demo
template: llama3
cutoff_len: 2048
output_dir: saves/llama3-8b/lora/dpo
"""


def answer(file: Any) -> str:
    with pytest.raises(toolkit.RecipeError) as caught:
        toolkit.load_recipe(file)
    assert len(caught.value.problems) == 1
    return str(caught.value)


@pytest.mark.parametrize(
    ("text", "name", "places"),
    [
        (TRL, "a TRL configuration", {"dataset_name": "data of a stage", "lora_r": "lora.r"}),
        (AXOLOTL, "an axolotl configuration", {"base_model": "model.name_or_path", "sequence_len": "trainer.max_length"}),
        (LLAMA_FACTORY, "a LLaMA-Factory configuration", {"lora_target": "lora.target_modules", "pref_beta": "trainer.beta"}),
    ],
    ids=["trl", "axolotl", "llama-factory"],
)  # fmt: skip
def test_a_file_of_another_tool(write: Any, text: str, name: str, places: dict[str, str]) -> None:
    said = answer(write(text, "theirs.yaml"))
    assert f"theirs.yaml: this is {name}, not a recipe" in said
    for key, place in places.items():
        assert any(line.split()[0] == key and place in line for line in said.splitlines() if line.strip())


@pytest.mark.parametrize("text", [TRL, AXOLOTL, LLAMA_FACTORY], ids=["trl", "axolotl", "llama-factory"])
def test_the_example_is_a_recipe_for_their_model_and_data(write: Any, text: str) -> None:
    _, _, example = answer(write(text, "theirs.yaml")).partition("recipes/ holds examples:\n")
    recipe = toolkit.load_recipe(write(example, "ours.yaml"))
    theirs = yaml.safe_load(text)
    assert recipe.model.name_or_path in theirs.values()
    assert recipe.stages[0].data[0].path in text


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("compute_environment: LOCAL_MACHINE\ndistributed_type: MULTI_GPU\n", "give it to accelerate launch"),
        ("peft_type: LORA\nbase_model_name_or_path: some/model\nr: 8\n", "its fields go under lora"),
        ("architectures: [LlamaForCausalLM]\nmodel_type: llama\n", "name its folder in model.name_or_path"),
    ],
)
def test_other_files(write: Any, text: str, expected: str) -> None:
    assert expected in answer(write(text))


def test_a_recipe_with_a_key_of_theirs_is_a_recipe(write: Any) -> None:
    said = answer(write("base_model: x\nmodel: {name_or_path: x}\nstages: [{type: sft, data: a}]\n"))
    assert "recipe.yaml:1: base_model: unknown key" in said
