"""Rules for `lora`: values, targets that TRL cannot train, and adapters that cannot be stacked."""

import re
from collections.abc import Callable, Iterable
from typing import Any

from toolkit.errors import Problem
from toolkit.recipe.fields import problem_with
from toolkit.recipe.refused import LORA_REFUSED
from toolkit.wording import did_you_mean, short

Say = Callable[..., Problem]
"""`say(text, *location)`: the problem at this place of the recipe."""

NOT_BY_RANK = {
    "use_dora": "DoRA rescales whole weights",
    "modules_to_save": "it replaces whole modules",
    "trainable_token_indices": "trained tokens replace rows of the embedding",
    "lora_bias": "the bias of lora_B has no rank",
    "target_parameters": "adapters of bare parameters cannot be put together",
    "alora_invocation_tokens": "an activated LoRA is on for a part of the tokens only",
    "layer_replication": "replicated layers share their base weights",
}
REWRITES_BASE = (
    "it rewrites the base weights, so `adapter off` is no longer the base and the saved adapter fits no base"
)
INITIALISATIONS = {
    "pissa": REWRITES_BASE,
    "olora": REWRITES_BASE,
    "corda": REWRITES_BASE,
    "loftq": REWRITES_BASE,
    "lora_ga": REWRITES_BASE,
    "eva": "it needs a pass over the data that the toolkit does not make",
    "mica": "it trains a variant whose adapters cannot be put together by rank",
}
HEADS = ("lm_head", "embed_out")  # what transformers' causal models call their output layer
NO_HEAD = (
    "TRL computes log-probabilities from the head's own weight, so it refuses an adapter on it: that would never be "
    "trained"
)
BIAS = "it trains biases of the base itself, so `adapter off` is no longer the base; expected none"


def not_by_rank(config: dict[str, Any]) -> dict[str, str]:
    """Setting -> why an adapter with these `peft.LoraConfig` fields cannot be put together with another by rank."""
    found = {key: reason for key, reason in NOT_BY_RANK.items() if config.get(key)}
    if config.get("bias", "none") != "none":
        found["bias"] = "it changes biases of the base"
    return found


def lora_problems(lora: dict[str, Any], say: Say, *at: str | int) -> Iterable[Problem]:
    """What is wrong with the keys and values of one `lora` mapping, as it is written."""
    for key, value in lora.items():
        if key in LORA_REFUSED:
            yield say(f"is not for a recipe: {LORA_REFUSED[key]}", *at, key)
        elif key == "init_lora_weights":
            yield from _initialisation(value, say, *at, key)
        elif wrong := problem_with("LoraConfig", key, value) or _value_problem(key, value):
            yield say(wrong, *at, key)
    for key in ("rank_pattern", "alpha_pattern"):
        for module, number in lora[key].items() if isinstance(lora.get(key), dict) else ():
            if isinstance(number, bool) or not isinstance(number, int) or number < 1:
                yield say(f"found {short(number)} for {short(module)}, expected a whole number of 1 or more", *at, key)


def merged_problems(lora: dict[str, Any], say_at: Callable[[str, str], Problem]) -> Iterable[Problem]:
    """Contradictions between the fields that one stage's adapter gets.

    Args:
        lora: the recipe's and the stage's `lora` together.
        say_at: `(key, text)` to the problem at the place where that key is written.
    """
    targets = lora.get("target_modules", "all-linear")
    for key in ("layers_to_transform", "layers_pattern"):
        if lora.get(key) is not None and isinstance(targets, str):
            found = f"target_modules: {short(targets)[1:-1]}"
            yield say_at(key, f"PEFT refuses it beside {found}; expected target_modules as a list, as in [q_proj]")
    if lora.get("layers_pattern") and lora.get("layers_to_transform") is None:
        yield say_at("layers_pattern", "names the layers that layers_to_transform counts; add that, or remove it")
    if lora.get("lora_bias") and lora.get("use_dora"):
        yield say_at("lora_bias", "PEFT has no DoRA with a bias on lora_B; keep one of lora_bias and use_dora")
    head = next((head for head in HEADS if _targets(lora, head)), None)
    if head and isinstance(targets, str):
        yield say_at("target_modules", f"{short(targets)} matches {head}: {NO_HEAD}; write one that does not")
    elif head:
        yield say_at("target_modules", f"{head} is a target: {NO_HEAD}; remove it")


def _initialisation(value: Any, say: Say, *at: str | int) -> Iterable[Problem]:
    if value is True or value in ("gaussian", "orthogonal"):
        return
    reason = INITIALISATIONS.get(str(value).split("_niter")[0].lower())
    if value is False:
        reason = "the policy would not start where the reference stands"
    because = f" is not supported: {reason};" if reason else ","
    found = short(value) if reason else f"found {short(value)}"
    near = "" if reason else did_you_mean(value, ("gaussian", "orthogonal"))
    yield say(f"{found}{because} expected true, gaussian or orthogonal{near}", *at)


def _value_problem(key: str, value: Any) -> str | None:
    match key:
        case "r" if value < 1:
            return f"found {value}, expected a rank of 1 or more"
        case "lora_alpha" if value < 1:
            return f"found {value}, expected 1 or more: the adapter's output is scaled by lora_alpha / r"
        case "lora_dropout" if not 0 <= value < 1:
            return f"found {value}, expected a share from 0 to below 1"
        case "bias" if value != "none":
            return f"found {value!r}: {BIAS}"
        case "target_modules" | "target_parameters" | "modules_to_save" | "exclude_modules" if value in ([], ""):
            return "is empty; name at least one module, or remove it"
        case "target_modules" | "exclude_modules" if isinstance(value, str) and value != "all-linear":
            return _pattern_problem(value)
    return None


def _pattern_problem(pattern: str) -> str | None:
    try:
        re.compile(pattern)
    except (re.error, RecursionError, OverflowError) as error:
        return f"{short(pattern)} is not a regular expression: {error}; a list names modules, as in [q_proj, v_proj]"
    return None


def _targets(lora: dict[str, Any], module: str) -> bool:
    """Whether PEFT would put an adapter on this module, by the rules of `peft.tuners.tuners_utils`."""
    targets, excluded = lora.get("target_modules"), lora.get("exclude_modules")
    if targets == "all-linear":  # which leaves the output layer out
        return False
    return _matches(targets, module) and not _matches(excluded, module)


def _matches(names: Any, module: str) -> bool:
    if isinstance(names, list):
        return module in names
    if not isinstance(names, str) or _pattern_problem(names) or len(names) > 1000:
        return False
    return re.fullmatch(names, module) is not None
