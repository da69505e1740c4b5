"""The guards of a DPO stage: bounds on what has been observed, each said in one sentence. No model is touched here."""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from itertools import takewhile
from typing import Any

from toolkit.recipe.sections import Guard

LN2 = math.log(2)
SATURATED, GROWING = 0.999, 1.1
FLAT_FROM, FLAT_LOGS = 0.5, 3
MOVED = 0.2  # nats of log-ratio margin: the policy has moved, whatever the loss says


@dataclass(frozen=True)
class Said:
    """Averages over a few answers: length in tokens, shares that end by themselves and of repeated 4-grams."""

    tokens: float
    stopped: float
    repetition: float


@dataclass(frozen=True)
class Seen:
    """What is known of a stage at one step. What was not measured is `None`."""

    step: int
    max_steps: int
    beta: float
    learning_rate: float
    chosen_tokens: float
    """Mean length of the chosen answers that `chosen_logratio` is about."""
    chosen_logratio: float | None = None
    """Log-probability of the chosen answers, minus the reference's: nats per answer."""
    held_out: bool = False
    """Whether log-ratios, accuracy and margin are of held-out pairs, rather than of training pairs."""
    margins: Sequence[tuple[int, float, float]] = ()
    """Step, reward accuracy and reward margin, so far."""
    losses: Sequence[tuple[int, float]] = ()
    """Step and training loss, so far; empty where the loss does not begin at ln 2."""
    identical_pairs: float = 0.0
    """Share of training pairs whose two answers are the same."""
    kl: float | None = None
    """KL to the reference on the policy's own samples, in nats per token."""
    answers: Said | None = None
    reference: Said | None = None
    """The reference's answers to the same prompts."""


@dataclass(frozen=True)
class Tripped:
    """A bound that was passed, for `guards.jsonl`."""

    step: int
    guard: str
    """The key of the bound in the recipe's `guard` section."""
    value: float
    bound: float
    text: str
    """The number, what it means, and what to change."""
    action: str = field(default="warn")

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def tripped(seen: Seen, guard: Guard) -> list[Tripped]:
    """Every bound that is passed at this step."""
    checks = (_chosen_drop, _kl, _repetition, _length, _stopped, _saturated, _flat)
    found = (check(seen, guard) for check in checks)
    return [Tripped(seen.step, *one, guard.action) for one in found if one is not None]


_Found = tuple[str, float, float, str] | None


def _chosen_drop(seen: Seen, guard: Guard) -> _Found:
    if seen.chosen_logratio is None:
        return None
    drop = -seen.chosen_logratio / max(seen.chosen_tokens, 1)
    if drop <= guard.chosen_drop:
        return None
    which = "held-out chosen answers" if seen.held_out else "chosen answers"
    text = (
        f"{which} have become less likely than under the reference, by {drop:.2f} nats per token (bound "
        f"{guard.chosen_drop:g}): the policy moves away from both answers; lower the learning rate, raise beta, or "
        f"train fewer epochs"
    )
    return "chosen_drop", drop, guard.chosen_drop, text


def _kl(seen: Seen, guard: Guard) -> _Found:
    if seen.kl is None or seen.kl <= guard.kl:
        return None
    text = (
        f"the KL to the reference is {seen.kl:.2f} nats per token on the policy's own samples (bound {guard.kl:g}): it "
        f"no longer speaks like the model it started from; raise beta, lower the learning rate, or use keep: best"
    )
    return "kl", seen.kl, guard.kl, text


def _repetition(seen: Seen, guard: Guard) -> _Found:
    if seen.answers is None or seen.reference is None:
        return None
    rise = seen.answers.repetition - seen.reference.repetition
    if rise <= guard.repetition:
        return None
    text = (
        f"{seen.answers.repetition:.0%} of the 4-grams in its answers repeat themselves, with the reference "
        f"{seen.reference.repetition:.0%}: generation is falling into loops; lower the learning rate, or train "
        f"fewer epochs"
    )
    return "repetition", rise, guard.repetition, text


