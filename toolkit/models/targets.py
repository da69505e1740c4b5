"""Whether every name in a stage's `lora` section means something in its model; PEFT passes over what does not."""

import re
from collections.abc import Callable, Iterator
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from transformers import PreTrainedModel

from toolkit.errors import ModelError
from toolkit.models.adapter import lora_config
from toolkit.recipe.plan import StagePlan
from toolkit.wording import did_you_mean, first_line


def check_targets(empty: PreTrainedModel, plan: StagePlan, where: Callable[[str], str]) -> int:
    """Number of parameters the stage trains, on a model without weights.

    Args:
        where: `file:line: key` of a key in the `lora` section.

    Raises:
        ModelError: names that match nothing, all of them; or PEFT or TRL refuse the configuration for this model.
    """
    modules, parameters = ([name for name, _ in named] for named in (empty.named_modules(), empty.named_parameters()))
    linear = {name.split(".")[-1] for name, module in empty.named_modules() if isinstance(module, torch.nn.Linear)}
    try:
        config = lora_config(plan, where("target_modules"))
        config.init_lora_weights = True  # only shapes are asked for here, and some initialisations need real weights
        model = get_peft_model(empty, config, low_cpu_mem_usage=True)
    except (ValueError, TypeError, NotImplementedError) as error:
        known = f"Linear modules of this model: {', '.join(sorted(linear))}"
        raise ModelError(f"{where('target_modules')}: {first_line(error)} {known}") from None
    tuner, head = model.base_model, empty.get_output_embeddings()
    adapted = [*tuner.targeted_module_names, *tuner.targeted_parameter_names]
    trainable, _ = model.get_nb_trainable_parameters()
    model.unload()
    rows = empty.get_input_embeddings().weight.shape[0]
    found = [*_unmatched(config, modules, parameters, adapted), *_untrainable_tokens(config, head, rows)]
    if found:
        raise ModelError("\n".join(f"{where(key)}: {text}" for key, text in found))
    return trainable


def _unmatched(
    config: LoraConfig, modules: list[str], parameters: list[str], adapted: list[str]
) -> Iterator[tuple[str, str]]:
    """Key and complaint for each name that matches nothing, as PEFT 0.21 matches them."""

    def is_end(name: str, full: str) -> bool:
        return full == name or full.endswith(f".{name}")

    def is_pattern(name: str, full: str) -> bool:
        return re.match(rf"(.*\.)?({name})$", full) is not None

    def is_layer(name: Any, full: str) -> bool:
        return f".{name}." in full

    places: dict[str, tuple[Callable[[Any, str], Any], list[str]]] = {
        "target_modules": (is_end, modules),
        "exclude_modules": (is_end, modules),
        "modules_to_save": (lambda name, full: full.endswith(name), modules),
        "target_parameters": (is_end, parameters),
        "rank_pattern": (is_pattern, adapted),
        "alpha_pattern": (is_pattern, adapted),
        "layers_to_transform": (is_layer, adapted),
    }
    for key, (matches, among) in places.items():
        asked: Any = getattr(config, key) or []
        names = [asked] if isinstance(asked, str | int) else asked
        fits: Callable[[Any, str], Any] = re.fullmatch if isinstance(asked, str) else matches  # a regular expression
        for name in names:
            if not any(fits(name, full) for full in among):
                near = did_you_mean(name, {full.split(".")[-1] for full in among})
                yield key, f"{name!r} matches nothing in this model{near or '; remove it'}"


def _untrainable_tokens(config: LoraConfig, head: Any, rows: int) -> Iterator[tuple[str, str]]:
    asked = config.trainable_token_indices
    if not asked:
        return
    indices = asked if isinstance(asked, list) else [index for several in asked.values() for index in several]
    if beyond := [index for index in indices if not 0 <= index < rows]:
        yield "trainable_token_indices", f"{beyond[0]} is no row of the embedding, which has {rows:,}"
    if not hasattr(head, "bias"):  # PEFT has put a wrapper in its place
        reason = "TRL computes log-probabilities from the head's own weight, which is the embedding's in this model"
        yield "trainable_token_indices", f"{reason}; it would never see the trained tokens; remove it"
