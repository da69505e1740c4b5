"""DPO prefix sharing (arXiv 2410.20305): both completions of a pair share the prompt, so the backbone runs it once.

TRL's loss code runs untouched. `PairCollator` hands it completions only, with one packed row per pair beside them;
hooks on the backbone swap the packed rows in before its forward, and the hidden states of the completions out after it.
Without the hooks a model fails on such a batch: its `position_ids` are those of the packed rows.
"""

import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftModel
from torch.nn.functional import pad
from torch.nn.utils.rnn import pad_sequence
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

from toolkit.chat import first_line

IDS, LENGTHS = "pair_ids", "pair_lengths"
ATTENTION = ("sdpa", "eager", "flex_attention")
LAYER_TYPES = ("full_attention", "sliding_attention", "chunked_attention")

# The self-check allows a few times what padding alone changes on the plain path. At least this, by the coarsest type of
# the weights, since keys in another order round differently even where padding happens to change nothing; and at most
# that, since the plain path of a model that chooses its keys by itself can differ from itself by more than its norm.
NOISE_FACTOR = 4
LEAST_TOLERANCE = {torch.float32: 1e-5, torch.float16: 5e-3, torch.bfloat16: 3e-2}
MOST_TOLERANCE = 0.1
ODD_PADDING = 17  # columns; a multiple of the vector width often changes no rounding at all
LONGEST_WINDOW_TO_FILL = 1024  # tokens; beyond it the check has the real rows only


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
        self._packed: _Packed | None = None
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
        packed = _Packed(kwargs)
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
    return PrefixSharing(_backbone(model))


def reason_against(model: Any) -> str | None:
    """Why prefix sharing would be wrong for `model`, as one sentence; `None` where nothing is known against it."""
    causal, backbone = _causal(model), _backbone(model)
    config, name = causal.config, causal.config.model_type
    adapters = list(model.peft_config.values()) if isinstance(model, PeftModel) else []
    attention = config._attn_implementation
    other_layers = sorted(set(getattr(config, "layer_types", None) or ()) - set(LAYER_TYPES))
    reasons = {
        "the adapter puts virtual tokens before the prompt": any(a.is_prompt_learning for a in adapters),
        "the adapter is an activated LoRA, which looks for its invocation tokens in whole rows": any(
            getattr(a, "alora_invocation_tokens", None) for a in adapters
        ),
        f"{name} is an encoder-decoder": config.is_encoder_decoder,
        f"{name} is made of several models": config.get_text_config() is not config,
        f"attention {attention!r} takes no mask of ours, only {', '.join(ATTENTION)} do": attention not in ATTENTION,
        f"{name} has no backbone apart from its language model head": backbone is causal,
        f"{name} carries a state from token to token": causal._is_stateful,
        f"{name} has layers of another kind than attention over tokens: {', '.join(other_layers)}": other_layers,
        f"{name} takes no position_ids": "position_ids" not in inspect.signature(type(backbone).forward).parameters,
        f"{name} uses ALiBi, which takes columns for positions": getattr(config, "alibi", False),
        f"{name} windows its local attention by columns": "local" in (getattr(config, "attention_layers", None) or ()),
        f"{name} selects the keys to attend to by itself": getattr(config, "index_topk", None),
        f"{name} scales its attention by columns": getattr(config, "attn_temperature_tuning", False),
    }
    return next((reason for reason, against in reasons.items() if against), None)


@dataclass(frozen=True)
class Check:
    """The shared path against the plain one: the norm of what differs, as a part of the norm of the hidden states."""

    difference: float
    tolerance: float
    unreached: int | None = None
    """A window, in tokens, that no row of the check was longer than."""
    refusal: str = ""
    """What the model raised when it was given packed rows."""

    @property
    def passed(self) -> bool:
        return self.difference <= self.tolerance

    def __str__(self) -> str:
        if self.refusal:
            return f"the model does not run packed rows: {self.refusal}"
        verdict = "at most" if self.passed else "more than"
        limit = f"; a window of {self.unreached} tokens was not reached" if self.unreached else ""
        return f"hidden states differ by {self.difference:.1e}, {verdict} the {self.tolerance:.1e} allowed{limit}"


