"""Answers to prompts in padded batches, greedy and sampled, and the KL divergence on them.

Sampling adds Gumbel noise (minus the log of an exponential variable) to the logits and takes the largest, which draws
exactly from the softmax, at temperature 1. Every prompt has a generator of its own, so that an answer depends on the
seed and on its prompt alone: not on the batch it stands in, nor on torch's global generators, which are left as they
were. With `divided`, every process calls with the same rows, computes its share, and is given the whole.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList

from toolkit.evaluation.measure import Answer
from toolkit.launching.processes import from_all, own_share
from toolkit.rows import chat

T = TypeVar("T")

LOGITS = 2**27  # values of one batch of log-probabilities, about half a gigabyte


@dataclass(frozen=True)
class Limits:
    """How long an answer may be, in tokens, and how many stand in a batch."""

    max_new_tokens: int
    batch_size: int


class Gumbel(LogitsProcessor):
    """Adds to each row of logits `(batch, vocab)` the noise of that row's generator; rows without one are greedy."""

    def __init__(self, seeds: Sequence[int | None]):
        self.seeds = seeds
        self.generators: list[torch.Generator | None] = []

    def __call__(self, input_ids: Any, scores: Any) -> Any:
        if not self.generators:
            self.generators = [
                None if seed is None else torch.Generator(scores.device).manual_seed(seed) for seed in self.seeds
            ]
        scores = scores.float().clone()
        for i, generator in enumerate(self.generators):
            if generator is not None:
                scores[i] -= torch.empty_like(scores[i]).exponential_(generator=generator).clamp(min=1e-20).log()
        return scores


@torch.no_grad()
def answers(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[list[int]],
    limits: Limits,
    seeds: Sequence[int | None] | None = None,
    *,
    divided: bool = False,
) -> list[Answer]:
    """An answer to each prompt of token ids; in float32 the same in any batch size, up to ties.

    Args:
        model: in evaluation mode.
        seeds: one for each prompt: `None` is greedy, a number samples at temperature 1.
    """
    stops = chat.stop_token_ids(tokenizer)
    seeds = [None] * len(prompts) if seeds is None else seeds
    order = _longest_first([len(prompt) for prompt in prompts], divided)
    said: dict[int, Answer] = {}
    for first in range(0, len(order), limits.batch_size):
        batch = order[first : first + limits.batch_size]
        rows = _generate(model, tokenizer, [prompts[i] for i in batch], limits, [seeds[i] for i in batch])
        for i, row in zip(batch, rows, strict=True):
            end = next((place for place, token in enumerate(row) if token in stops), None)
            ids, whole = row[:end], row if end is None else row[: end + 1]
            said[i] = Answer(ids, tokenizer.decode(ids, skip_special_tokens=True), end is not None, whole)
    return _in_order(said, len(prompts), divided)


@torch.no_grad()
def kl_divergences(
    model: Any,
    reference: Callable[[], AbstractContextManager[Any]],
    sequences: Sequence[tuple[list[int], list[int]]],
    batch_size: int,
    pad: int,
    *,
    divided: bool = False,
) -> list[float]:
    """KL(policy || reference) in nats over each continuation, the policy's own samples.

    At every position of a continuation y, drawn from the policy, the two next-token distributions are compared over the
    whole vocabulary, and the sum is taken: an unbiased estimate of the KL between the two distributions over answers,
    with less variance than log-ratios of the drawn tokens (arXiv 2504.10637). Divided by tokens: nats per token.

    Args:
        reference: a context in which `model` is the reference.
        sequences: `(prompt, continuation)`, token ids; the stop token belongs to the continuation.
    """
    sums: dict[int, float] = {}
    for batch in _batches(model, [len(prompt + said) for prompt, said in sequences], batch_size, divided):
        ids, mask, said = _right_padded([sequences[i] for i in batch], pad, model.device)
        policy = _next_token_logps(model, ids, mask, said)
        with reference():
            against = _next_token_logps(model, ids, mask, said)
        per_position = (policy.exp() * (policy - against)).sum(-1).double()  # (positions,)
        row = said.nonzero()[:, 0]
        totals = torch.zeros(len(batch), dtype=torch.float64, device=row.device).index_add_(0, row, per_position)
        sums |= dict(zip(batch, totals.tolist(), strict=True))
    return _in_order(sums, len(sequences), divided)


