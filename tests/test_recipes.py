"""Every file under recipes/ loads, and runs two steps of every stage on a tiny model of its architecture."""

from pathlib import Path

import pytest
from transformers import AutoTokenizer

import toolkit
from tests.conftest import messages, pairs, write_jsonl
from tests.tiny import CHATML, make_base

RECIPES = sorted((Path(__file__).parent.parent / "recipes").rglob("*.yaml"))
ARCHITECTURE = {"Qwen2.5": "qwen2", "SmolLM2": "llama", "Llama": "llama", "Mistral": "mistral", "base": "llama"}
SIZES = {"hidden_size": 64, "intermediate_size": 128, "vocab_size": 324}  # nf4 works on blocks of 64 values
TEMPLATES_TOKENS = ["<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]


def test_the_recipes_are_found() -> None:
    assert len(RECIPES) >= 7


@pytest.mark.parametrize("file", RECIPES, ids=[f"{f.parent.name}/{f.stem}" for f in RECIPES])
def test_a_recipe_has_a_header_and_runs_two_steps_of_every_stage(file: Path, tmp_path: Path) -> None:
    header = [line for line in file.read_text(encoding="utf-8").splitlines() if line.startswith("#")]
    assert all(any(word in line for line in header) for word in ("Purpose", "Hardware", "Launch"))
    recipe = toolkit.load_recipe(file)
    name = Path(recipe.model.name_or_path).name
    architecture = next(kind for start, kind in ARCHITECTURE.items() if name.startswith(start))
    has_template = recipe.model.chat_template is None
    base = make_base(tmp_path / name, architecture, chat_template=CHATML if has_template else None, **SIZES)
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.add_special_tokens({"additional_special_tokens": TEMPLATES_TOKENS}, replace_extra_special_tokens=False)
    tokenizer.save_pretrained(base)
    overrides = [f"model.name_or_path={base}", "model.revision=null", "evaluate=null"]
    for stage in recipe.stages:
        whole = [{side: row["prompt"] + row[side] for side in ("chosen", "rejected")} for row in pairs(8)]
        if "HuggingFaceH4/ultrafeedback" in stage.data[0].path:  # conversations, and the prompt once more as text
            whole = [{"prompt": row["chosen"][0]["content"], **row} for row in whole]
        rows = messages(8) if stage.type == "sft" else whole
        data = write_jsonl(tmp_path / f"{stage.name}.jsonl", rows)
        overrides.append(f"stages.{stage.name}.data={data}")
        overrides.append(f"stages.{stage.name}.trainer.max_steps=2")
        overrides.append(f"stages.{stage.name}.trainer.per_device_train_batch_size=2")
        overrides.append(f"stages.{stage.name}.trainer.gradient_accumulation_steps=1")
        overrides.append(f"stages.{stage.name}.trainer.warmup_steps=0")
        if stage.eval_data:
            overrides.append(f"stages.{stage.name}.eval_data={data}")
    result = toolkit.train(toolkit.load_recipe(file, overrides), output=tmp_path / "run")
    assert [record["metrics"]["epoch"] > 0 for record in result.stages.values()] == [True] * len(recipe.stages)
    assert result.adapter is not None
