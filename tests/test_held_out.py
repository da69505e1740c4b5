"""Held-out metrics of DPO: means over pairs."""

from pathlib import Path
from typing import Any

import pytest
import torch

import toolkit
from tests.conftest import pairs, write_jsonl
from toolkit.training.progress import read_metrics

MEANS = [f"eval_{name}" for name in ("loss", "rewards/chosen", "rewards/margins", "rewards/accuracies", "logps/chosen")]


@pytest.fixture
def means(recipe: dict[str, Any], write: Any, tmp_path: Path) -> Any:
    """The means at every step of DPO but the first, at a learning rate of zero: `(step, mean)`, over seven held-out pairs in batches of this size."""
    recipe["stages"] = recipe["stages"][1:]
    recipe["stages"][0] |= {
        "eval_data": str(write_jsonl(tmp_path / "held.jsonl", pairs(7))),
        "guard": {"action": "off"},
    }

    def _means(batch_size: int, *overrides: str) -> torch.Tensor:
        overrides += (f"stages.dpo.trainer.per_device_eval_batch_size={batch_size}",)
        output = tmp_path / f"of_{batch_size}"
        toolkit.train(write(recipe), output=output, overrides=overrides)
        lines = [line for line in read_metrics(output / "dpo" / "metrics.jsonl") if "eval_loss" in line]
        return torch.tensor([[line[name] for name in MEANS] for line in lines[1:]])

    return _means


@pytest.mark.parametrize("reference", ["cached", "online"])
def test_the_batch_size_does_not_change_them(means: Any, reference: str) -> None:
    one_by_one = means(1, f"stages.dpo.reference={reference}")
    torch.testing.assert_close(means(4, f"stages.dpo.reference={reference}"), one_by_one, rtol=1e-5, atol=1e-5)
    assert one_by_one[-1, MEANS.index("eval_rewards/margins")] > 0.1


def test_rows_that_are_dropped_count_for_nothing(means: Any) -> None:
    drop = "stages.dpo.trainer.dataloader_drop_last=true"
    torch.testing.assert_close(means(3, drop), means(2, drop), rtol=1e-5, atol=1e-5)
