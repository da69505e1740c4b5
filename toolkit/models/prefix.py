"""DPO prefix sharing (arXiv 2410.20305): both completions of a pair share the prompt, so the backbone runs it once.

TRL's loss code runs untouched. `PairCollator` hands it completions only, with one packed row per pair beside them;
hooks on the backbone swap the packed rows in before its forward, and the hidden states of the completions out after it.
Without the hooks a model fails on such a batch: its `position_ids` are those of the packed rows.
"""

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftModel
from torch.nn.utils.rnn import pad_sequence
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

IDS, LENGTHS = "pair_ids", "pair_lengths"


@dataclass(frozen=True)
class PairCollator:
    """Batches for TRL's `DPOTrainer` that hold each prompt once, for a model under `share_prefix`.

    A row holds `prompt_ids`, `chosen_ids`, `rejected_ids`, and optionally `ref_chosen_logps`, `ref_rejected_logps`.
    As by TRL's collator, a prompt and its completion are cut to their first `max_length` tokens.
    """

    pad_token_id: int
    max_length: int | None = None

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        """One batch. Of the first three tensors all chosen rows come first, then all rejected rows.

        Returns:
            `input_ids`, `completion_mask`: `(2 * batch, 1 + completion)`. The first column is the last prompt token or,
            where the prompt is empty, the first token of the completion, which TRL never predicts either.
            `attention_mask`: `(2 * batch, seq)`, of the whole rows: TRL counts tokens by it.
            `pair_ids`, `position_ids`: `(batch, prompt + chosen + rejected)`; positions restart after the prompt.
            `pair_lengths`: `(batch, 3)`, tokens in each part.
            `ref_chosen_logps`, `ref_rejected_logps`: `(batch,)`, in nats, where the rows have them.
        """
        cut = [self._cut(row) for row in rows]
        sides = [(prompt, chosen) for prompt, chosen, _ in cut] + [(prompt, rejected) for prompt, _, rejected in cut]
        batch = {
            "input_ids": _padded([prompt[-1:] + side for prompt, side in sides], self.pad_token_id),
            "attention_mask": _padded([[1] * len(prompt + side) for prompt, side in sides], 0),
            "completion_mask": _padded([[0] * len(prompt[-1:]) + [1] * len(side) for prompt, side in sides], 0),
            IDS: _padded([prompt + chosen + rejected for prompt, chosen, rejected in cut], self.pad_token_id),
            LENGTHS: torch.tensor([[len(part) for part in parts] for parts in cut]),
            # padding is at 0: beyond the longest row it would leave a table of learned positions, or change the
            # frequencies of rotary embeddings that follow the largest position
            "position_ids": _padded([_positions(*map(len, parts)) for parts in cut], 0),
        }
        for name in ("ref_chosen_logps", "ref_rejected_logps"):
            if name in rows[0]:
                batch[name] = torch.tensor([row[name] for row in rows])
        return batch

    def _cut(self, row: dict[str, Any]) -> tuple[list[int], list[int], list[int]]:
        prompt = row["prompt_ids"][: self.max_length]
        room = None if self.max_length is None else self.max_length - len(prompt)
        return prompt, row["chosen_ids"][:room], row["rejected_ids"][:room]


class PrefixSharing:
    """The hooks on a backbone, from `share_prefix`; `remove` takes them off, as does the end of a `with` block."""

    def __init__(self, backbone: torch.nn.Module):
        self._packed: Packed | None = None
        self._hooks = (
            backbone.register_forward_pre_hook(self._pack, with_kwargs=True),
            backbone.register_forward_hook(self._unpack, always_call=True),
        )

    def remove(self) -> None:
        for hook in self._hooks:
            hook.remove()

    def __enter__(self) -> "PrefixSharing":
        return self

    def __exit__(self, *error: object) -> None:
        self.remove()

    def _pack(self, backbone: Any, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]] | None:
        self._packed = None
        if IDS not in kwargs:
            return None
        packed = Packed(kwargs)
        inputs = {name: value for name, value in kwargs.items() if name not in (IDS, LENGTHS)}
        inputs |= {"input_ids": kwargs[IDS], "attention_mask": _attention_masks(backbone, packed)}
        self._packed = packed
        return args, inputs

    def _unpack(self, backbone: Any, args: Any, output: Any) -> Any:
        packed, self._packed = self._packed, None
        if packed is None or output is None:  # a plain call, or the forward raised
            return output
        output.last_hidden_state = packed.completions(output.last_hidden_state)
        if getattr(output, "router_logits", None):
            by_column = (logits.unflatten(0, (-1, packed.columns)) for logits in output.router_logits)
            output.router_logits = tuple(packed.whole_rows(logits).flatten(0, 1) for logits in by_column)
        return output


def share_prefix(model: Any) -> PrefixSharing:
    """Let `model`, a causal language model or a `PeftModel` of one, run the batches of `PairCollator`.

    Any other call, `generate` included, passes through unchanged. Dropout, which TRL turns off, would be drawn once for
    both rows of a pair. Whether this model can share prefixes is not asked here: see `reason_against`, `self_check`.
    """
    return PrefixSharing(backbone_of(model))


