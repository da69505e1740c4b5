"""Rules for the losses of `trl.DPOTrainer`: which settings each one reads, and which TRL refuses or ignores."""

from collections.abc import Iterable
from typing import Any

from toolkit.wording import did_you_mean, short

LOSS_TYPES = [
    "sigmoid",
    "hinge",
    "ipo",
    "exo_pair",
    "nca_pair",
    "robust",
    "bco_pair",
    "sppo_hard",
    "aot",
    "aot_unpaired",
    "apo_zero",
    "apo_down",
    "discopop",
    "sft",
    "sigmoid_norm",
]
DIVERGENCES = ["reverse_kl", "forward_kl", "js_divergence", "alpha_divergence"]
WITH_DIVERGENCE = {"sigmoid", "sigmoid_norm", "hinge", "ipo", "exo_pair", "robust", "discopop", "sft"}
WITH_SMOOTHING = {"robust", "exo_pair", "aot", "aot_unpaired"}
SORTED = {"aot", "aot_unpaired"}


def loss_types_problem(names: list[Any]) -> str | None:
    """What is wrong with the list in `loss_type`, or `None`."""
    if not names:
        return f"is empty, expected some of {', '.join(LOSS_TYPES)}"
    for name in names:
        if name not in LOSS_TYPES:
            return f"found {short(name)}, expected some of {', '.join(LOSS_TYPES)}{did_you_mean(name, LOSS_TYPES)}"
    return None


def loss_problems(t: dict[str, Any]) -> Iterable[tuple[str, str]]:
    """Key and text of what contradicts `loss_type` in a DPO stage's `trainer`."""
    losses = t.get("loss_type", ["sigmoid"])
    names, said = set(losses), ", ".join(losses)
    weights, smoothing = t.get("loss_weights"), t.get("label_smoothing", 0.0)
    if weights is not None and len(weights) != len(losses):
        yield "loss_weights", f"found {len(weights)} for {len(losses)} loss types ({said}); expected one for each"
    if "exo_pair" in names and not 0 < smoothing < 1:
        where = "label_smoothing" if "label_smoothing" in t else "loss_type"
        yield (
            where,
            "exo_pair takes the logarithm of label_smoothing; expected more than 0, as in label_smoothing: 1.0e-3",
        )
    if "robust" in names and smoothing >= 0.5:
        yield "label_smoothing", f"robust divides by 1 - 2 * label_smoothing; found {smoothing:g}, expected below 0.5"
    if smoothing and not names & WITH_SMOOTHING:
        yield "label_smoothing", f"loss_type {said} ignores it; it is for {', '.join(sorted(WITH_SMOOTHING))}"
    if t.get("use_weighting") and names & (SORTED | {"sft"}):
        because = (
            "aot sorts the pairs, which would part them from their weights"
            if names & SORTED
            else ("TRL cannot weigh sft, whose loss is one number for the batch")
        )
        yield "use_weighting", f"does not work with loss_type {said}: {because}; remove it"
    if "discopop_tau" in t and "discopop" not in names:
        yield "discopop_tau", f"loss_type {said} ignores it; it is for discopop"
    divergence = t.get("f_divergence_type", "reverse_kl")
    if divergence != "reverse_kl" and not names <= WITH_DIVERGENCE:
        others = ", ".join(sorted(names - WITH_DIVERGENCE))
        yield "f_divergence_type", f"{divergence} is not defined for loss_type {others}; expected reverse_kl"
    if "f_alpha_divergence_coef" in t and divergence != "alpha_divergence":
        yield "f_alpha_divergence_coef", f"f_divergence_type: {divergence} ignores it; it is for alpha_divergence"
    if "beta" in t and names == {"sft"}:
        yield "beta", "loss_type sft looks at the chosen answers alone and ignores it; use an sft stage instead"
