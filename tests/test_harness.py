"""Tasks of the lm-evaluation-harness, of one's own and without a network, on the base and on every stage."""

import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import yaml

import toolkit
from tests.conftest import WORDS, write_jsonl
from toolkit.pages import report

pytestmark = pytest.mark.skipif(find_spec("lm_eval") is None, reason="lm_eval is not installed")


@pytest.fixture
def asked(recipe: dict[str, Any], tmp_path: Path) -> dict[str, Any]:
    """SFT alone, then one task whose first choice is what SFT was trained to say."""
    trained = [{"prompt": f"what is {word}", "completion": " the sun"} for word in WORDS[:8]]
    recipe["stages"] = [recipe["stages"][0] | {"data": str(write_jsonl(tmp_path / "sft.jsonl", trained))}]
    recipe["stages"][0]["trainer"] |= {"num_train_epochs": 8}
    rows = [{"question": f"what is {word}"} for word in WORDS[:8]]
    task = {"task": "suns", "dataset_path": "json", "test_split": "test", "output_type": "multiple_choice"}
    task |= {"dataset_kwargs": {"data_files": {"test": str(write_jsonl(tmp_path / "rows.jsonl", rows))}}}
    task |= {"doc_to_text": "{{question}}", "doc_to_choice": ["the sun", "green night"], "doc_to_target": 0}
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "suns.yaml").write_text(yaml.safe_dump(task | {"metric_list": [{"metric": "acc"}]}))
    held = write_jsonl(tmp_path / "held.jsonl", [{"prompt": "what is red"}])
    recipe["evaluate"] = {"data": str(held), "max_new_tokens": 4, "lm_eval": ["suns"], "include_path": "./tasks"}
    return recipe


def test_base_and_stages_are_measured_on_own_tasks(asked: dict[str, Any], write: Any, tmp_path: Path) -> None:
    found = toolkit.train(write(asked), output=tmp_path / "run").evaluation
    assert found is not None
    base, sft = (found["models"][name]["lm_eval"] for name in ("base", "sft"))
    assert base.keys() == sft.keys() == {"suns"}
    assert sft["suns"] == {"acc,none": 1.0, "acc_stderr,none": 0.0}
    assert json.loads((tmp_path / "run" / "sft" / "evaluation.json").read_text())["summary"]["lm_eval"] == sft
    assert ("suns.acc,none", ["1", "1"]) in report.measures(found)[1] or base["suns"]["acc,none"] < 1


def test_what_is_not_there_is_said_before_training(asked: dict[str, Any], write: Any, tmp_path: Path) -> None:
    asked["evaluate"]["lm_eval"] = ["sunz"]
    with pytest.raises(toolkit.ModelError, match=r"evaluate.lm_eval\[0\]: no task is named 'sunz'; did you mean 'suns"):
        toolkit.train(write(asked), output=tmp_path / "run")
    asked["evaluate"]["include_path"] = "./taks"
    with pytest.raises(toolkit.ModelError, match=r"evaluate.include_path: no such folder: .*taks"):
        toolkit.train(write(asked), output=tmp_path / "run")
    assert not (tmp_path / "run" / "sft").exists()
