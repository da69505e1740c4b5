"""Measures on answers and log-probabilities, each with a bootstrap interval: plain arithmetic, no model."""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

RESAMPLES, LEVEL = 1000, 0.95
AT_A_TIME = 2_000_000  # values drawn at a time, so that large data sets do not fill the memory
REPEATED_NGRAM = 4
LOOP_REPEATS, LOOP_TOKENS = 3, 8
QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)

Interval = dict[str, float]


@dataclass(frozen=True)
class Answer:
    """What a model said to a prompt."""

    ids: list[int]
    """Without the stop token."""
    text: str
    stopped: bool
    """Whether a stop token ended it, rather than the limit on its length."""
    continuation: list[int]
    """With the stop token."""


def mean(values: Sequence[float], seed: int) -> Interval:
    """`{"value", "low", "high", "n"}`: the mean, with a 95 % percentile bootstrap interval over the values."""
    return ratio(values, np.ones(len(values)), seed)


def ratio(numerators: Sequence[float], denominators: Any, seed: int) -> Interval:
    """The same for sum / sum, as in nats per token over rows of unequal length; rows are resampled whole."""
    above, below = np.asarray(numerators, dtype=np.float64), np.asarray(denominators, dtype=np.float64)
    rows, draws, rng = len(above), [], np.random.default_rng(seed)
    size = max(1, min(RESAMPLES, AT_A_TIME // max(rows, 1)))
    for first in range(0, RESAMPLES, size):
        chosen = rng.integers(rows, size=(min(size, RESAMPLES - first), rows))
        draws.append(above[chosen].sum(1) / np.maximum(below[chosen].sum(1), 1e-12))
    low, high = np.quantile(np.concatenate(draws), [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    value = float(above.sum() / max(below.sum(), 1e-12))
    return {"value": value, "low": float(low), "high": float(high), "n": rows}


def perplexity(nats: Sequence[float], tokens: Sequence[int], seed: int) -> Interval:
    """exp of the negative log-probability per token, over answers with `nats` and `tokens` each."""
    found = ratio(nats, tokens, seed)
    return found | {name: math.exp(min(found[name], 700.0)) for name in ("value", "low", "high")}


def quantiles(values: Sequence[float]) -> dict[str, float]:
    """The 5, 25, 50, 75 and 95 % quantiles: a distribution in five numbers."""
    found = np.quantile(np.asarray(values, dtype=np.float64), QUANTILES)
    return {f"{share:.0%}": float(value) for share, value in zip(QUANTILES, found, strict=True)}


def repetition(ids: Sequence[int]) -> float:
    """Share of an answer's 4-grams that stood in it before (seq-rep-4, arXiv 1908.04319); 0 for a short answer."""
    grams = _ngrams(ids, REPEATED_NGRAM)
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


def loops(ids: Sequence[int]) -> bool:
    """Whether an answer ends in a block of tokens said three times or more, over eight tokens or more."""
    for period in range(1, len(ids) // LOOP_REPEATS + 1):
        span = max(period * LOOP_REPEATS, LOOP_TOKENS)
        tail = list(ids[-span:])
        if len(tail) >= span and tail[period:] == tail[:-period]:
            return True
    return False


def distinct(answers: Sequence[Sequence[int]], n: int) -> float:
    """Distinct n-grams over all n-grams of all answers together (arXiv 1510.03055); 0 where there are none."""
    grams = [gram for ids in answers for gram in _ngrams(ids, n)]
    return len(set(grams)) / len(grams) if grams else 0.0


def degeneration(answers: Sequence[Answer], seed: int) -> dict[str, Any]:
    """Length in tokens, shares of answers that stop, are empty, loop; repetition within, distinct n-grams over all."""
    ids = [answer.ids for answer in answers]
    return {
        "tokens": mean([len(one) for one in ids], seed),
        "stopped": mean([float(answer.stopped) for answer in answers], seed),
        "empty": mean([float(not answer.text.strip()) for answer in answers], seed),
        "loops": mean([float(loops(one)) for one in ids], seed),
        "repetition": mean([repetition(one) for one in ids], seed),
        "distinct_1": distinct(ids, 1),
        "distinct_2": distinct(ids, 2),
        "distinct_3": distinct(ids, 3),
    }


def hits(rows: Sequence[dict[str, Any]], texts: Sequence[str], *, how: str, what: str) -> list[float]:
    """1.0 for each answer that fulfils a score, else 0.0.

    Args:
        how: `column`: the answer contains the row's text in column `what`. `exact`: it is that text, apart from the
            space around both. `regex`: it matches the regular expression `what`.
    """
    if how == "regex":
        return [float(re.search(what, text.strip()) is not None) for text in texts]
    wanted = [str(row[what]) for row in rows]
    if how == "exact":
        return [float(text.strip() == want.strip()) for want, text in zip(wanted, texts, strict=True)]
    return [float(want in text) for want, text in zip(wanted, texts, strict=True)]


def _ngrams(ids: Sequence[int], n: int) -> list[tuple[int, ...]]:
    return [tuple(ids[i : i + n]) for i in range(len(ids) - n + 1)]
