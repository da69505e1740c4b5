"""Packed documents are trained as if each had a row of its own."""

from pathlib import Path
from typing import Any

import pytest
import torch

import toolkit
from tests.conftest import WORDS, write_jsonl
from tests.tiny import make_base
from toolkit.models.model import load_base
from toolkit.models.packing import RowsOfDocuments
from toolkit.records.rundir import RunDirectory
from toolkit.training.prepare import prepare
from toolkit.training.progress import read_metrics
from toolkit.training.sft import build

ROWS = [
    {"prompt": " ".join(WORDS[: 3 + i % 11]), "completion": " " + " ".join(WORDS[i % 7 : 9 + i % 5])} for i in range(16)
]
FAMILIES = {
    "llama": {},
    "mistral": {"sliding_window": 8},
    "qwen2": {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1},
    "gemma2": {"sliding_window": 8, "head_dim": 8},
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 512}
    | dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0),
}
RUNS = [
    (family, attention)
    for family in FAMILIES
    for attention in ("sdpa", "eager")
    if (family, attention) != ("gemma2", "sdpa")
]


def loss_and_gradients(built: Any, rows: list[dict[str, Any]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Summed loss over all batches of four rows, and its LoRA gradients in one vector."""
    built.model.train()
    built.model.zero_grad()
    total = torch.zeros(())
    for first in range(0, len(rows), 4):
        batch = built.data_collator(rows[first : first + 4])
        loss = built.compute_loss(built.model, batch, num_items_in_batch=torch.tensor(1))
        loss.backward()
        total += loss.detach()
    gradients = [p.grad.flatten() for p in built.model.parameters() if p.requires_grad]
    return total, torch.cat(gradients)


@pytest.mark.parametrize(("family", "attention"), RUNS)
def test_packed_and_padded_rows_have_the_same_loss_and_gradients(
    tmp_path: Path, write: Any, family: str, attention: str
) -> None:
    base = make_base(tmp_path / "base", family, **FAMILIES[family])
    trainer = {"packing": True, "max_length": 60, "gradient_checkpointing": False}
    stage = {"type": "sft", "data": str(write_jsonl(tmp_path / "rows.jsonl", ROWS)), "trainer": trainer}
    model = {"name_or_path": str(base), "dtype": "float32", "attn_implementation": attention}
    file = write({"model": model, "lora": {"r": 4}, "stages": [stage]})
    results = []
    for packing in ("true", "false"):
        recipe = toolkit.load_recipe(file, [f"stages.sft.trainer.packing={packing}"])
        (job,) = prepare(recipe, RunDirectory(tmp_path / "run")).jobs
        built = build(job, load_base(recipe, job.hardware))
        for name, parameter in built.model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.1, generator=torch.Generator().manual_seed(len(name)))
        results.append((*loss_and_gradients(built, list(built.train_dataset)), len(built.train_dataset)))
    (packed_loss, packed_gradients, packed_rows), (loss, gradients, rows) = results
    assert packed_rows < rows == 16
    torch.testing.assert_close(packed_loss, loss, rtol=1e-5, atol=0)
    assert (packed_gradients - gradients).norm() < 1e-5 * gradients.norm()


def test_a_model_whose_documents_would_see_each_other_is_refused(tmp_path: Path, write: Any) -> None:
    base = make_base(tmp_path / "base", "mamba", state_size=4, expand=1, time_step_rank=2, conv_kernel=2)
    stage = {"type": "sft", "data": str(write_jsonl(tmp_path / "rows.jsonl", ROWS)), "trainer": {"packing": True}}
    recipe = {"model": {"name_or_path": str(base)}, "lora": {"target_modules": ["x_proj"]}, "stages": [stage]}
    with pytest.raises(toolkit.ModelError, match="packed documents would see each other: mamba"):
        toolkit.train(write(recipe), output=tmp_path / "run")


def test_the_logs_count_every_token_once(recipe: dict[str, Any], write: Any, tmp_path: Path) -> None:
    recipe["stages"][0]["trainer"] |= {"packing": True, "max_length": 80}
    result = toolkit.train(write(recipe), output=tmp_path / "run", stage="sft")
    last = [line for line in read_metrics(result.output / "sft" / "metrics.jsonl") if "num_tokens" in line][-1]
    (job, _) = prepare(toolkit.load_recipe(write(recipe)), RunDirectory(tmp_path / "run")).jobs
    assert last["num_tokens"] == job.data.counts.tokens


def test_a_batch_of_packed_rows() -> None:
    rows = [
        {"input_ids": [5, 6, 7, 8, 9], "labels": [5, 6, 7, 8, 9], "seq_lengths": [2, 3]},
        {"input_ids": [4, 3], "labels": [-100, 3], "seq_lengths": [2]},
    ]
    batch = RowsOfDocuments(pad_token_id=0)(rows)
    assert batch["position_ids"].tolist() == [[0, 1, 0, 1, 2], [0, 1, 0, 0, 0]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 1, 1], [1, 1, 0, 0, 0]]
    assert batch["labels"].tolist() == [[-100, 6, 8, 9, 3]]
    assert batch["scored_positions"].tolist() == [[0, 2, 3, 5, 0]]