@torch.no_grad()
def logps(
    model: Any, rows: Sequence[tuple[list[int], list[int]]], batch_size: int, pad: int, *, divided: bool = False
) -> list[float]:
    """Log-probability of each row's labelled tokens, in nats.

    Args:
        rows: `(input_ids, labels)`, token ids; labels that are -100 are not counted.
    """
    sums: dict[int, float] = {}
    for batch in _batches(model, [len(ids) for ids, _ in rows], batch_size, divided):
        longest = max(len(rows[i][0]) for i in batch)
        ids, labels = (
            torch.tensor([rows[i][part] + [fill] * (longest - len(rows[i][0])) for i in batch], device=model.device)
            for part, fill in ((0, pad), (1, chat.IGNORED))
        )
        mask = torch.tensor([[1] * len(rows[i][0]) + [0] * (longest - len(rows[i][0])) for i in batch])
        labelled = labels[:, 1:] != chat.IGNORED
        chosen = _next_token_logps(model, ids, mask.to(model.device), labelled)
        chosen = chosen.gather(1, labels[:, 1:][labelled][:, None])[:, 0].double()
        row = labelled.nonzero()[:, 0]
        totals = torch.zeros(len(batch), dtype=torch.float64, device=row.device).index_add_(0, row, chosen)
        sums |= dict(zip(batch, totals.tolist(), strict=True))
    return _in_order(sums, len(rows), divided)


def _longest_first(lengths: list[int], divided: bool) -> list[int]:
    """Indices of rows: like lengths come together, which takes little padding. Divided: this process's."""
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    return own_share(order) if divided else order


def _in_order(found: dict[int, T], count: int, divided: bool) -> list[T]:
    whole = from_all(found) if divided else found
    return [whole[i] for i in range(count)]


def _batches(model: Any, lengths: list[int], batch_size: int, divided: bool) -> Iterator[list[int]]:
    """Indices of rows, the longest first, with a bound on the logits of a batch."""
    order = _longest_first(lengths, divided)
    while order:
        size = max(1, min(batch_size, LOGITS // (lengths[order[0]] * model.config.vocab_size)))
        yield order[:size]
        order = order[size:]


def _generate(
    model: Any, tokenizer: Any, prompts: list[list[int]], limits: Limits, seeds: list[int | None]
) -> list[list[int]]:
    config = GenerationConfig(
        max_new_tokens=limits.max_new_tokens,
        do_sample=False,
        use_cache=True,
        eos_token_id=chat.stop_token_ids(tokenizer),
        pad_token_id=tokenizer.pad_token_id,
    )
    batch = tokenizer.pad({"input_ids": prompts}, padding_side="left", return_tensors="pt").to(model.device)
    noise = LogitsProcessorList([Gumbel(seeds)] if any(seed is not None for seed in seeds) else [])
    out = model.generate(**batch, generation_config=config, logits_processor=noise)
    return [row.tolist() for row in out[:, batch["input_ids"].shape[1] :]]


def _right_padded(sequences: list[tuple[list[int], list[int]]], pad: int, device: Any) -> tuple[Any, Any, Any]:
    """`input_ids`, `attention_mask` `(batch, seq)`, and which next tokens were said, `(batch, seq - 1)`."""
    lengths = [(len(prompt), len(said)) for prompt, said in sequences]
    longest = max(a + b for a, b in lengths)
    ids = torch.tensor([prompt + said + [pad] * (longest - len(prompt + said)) for prompt, said in sequences])
    column = torch.arange(longest)
    mask = torch.stack([column < a + b for a, b in lengths])
    said = torch.stack([(column[1:] >= a) & (column[1:] < a + b) for a, b in lengths])
    return ids.to(device), mask.long().to(device), said.to(device)


def _next_token_logps(model: Any, ids: Any, mask: Any, wanted: Any) -> Any:
    """Log-probabilities over the vocabulary where `wanted` `(batch, seq - 1)` is true, `(positions, vocab)`."""
    logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits[:, :-1]
    return logits[wanted].float().log_softmax(-1)
