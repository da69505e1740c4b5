"""`toolkit check` and `toolkit preview`, as a user meets them, on rows with known defects."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import pairs, write_jsonl
from toolkit.cli import main


@pytest.fixture
def checked(recipe: dict[str, Any], write: Any, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Any:
    """Check these pairs; findings by check id."""

    def _checked(rows: list[dict[str, Any]], **source: Any) -> dict[str, Any]:
        recipe["stages"] = [{"type": "dpo", "data": [{"path": str(write_jsonl(tmp_path / "p.jsonl", rows)), **source}]}]
        main(["check", str(write(recipe)), "--json"])
        return {f["check"]: f for f in json.loads(capsys.readouterr().out)["findings"]}

    return _checked


def test_defects_are_named_with_their_rows(checked: Any) -> None:
    rows = pairs(12)
    rows[3]["rejected"] = rows[3]["chosen"]
    rows[5] = rows[4] | {"chosen": rows[4]["rejected"], "rejected": rows[4]["chosen"]}
    rows[7] = rows[6]
    rows[9]["chosen"] = [{"role": "assistant", "content": " "}]
    rows[10]["chosen"] = [{"role": "assistant", "content": "it is<|im_end|>"}]
    found = checked(rows)
    expected = {"identical-pair": [3], "contradiction": [5], "duplicate-rows": [7], "empty-answer": [9]}
    expected |= {"special-tokens": [10]}
    assert {name: found[name]["rows"] for name in expected} == expected


def test_rows_keep_the_numbers_of_their_source(checked: Any) -> None:
    rows = [row | {"rejected": row["chosen"]} for row in pairs(40)]
    for row in rows[::2]:
        row["rejected"] = [{"role": "assistant", "content": "no"}]
    named = checked(rows, limit=10)["identical-pair"]["rows"]
    assert named and all(number % 2 for number in named) and max(named) > 10


@pytest.fixture
def said(recipe: dict[str, Any], write: Any, capsys: pytest.CaptureFixture[str]) -> Any:
    """Exit code and output of `toolkit check` on the recipe of two stages."""

    def _said(*flags: str) -> tuple[int, str]:
        code = main(["check", str(write(recipe)), *flags])
        return code, capsys.readouterr().out

    return _said


def test_warnings_stop_nothing_unless_strict(said: Any) -> None:
    code, out = said()
    assert code == 0
    assert [line for line in out.splitlines() if not line.startswith(" ")] == [
        *("recipe", "access", "tokenizer", "sft", "dpo", "resources"),
        "",
        "0 errors, 2 warnings, 9 notes",
    ]
    assert "  note     Hub: not asked: offline [access]" in out.splitlines()
    assert out.count("3 optimizer steps are hardly any training") == 2
    code, out = said("--strict")
    assert code == 2 and out.endswith("0 errors, 2 warnings, 9 notes (--strict: warnings are errors)\n")


def test_what_cannot_be_evaluated_is_told(recipe: dict[str, Any], said: Any, tmp_path: Path) -> None:
    held_out = write_jsonl(tmp_path / "held_out.jsonl", [{"prompt": "what is red", "answer": "it is"}])
    recipe["evaluate"] = {"data": str(held_out), "scores": {"right": {"column": "answer"}}}
    assert "[evaluate]" not in said()[1]
    recipe["evaluate"]["scores"] = {"right": {"column": "answre"}}
    code, out = said()
    assert code == 2
    assert out.count("answre") == out.count("[evaluate]") == 1, out


def test_resources_are_those_of_the_launch(said: Any) -> None:
    code, out = said("--json", "--launch", "ddp", "--num-processes", "2")
    told = json.loads(out)
    by_check = {(f["check"], f["where"]): f["text"] for f in told["findings"]}
    assert code == 0 and told["counts"]["error"] == 0
    assert by_check["launch", "accelerate_configs/ddp.yaml"] == "2 processes on GPUs"
    assert (
        "2 optimizer steps" in by_check["estimate", "sft"] and "context       536.9 MB" in by_check["estimate", "dpo"]
    )
    assert told["stages"]["sft"]["steps"] == 2
    code, out = said("--json")
    assert json.loads(out)["stages"]["sft"] == {
        "type": "sft", "rows": 12, "tokens": 421, "supervised": 107, "steps": 3, "truncated": 0, "dropped": {}
    }  # fmt: skip
    (estimate,) = (f["text"] for f in json.loads(out)["findings"] if (f["check"], f["where"]) == ("estimate", "sft"))
    assert "context" not in estimate and "longest batch 4 x " in estimate


def test_a_launch_that_there_is_not_is_refused(said: Any, capsys: pytest.CaptureFixture[str]) -> None:
    assert said("--launch", "dpp")[0] == 2
    assert said("--num-processes", "2")[0] == 2


def test_a_wrong_recipe_is_told_in_findings(recipe: dict[str, Any], said: Any) -> None:
    recipe["stages"][0]["trainer"]["learning_rat"] = 1
    recipe["sed"] = 3
    code, out = said("--json")
    told = json.loads(out)
    assert code == 2 and told["counts"] == {"error": 2, "warning": 0, "note": 0}
    assert {f["where"].partition(": ")[2] for f in told["findings"]} == {"sed", "stages[0].trainer.learning_rat"}


def test_no_tokenizer_no_end_token_and_a_damaged_one_are_findings(
    recipe: dict[str, Any], said: Any, base: Path, tmp_path: Path
) -> None:
    import shutil

    own = shutil.copytree(base, tmp_path / "own")
    recipe["model"]["name_or_path"] = str(own)
    settings = json.loads((own / "tokenizer_config.json").read_text())
    (own / "tokenizer_config.json").write_text(json.dumps(settings | {"eos_token": None}))
    code, out = said()
    assert code == 2 and "model.name_or_path: the tokenizer has no end token, so that no answer could ever end" in out
    (own / "tokenizer.json").write_text("{}")
    code, out = said()
    assert code == 2 and "model.name_or_path: no tokenizer in " in out


def test_texts_of_others_reach_the_terminal_as_text(recipe: dict[str, Any], said: Any, tmp_path: Path) -> None:
    raises = tmp_path / "t.jinja"
    raises.write_text("{{ raise_exception('\\u001b[2J[bold red]gone') }}")
    recipe["model"]["chat_template"] = str(raises)
    code, out = said()
    assert code == 2 and "\x1b" not in out and "\\x1b[2J[bold red]gone" in out


def test_training_says_its_warnings_and_stops_on_errors_before_it_begins(
    recipe: dict[str, Any], write: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    same = [row | {"rejected": row["chosen"]} for row in pairs(8)]
    recipe["stages"] = [recipe["stages"][1] | {"data": str(write_jsonl(tmp_path / "same.jsonl", same))}]
    assert main(["train", str(write(recipe)), "--output", str(tmp_path / "run")]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert "warning: " in err and "2 optimizer steps are hardly any training" in err and "parameters" not in err
    assert "chosen and rejected are the same in 8 of 8 pairs" in err
    assert not (tmp_path / "run" / "dpo").exists()


def test_two_processes_stop_once(recipe: dict[str, Any], write: Any, tmp_path: Path) -> None:
    same = [row | {"rejected": row["chosen"]} for row in pairs(8)]
    recipe["stages"] = [recipe["stages"][1] | {"data": str(write_jsonl(tmp_path / "same.jsonl", same))}]
    command = [sys.executable, "-m", "toolkit", "train", str(write(recipe)), "--output", str(tmp_path / "run")]
    done = subprocess.run(
        [*command, "--launch", "cpu_2proc", "--main-process-port", "0"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert done.stderr.count("chosen and rejected are the same in 8 of 8 pairs") == 1
    assert done.stderr.count("hardly any training") == 1 and "Traceback" not in done.stderr.split("error: ")[0]
    assert not (tmp_path / "run" / "dpo").exists()
