"""Prefix sharing in a run: on where it is exact, off with a reason where it is not, and never felt in the result."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch

import toolkit
from tests.tiny import make_base
from toolkit.training.progress import read_metrics

NAMES = ("loss", "grad_norm", "rewards/margins", "logps/chosen", "logps/rejected", "entropy", "num_tokens")


@pytest.fixture
def train(recipe: dict[str, Any], write: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Any:
    """Train SFT and DPO; return DPO's metrics, what was decided, and the printed plan."""

    def _train(output: str, *overrides: str) -> tuple[torch.Tensor, str, str]:
        result = toolkit.train(write(recipe), output=tmp_path / output, overrides=overrides)
        lines = [line for line in read_metrics(result.output / "dpo" / "metrics.jsonl") if "loss" in line]
        numbers = torch.tensor([[line[name] for name in NAMES] for line in lines])
        return numbers, result.stages["dpo"]["prefix_sharing"], capsys.readouterr().out

    return _train


def test_it_is_on_and_changes_no_number(train: Any) -> None:
    shared, decided, said = train("on")
    plain, refused, _ = train("off", "stages.dpo.prefix_sharing=false", "stages.dpo.reference=online")
    assert re.fullmatch(r"on: hidden states differ by [\d.e-]+, at most the 1.0e-05 allowed", decided)
    assert (
        "  speed      prompts run once for each pair (checked on the model); reference log-probs computed once" in said
    )
    assert refused == "off, as the recipe asks"
    torch.testing.assert_close(shared, plain, rtol=1e-5, atol=1e-5)


def test_it_is_off_where_dropout_is_on(train: Any) -> None:
    _, decided, _ = train("run", "lora.lora_dropout=0.5", "stages.dpo.trainer.disable_dropout=false")
    assert decided == "off: dropout is on, and would be drawn once for both answers"


def test_the_plan_says_why_it_is_off(train: Any, recipe: dict[str, Any], tmp_path: Path) -> None:
    base = make_base(tmp_path / "bloom", "bloom", n_layer=2, n_head=4)
    recipe["model"]["name_or_path"] = str(base)
    _, decided, said = train("run")
    assert decided.startswith("off: bloom takes no position_ids")
    assert "  speed      prompts run twice: bloom takes no position_ids; " in said