def _length(seen: Seen, guard: Guard) -> _Found:
    if seen.answers is None or seen.reference is None:
        return None
    usual = max(seen.reference.tokens, seen.chosen_tokens, 1.0)
    times = seen.answers.tokens / usual
    if times <= guard.length:
        return None
    text = (
        f"its answers have {seen.answers.tokens:.0f} tokens, {times:.1f} times as many as the reference's or the "
        f"chosen ones (bound {guard.length:g}): length is running away; balance the lengths of the pairs, lower "
        f"the learning rate, or raise beta"
    )
    return "length", times, guard.length, text


def _stopped(seen: Seen, guard: Guard) -> _Found:
    if seen.answers is None or seen.reference is None:
        return None
    fall = seen.reference.stopped - seen.answers.stopped
    if fall <= guard.stopped:
        return None
    text = (
        f"{seen.answers.stopped:.0%} of its answers end by themselves, of the reference's "
        f"{seen.reference.stopped:.0%}: it is forgetting to stop; lower the learning rate, train fewer "
        f"epochs, or check that chosen answers end with the end token"
    )
    return "stopped", fall, guard.stopped, text


def _saturated(seen: Seen, guard: Guard) -> _Found:
    full = list(takewhile(lambda one: one[1] >= SATURATED, reversed(seen.margins)))  # the latest first
    if len(full) < 2 or full[0][2] <= max(guard.margin, full[1][2], GROWING * full[-1][2]):
        return None
    (_, accuracy, margin), (since, _, earlier) = full[0], full[-1]
    which = "held-out pairs" if seen.held_out else "training pairs"
    text = (
        f"the reward accuracy on {which} is {accuracy:.2f} since step {since} and the margin still grows, from "
        f"{earlier:.1f} to {margin:.1f} "
        f"(bound {guard.margin:g}): there is nothing left to learn from these pairs, and more steps only move the "
        f"policy away; train fewer epochs or raise beta"
    )
    return "margin", margin, guard.margin, text


def _flat(seen: Seen, guard: Guard) -> _Found:
    late = [loss for step, loss in seen.losses if step >= FLAT_FROM * seen.max_steps]
    if len(late) < FLAT_LOGS or not all(math.isfinite(loss) for loss in late):
        return None
    off = max(abs(loss - LN2) for loss in late)
    if off > guard.flat:
        return None
    moved = abs(seen.margins[-1][2]) / seen.beta if seen.margins else 0.0
    if seen.identical_pairs > 0.5:
        cause = f"{seen.identical_pairs:.0%} of the pairs hold the same answer twice; look at the data"
    elif moved > MOVED:
        cause = f"the policy has moved by {moved:.2f} nats, but beta {seen.beta:g} makes that invisible; raise beta"
    else:
        cause = f"the learning rate {seen.learning_rate:g} is too small for the policy to move; raise it tenfold"
    text = f"the loss has stayed within {off:.4f} of ln 2 since step {_first(seen)}: nothing is learned; {cause}"
    return "flat", off, guard.flat, text


def _first(seen: Seen) -> int:
    return next(step for step, _ in seen.losses if step >= FLAT_FROM * seen.max_steps)


def selection(accuracy: float, loss: float, kl: float, bound: float, pairs: int) -> float:
    """What `keep: best` ranks checkpoints by: larger is better.

    Within the bound on the KL: the held-out preference accuracy, and among equals (they are multiples of 1 / pairs) the
    lower held-out loss. Beyond the bound: below all of those, the smaller KL first. Last what is not finite, and what
    has not moved at all, such as the weights after a warmup step at a learning rate of zero.
    """
    if not math.isfinite(kl) or kl == 0:
        return -1e9
    if kl > bound:
        return -kl
    squashed = loss / (1 + loss) if math.isfinite(loss) and loss >= 0 else 1.0
    return accuracy - squashed / (2 * pairs)
