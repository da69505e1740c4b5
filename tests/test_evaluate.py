"""The closing table counts what plain transformers generates."""

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

import toolkit
from tests.conftest import WORDS, write_jsonl
from tests.tiny import make_base


@pytest.fixture
def with_evaluation(recipe: dict[str, Any], tmp_path: Path) -> dict[str, Any]:
    rows = [{"prompt": f"what is {word}", "answer": word[0]} for word in WORDS[:9]]
    recipe["stages"][1]["name"] = "dpo-0.1"
    recipe["evaluate"] = {
        "data": str(write_jsonl(tmp_path / "held.jsonl", rows)),
        "max_new_tokens": 8,
        "batch_size": 4,
        "scores": {"answer": {"column": "answer"}, "short": {"regex": "^.{0,12}$"}},
    }
    return recipe


def test_the_table_is_what_plain_transformers_says(
    with_evaluation: dict[str, Any], write: Any, base: Path, tmp_path: Path
) -> None:
    result = toolkit.train(write(with_evaluation), output=tmp_path / "run")
    assert result.evaluation is not None
    model = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), str(result.adapter)
    )
    tokenizer = AutoTokenizer.from_pretrained(base)
    answers = []
    for word in WORDS[:9]:
        ids = tokenizer(f"what is {word}", return_tensors="pt")
        out = model.generate(**ids, max_new_tokens=8, do_sample=False)
        answers.append(tokenizer.decode(out[0, ids.input_ids.shape[1] :], skip_special_tokens=True))
    assert [sample["answers"]["dpo-0.1"] for sample in result.evaluation["samples"]] == answers[:3]
    share = sum(word[0] in answer for word, answer in zip(WORDS[:9], answers, strict=True)) / 9
    assert result.evaluation["scores"]["answer"]["dpo-0.1"] == pytest.approx(share)
    assert list(result.evaluation["scores"]["short"]) == ["base", "sft", "dpo-0.1"]


def test_a_broken_regex_is_found_at_once(with_evaluation: dict[str, Any], write: Any) -> None:
    with_evaluation["evaluate"]["scores"]["short"]["regex"] = "(a"
    with pytest.raises(
        toolkit.RecipeError, match=r"evaluate.scores.short: '\(a' is not a regular expression: missing \)"
    ):
        toolkit.load_recipe(write(with_evaluation))


def test_messages_without_a_template_are_found_before_training(
    with_evaluation: dict[str, Any], write: Any, tmp_path: Path
) -> None:
    rows = [{"prompt": [{"role": "user", "content": "what"}], "answer": "x"}]
    with_evaluation["evaluate"]["data"] = str(write_jsonl(tmp_path / "held.jsonl", rows))
    with_evaluation["model"]["name_or_path"] = str(make_base(tmp_path / "bare", chat_template=None))
    texts = [{"text": word} for word in WORDS]
    with_evaluation["stages"] = [{"type": "sft", "data": str(write_jsonl(tmp_path / "texts.jsonl", texts))}]
    with pytest.raises(toolkit.ModelError, match="the prompts are messages and there is no chat template"):
        toolkit.train(write(with_evaluation), output=tmp_path / "run")
    assert not (tmp_path / "run" / "sft").exists()


def test_an_empty_cell_is_found_before_training(with_evaluation: dict[str, Any], write: Any, tmp_path: Path) -> None:
    rows = [{"prompt": "what", "answer": "x"}, {"prompt": "what", "answer": None}]
    with_evaluation["evaluate"]["data"] = str(write_jsonl(tmp_path / "held.jsonl", rows))
    with pytest.raises(toolkit.DataError, match=r"row 1: answer is empty; fill it in, or remove the row"):
        toolkit.train(write(with_evaluation), output=tmp_path / "run")


def test_a_missing_column_is_found_before_training(with_evaluation: dict[str, Any], write: Any, tmp_path: Path) -> None:
    with_evaluation["evaluate"]["scores"]["answer"]["column"] = "anser"
    with pytest.raises(
        toolkit.DataError, match=r"evaluate.data\[0\].path: no column anser; found columns prompt, answer"
    ):
        toolkit.train(write(with_evaluation), output=tmp_path / "run")
    assert not (tmp_path / "run" / "sft").exists()
