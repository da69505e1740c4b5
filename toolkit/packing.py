"""SFT packing that keeps its rows: several documents to a row, each blind to the others.

TRL 1.16 lays the rows of a packed batch end to end in one, which suits attention over variable lengths. Under sdpa and
eager attention that row needs a mask that grows with the square of batch x length, and is slower than padding.
"""

from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from datasets import Dataset
from torch.nn.utils.rnn import pad_sequence
from trl import pack_dataset

from toolkit.plan import StagePlan

ROWS_KEPT_UNDER = ("sdpa", "eager")
PACKED = "packed"


def keeps_rows(model: Any) -> bool:
    """Whether this model's attention is the kind for which packed rows stay rows."""
    return model.config._attn_implementation in ROWS_KEPT_UNDER


def pack(plan: StagePlan, rows: Dataset) -> Dataset:
    """Documents `input_ids`, `labels` put together by TRL into rows of up to `max_length`, with `seq_lengths`."""
    return pack_dataset(rows, plan.max_length, plan.trainer.get("packing_strategy", "bfd"))


@dataclass
class RowsOfDocuments:
    """Packed rows as a batch: `input_ids`, `labels`, `attention_mask`, `position_ids`, each `(batch, seq)`.

    Positions start again with each document. `wrapped` packing knows no documents: its rows are one each.
    """

    pad_token_id: int

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, Any]:
        ids = [torch.tensor(row["input_ids"]) for row in rows]
        documents = [row.get("seq_lengths") or [len(row["input_ids"])] for row in rows]
        positions = [torch.tensor(list(chain.from_iterable(range(n) for n in lengths))) for lengths in documents]
        labels = [torch.tensor(row["labels"]).masked_fill(p == 0, -100) for row, p in zip(rows, positions, strict=True)]
        padded = {
            "input_ids": pad_sequence(ids, batch_first=True, padding_value=self.pad_token_id),
            "labels": pad_sequence(labels, batch_first=True, padding_value=-100),
            "attention_mask": pad_sequence([torch.ones_like(i) for i in ids], batch_first=True),
            "position_ids": pad_sequence(positions, batch_first=True),
        }
        return padded | {PACKED: True}


def isolate_documents(model: Any) -> Any:
    """Let positions alone say which tokens see each other, in batches of `RowsOfDocuments`; returns the hook's handle.

    transformers builds the mask of packed rows from `position_ids` where it is given no `attention_mask`, and TRL
    counts its tokens by one, so it is in the batch and taken out on the way to the backbone.
    """

    def without_mask(module: Any, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]] | None:
        if not kwargs.pop(PACKED, False):
            return None
        return args, kwargs | {"attention_mask": None}

    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    return base.base_model.register_forward_pre_hook(without_mask, with_kwargs=True)
