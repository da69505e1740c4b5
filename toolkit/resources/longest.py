"""The batch of a stage that needs most memory: its longest rows, as the trainer's collator shapes them."""

from typing import Any

import torch
from datasets import Dataset
from transformers import PreTrainedModel

from toolkit.job import StageJob
from toolkit.models import packing
from toolkit.models.prefix import PairCollator
from toolkit.models.prefix_check import reason_against
from toolkit.rows.chat import IGNORED


def longest_rows(rows: Dataset, n: int) -> list[dict[str, Any]]:
    """The `n` rows with most tokens: the batch that needs most memory."""
    lengths = torch.zeros(0, dtype=torch.long)
    names = [name for name in ("input_ids", "prompt_ids", "chosen_ids", "rejected_ids") if name in rows.column_names]
    for part in rows.select_columns(names).with_format("arrow").iter(10_000):
        columns = [part.column(name).combine_chunks().value_lengths().to_numpy(zero_copy_only=False) for name in names]
        lengths = torch.cat([lengths, torch.from_numpy(sum(columns)).long()])
    order = torch.sort(lengths, descending=True, stable=True).indices[:n].tolist()
    return [rows[i] for i in order]


def columns(row: dict[str, Any]) -> int:
    """Tokens of a row; of a pair, of its longer sequence."""
    if "input_ids" in row:
        return len(row["input_ids"])
    return len(row["prompt_ids"]) + max(len(row["chosen_ids"]), len(row["rejected_ids"]))


def collated(job: StageJob, rows: list[dict[str, Any]], empty: PreTrainedModel) -> dict[str, torch.Tensor]:
    """The batch as the trainer's collator shapes it, with labels; masks only where there is padding."""
    pad, limit = job.tokenizer.pad_token_id, job.plan.max_length
    if job.plan.type == "sft":
        parts = [(row["input_ids"][:limit], row["labels"][:limit] if "labels" in row else None) for row in rows]
        sides = [(ids, labels or ids) for ids, labels in parts]
    elif job.plan.prefix_sharing and reason_against(empty) is None:
        batch = PairCollator(pad, limit)(rows)
        batch.pop("ref_chosen_logps", None), batch.pop("ref_rejected_logps", None)
        mask = batch.pop("completion_mask")
        return batch | {"labels": batch["input_ids"].masked_fill(mask == 0, IGNORED)}
    else:
        sides = []
        for side in ("chosen_ids", "rejected_ids"):
            for row in rows:
                ids = (row["prompt_ids"] + row[side])[:limit]
                sides.append((ids, ([IGNORED] * len(row["prompt_ids"]) + row[side])[:limit]))
    longest = max(len(ids) for ids, _ in sides)
    batch = {
        "input_ids": torch.tensor([ids + [pad] * (longest - len(ids)) for ids, _ in sides]),
        "labels": torch.tensor([labels + [IGNORED] * (longest - len(labels)) for _, labels in sides]),
    }
    if any(len(ids) < longest for ids, _ in sides) or job.plan.trainer.get("packing"):
        batch["attention_mask"] = torch.tensor([[1] * len(ids) + [0] * (longest - len(ids)) for ids, _ in sides])
    return batch


def training_rows(job: StageJob) -> Dataset:
    """The rows that batches are drawn from: packed rows, where the stage packs."""
    return packing.pack(job.plan, job.data.train) if job.plan.trainer.get("packing") else job.data.train


def batch_size(job: StageJob) -> int:
    """Rows of one forward pass."""
    return int(job.plan.trainer.get("per_device_train_batch_size", 8))
