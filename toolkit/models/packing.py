"""SFT packing that keeps its rows: several documents to a row, each blind to the others.

TRL 1.16 lays the rows of a packed batch end to end in one, which suits attention over variable lengths. Under sdpa and
eager attention that row needs a mask that grows with the square of batch x length, and is slower than padding.

The language model head, which on CPU scores every position it is given, is given those that predict a supervised token.
"""

from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from datasets import Dataset
from torch.nn.functional import pad
from torch.nn.utils.rnn import pad_sequence
from trl import pack_dataset

from toolkit.models.prefix import backbone_of
from toolkit.recipe.plan import StagePlan

ROWS_KEPT_UNDER = ("sdpa", "eager")
SCORED = "scored_positions"


def keeps_rows(model: Any) -> bool:
    """Whether this model's attention is the kind for which packed rows stay rows."""
    return model.config._attn_implementation in ROWS_KEPT_UNDER


def pack(plan: StagePlan, rows: Dataset) -> Dataset:
    """Documents `input_ids`, `labels` put together by TRL into rows of up to `max_length`, with `seq_lengths`."""
    return pack_dataset(rows, plan.max_length, plan.trainer.get("packing_strategy", "bfd"))


@dataclass
class RowsOfDocuments:
    """Packed rows as a batch, for a model under `isolate_documents`.

    `wrapped` packing knows no documents: its rows are one each.
    """

    pad_token_id: int

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, Any]:
        """One batch.

        Returns:
            `input_ids`, `attention_mask`, `position_ids`: `(batch, seq)`; positions start again with each document.
            `labels`: `(1, 1 + supervised)`, all supervised tokens of the batch, after a column that is never predicted.
            `scored_positions`: `(1, 1 + supervised)`, where in the flattened batch each is predicted.
        """
        ids = [torch.tensor(row["input_ids"]) for row in rows]
        documents = [row.get("seq_lengths") or [len(row["input_ids"])] for row in rows]
        positions = [torch.tensor(list(chain.from_iterable(range(n) for n in lengths))) for lengths in documents]
        targets = [
            torch.tensor(row["labels"]).masked_fill(p == 0, -100) for row, p in zip(rows, positions, strict=True)
        ]
        labels = pad_sequence(targets, batch_first=True, padding_value=-100).flatten()
        supervised = (labels != -100).nonzero()[:, 0]
        return {
            "input_ids": pad_sequence(ids, batch_first=True, padding_value=self.pad_token_id),
            "attention_mask": pad_sequence([torch.ones_like(i) for i in ids], batch_first=True),
            "position_ids": pad_sequence(positions, batch_first=True),
            "labels": pad(labels[supervised], (1, 0), value=-100)[None],
            SCORED: pad(supervised - 1, (0, 1), value=0)[None],
        }


class IsolatedDocuments:
    """The hooks on a backbone, from `isolate_documents`.

    transformers builds the mask of packed rows from `position_ids` where it is given no `attention_mask`, and TRL
    counts its tokens by one, so it is in the batch and taken out on the way to the backbone. On the way out only the
    hidden states that predict a supervised token are left, `(1, 1 + supervised, hidden)`.
    """

    def __init__(self, backbone: torch.nn.Module):
        self._scored: torch.Tensor | None = None
        backbone.register_forward_pre_hook(self._enter, with_kwargs=True)
        backbone.register_forward_hook(self._leave, always_call=True)

    def _enter(self, backbone: Any, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]] | None:
        self._scored = kwargs.get(SCORED)
        if self._scored is None:
            return None
        inputs = {name: value for name, value in kwargs.items() if name != SCORED}
        return args, inputs | {"attention_mask": None}

    def _leave(self, backbone: Any, args: Any, output: Any) -> Any:
        scored, self._scored = self._scored, None
        if scored is not None and output is not None:
            output.last_hidden_state = output.last_hidden_state.flatten(0, 1)[scored]
        return output


def isolate_documents(model: Any) -> IsolatedDocuments:
    """Let a causal language model, or a `PeftModel` of one, run the batches of `RowsOfDocuments`.

    Any other call, `generate` included, passes through unchanged.
    """
    return IsolatedDocuments(backbone_of(model))