class Packed:
    """Rows of prompt + chosen + rejected + padding, and the shapes that TRL expects back."""

    def __init__(self, batch: dict[str, torch.Tensor]):
        self.lengths, self.positions = batch[LENGTHS], batch["position_ids"]  # (batch, 3), (batch, columns)
        self.columns = self.positions.shape[1]
        self.completion_columns, self.row_columns = batch["input_ids"].shape[1], batch["attention_mask"].shape[1]

    def parts(self) -> torch.Tensor:
        """`(batch, columns)`: 0 in the prompt, 1 in chosen, 2 in rejected, 3 in padding."""
        column = torch.arange(self.columns, device=self.lengths.device)
        return (column[None, :, None] >= self.lengths.cumsum(1)[:, None]).sum(2)

    def places(self) -> torch.Tensor:
        """Where in the whole rows the columns stand that TRL is given, `(2 * batch, 1 + completion)`."""
        first = (self.lengths[:, 0] - 1).clamp(min=0).repeat(2)
        return first[:, None] + torch.arange(self.completion_columns, device=first.device)

    def completions(self, packed: torch.Tensor) -> torch.Tensor:
        """`(batch, columns, ...)` as `(2 * batch, 1 + completion, ...)`."""
        return self._take(packed, self.places())

    def whole_rows(self, packed: torch.Tensor) -> torch.Tensor:
        """`(batch, columns, ...)` as `(2 * batch, seq, ...)`."""
        return self._take(packed, torch.arange(self.row_columns, device=packed.device).expand(2 * len(packed), -1))

    def _take(self, packed: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
        prompt, chosen = self.lengths[:, 0].repeat(2), self.lengths[:, 1]
        skipped = torch.cat([torch.zeros_like(chosen), chosen])
        columns = places + skipped[:, None] * (places >= prompt[:, None])
        pairs = torch.arange(len(chosen), device=places.device).repeat(2)
        return packed[pairs[:, None], columns.clamp(max=self.columns - 1)]


def _attention_masks(backbone: Any, packed: Packed) -> Any:
    """What the backbone takes as its mask: one by layer type where it tests for a dict, else a single one."""
    build = ALL_MASK_ATTENTION_FUNCTIONS[backbone.config._attn_implementation]
    masks = {
        kind: build(
            batch_size=len(packed.lengths),
            q_length=packed.columns,
            kv_length=packed.columns,
            mask_function=_visible(packed, kind, window),
            allow_is_causal_skip=False,
            use_vmap=False,
            dtype=backbone.get_input_embeddings().weight.dtype,
            device=packed.lengths.device,
        )
        for kind, window in windows_of(backbone).items()
    }
    return masks if _takes_masks_by_type(backbone) else masks.popitem()[1]


def _visible(packed: Packed, kind: str, window: int | None) -> Callable[..., torch.Tensor]:
    """A mask function: causal, no completion sees the other, and windows and chunks go by position, not by column.

    Padding sees the prompt and other padding, since a row of attention that sees nothing is NaN.
    """
    position, part = packed.positions, packed.parts()

    def visible(row: Any, head: Any, query: Any, key: Any) -> torch.Tensor:
        seen = (key <= query) & ((part[row, key] == 0) | (part[row, key] == part[row, query]))
        if window and kind == "sliding_attention":
            seen = seen & (position[row, key] > position[row, query] - window)
        if window and kind == "chunked_attention":
            seen = seen & (position[row, key] // window == position[row, query] // window)
        return seen

    return visible


def windows_of(backbone: Any) -> dict[str, int | None]:
    """The kinds of attention in the model, each with its window or chunk in tokens."""
    config = backbone.config
    if _takes_masks_by_type(backbone):
        kinds = sorted(set(config.layer_types))
    else:
        slides = "create_sliding_window_causal_mask" in _forward_names(backbone)
        kinds = ["sliding_attention" if slides else "full_attention"]
    sizes = {"sliding_attention": "sliding_window", "chunked_attention": "attention_chunk_size"}
    return {kind: getattr(config, sizes.get(kind, ""), None) for kind in kinds}


def _takes_masks_by_type(backbone: Any) -> bool:
    return "dict" in _forward_names(backbone) and bool(getattr(backbone.config, "layer_types", None))


def _forward_names(backbone: Any) -> tuple[str, ...]:
    """Names that the backbone's forward refers to; transformers declares in no other way what masks it takes."""
    return inspect.unwrap(type(backbone).forward).__code__.co_names


def causal_of(model: Any) -> Any:
    return model.get_base_model() if isinstance(model, PeftModel) else model


def backbone_of(model: Any) -> Any:
    return causal_of(model).base_model


def _positions(prompt: int, chosen: int, rejected: int) -> list[int]:
    return [*range(prompt + chosen), *range(prompt, prompt + rejected)]


def _padded(rows: list[list[int]], value: int) -> torch.Tensor:
    return pad_sequence([torch.tensor(row, dtype=torch.long) for row in rows], batch_first=True, padding_value=value)
