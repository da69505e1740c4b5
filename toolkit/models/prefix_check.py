"""Whether a model shares prefixes exactly: what is known from its configuration, and a check on the model as loaded."""

import inspect
import math
from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftModel
from torch.nn.functional import pad

from toolkit.models.prefix import IDS, LENGTHS, Packed, PairCollator, backbone_of, causal_of, share_prefix, windows_of
from toolkit.wording import first_line

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


def reason_against(model: Any) -> str | None:
    """Why prefix sharing would be wrong for `model`, as one sentence; `None` where nothing is known against it."""
    causal, backbone = causal_of(model), backbone_of(model)
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
def self_check(model: Any, rows: list[dict[str, Any]], collator: PairCollator, *, sharded: bool = False) -> Check:
    """Run a few pairs through the backbone as it is loaded, on both paths, and compare the completions' hidden states.

    A pair of random tokens, longer than any window that is not too long for that, is added to `rows`. Adapters act as
    they are; the model is in evaluation mode meanwhile.

    Args:
        sharded: `model` is a sharded one of TRL's trainer, and is called as a whole.
    """
    windows = [window for window in windows_of(backbone_of(model)).values() if window]
    if collator.max_length:  # a window that no row is longer than hides nothing
        windows = [window for window in windows if window < collator.max_length]
    rows = [_random_pair(backbone_of(model).config.vocab_size, windows, collator.max_length), *rows]
    batch = {name: tensor.to(model.device) for name, tensor in collator(rows).items()}
    real = batch["completion_mask"].bool()
    real[:, 0] = True  # a token as well: the last one of the prompt
    was_training = model.training
    model.eval()
    try:
        # the padded path last: dynamic rotary embeddings keep the frequencies of the longest row they have seen
        shared = _shared_hidden(model, batch, sharded)
        plain, padded = (_plain_hidden(model, batch, extra, sharded)[real] for extra in (0, ODD_PADDING))
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


def _shared_hidden(model: Any, batch: dict[str, torch.Tensor], sharded: bool) -> torch.Tensor | str:
    """Hidden states `(2 * batch, 1 + completion, hidden)`, or what the model raised."""
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask", "position_ids", IDS, LENGTHS)}
    try:
        with share_prefix(model):
            return _hidden(model, sharded, **inputs)
    except Exception as error:  # of any type: what a model makes of inputs that it was not written for
        return f"{type(error).__name__}: {first_line(error)}"


def _plain_hidden(model: Any, batch: dict[str, torch.Tensor], extra: int, sharded: bool) -> torch.Tensor:
    """The same hidden states, from whole rows with `extra` columns of padding."""
    packed = Packed(batch)
    hidden = _hidden(
        model,
        sharded,
        input_ids=pad(packed.whole_rows(batch[IDS]), (0, extra)),
        attention_mask=pad(batch["attention_mask"], (0, extra)),
    )
    rows = torch.arange(len(hidden), device=hidden.device)
    return hidden[rows[:, None], packed.places().clamp(max=packed.row_columns - 1)]


def _hidden(model: Any, sharded: bool, **inputs: torch.Tensor) -> torch.Tensor:
    """What the backbone hands to the head."""
    backbone = backbone_of(model)
    if not sharded:
        return backbone(**inputs, use_cache=False).last_hidden_state
    handed: list[Any] = []
    hook = backbone.register_forward_hook(lambda backbone, args, output: handed.append(output))
    try:  # FSDP gathers its shards for a call of the whole model; like this TRL's loss calls it
        model(**inputs, labels=inputs["input_ids"], fused_lm_head=True, use_cache=False)
    finally:
        hook.remove()
    return handed[0].last_hidden_state


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
