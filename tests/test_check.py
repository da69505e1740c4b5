"""`toolkit check` and `toolkit preview`, as a user meets them, on rows with known defects."""

import json
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