@torch.no_grad()
def self_check(model: Any, rows: list[dict[str, Any]], collator: PairCollator) -> Check:
    """Run a few pairs through the backbone as it is loaded, on both paths, and compare the completions' hidden states.

    A pair of random tokens, longer than any window that is not too long for that, is added to `rows`. Adapters act as
    they are; the model is in evaluation mode meanwhile.
    """
    windows = [window for window in _windows(_backbone(model)).values() if window]
    if collator.max_length:  # a window that no row is longer than hides nothing
        windows = [window for window in windows if window < collator.max_length]
    rows = [_random_pair(_backbone(model).config.vocab_size, windows, collator.max_length), *rows]
    batch = {name: tensor.to(model.device) for name, tensor in collator(rows).items()}
    real = batch["completion_mask"].bool()
    real[:, 0] = True  # a token as well: the last one of the prompt
    was_training = model.training
    model.eval()
    try:
        # the padded path last: dynamic rotary embeddings keep the frequencies of the longest row they have seen
        shared = _shared_hidden(model, batch)
        plain, padded = (_plain_hidden(model, batch, extra)[real] for extra in (0, ODD_PADDING))
    finally:
        model.train(was_training)
    if isinstance(shared, str):
        return Check(math.inf, 0.0, refusal=shared)
    longest = int(batch["attention_mask"].sum(1).max())
    noise = NOISE_FACTOR * _relative(padded, plain)
    return Check(
        difference=_relative(shared[real], plain),
        tolerance=min(max(noise, _least_tolerance(model)), MOST_TOLERANCE),
        unreached=next((window for window in windows if window >= longest), None),
    )


class _Packed:
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


def _attention_masks(backbone: Any, packed: _Packed) -> Any:
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
        for kind, window in _windows(backbone).items()
    }
    return masks if _takes_masks_by_type(backbone) else masks.popitem()[1]


def _visible(packed: _Packed, kind: str, window: int | None) -> Callable[..., torch.Tensor]:
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


def _windows(backbone: Any) -> dict[str, int | None]:
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


def _causal(model: Any) -> Any:
    return model.get_base_model() if isinstance(model, PeftModel) else model


def _backbone(model: Any) -> Any:
    return _causal(model).base_model


def _positions(prompt: int, chosen: int, rejected: int) -> list[int]:
    return [*range(prompt + chosen), *range(prompt, prompt + rejected)]


def _padded(rows: list[list[int]], value: int) -> torch.Tensor:
    return pad_sequence([torch.tensor(row, dtype=torch.long) for row in rows], batch_first=True, padding_value=value)


def _shared_hidden(model: Any, batch: dict[str, torch.Tensor]) -> torch.Tensor | str:
    """Hidden states `(2 * batch, 1 + completion, hidden)`, or what the model raised."""
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask", "position_ids", IDS, LENGTHS)}
    try:
        with share_prefix(model):
            return _backbone(model)(**inputs, use_cache=False).last_hidden_state
    except Exception as error:  # of any type: what a model makes of inputs that it was not written for
        return f"{type(error).__name__}: {first_line(error)}"


def _plain_hidden(model: Any, batch: dict[str, torch.Tensor], extra: int) -> torch.Tensor:
    """The same hidden states, from whole rows with `extra` columns of padding."""
    packed = _Packed(batch)
    hidden = _backbone(model)(
        input_ids=pad(packed.whole_rows(batch[IDS]), (0, extra)),
        attention_mask=pad(batch["attention_mask"], (0, extra)),
        use_cache=False,
    ).last_hidden_state
    rows = torch.arange(len(hidden), device=hidden.device)
    return hidden[rows[:, None], packed.places().clamp(max=packed.row_columns - 1)]


def _random_pair(vocabulary: int, windows: list[int], max_length: int | None) -> dict[str, list[int]]:
    chosen, rejected = 9, 13
    prompt = max([window + 1 for window in windows if window <= LONGEST_WINDOW_TO_FILL], default=16)
    prompt = prompt if max_length is None else max(min(prompt, max_length - rejected), 1)
    seeded = torch.Generator().manual_seed(0)
    sizes = {"prompt_ids": prompt, "chosen_ids": chosen, "rejected_ids": rejected}
    return {name: torch.randint(vocabulary, (size,), generator=seeded).tolist() for name, size in sizes.items()}


def _relative(hidden: torch.Tensor, plain: torch.Tensor) -> float:
    return ((hidden.float() - plain.float()).norm() / plain.float().norm()).item()


def _least_tolerance(model: Any) -> float:
    """By the coarsest type among the weights."""
    types = {parameter.dtype for parameter in model.parameters()} & LEAST_TOLERANCE.keys()
    return max((LEAST_TOLERANCE[dtype] for dtype in types), default=LEAST_TOLERANCE[torch.float32])
