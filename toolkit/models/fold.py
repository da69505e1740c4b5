"""An adapter folded into the base's tensors, one at a time: which tensors it changes, and how.

The arithmetic is PEFT's own `merge`, on one layer at a time: the model's modules stand on the meta device, and only the
layer at work holds weights. So rank and alpha patterns, rsLoRA, DoRA, embeddings and transposed layers are PEFT's.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from peft.utils import ModulesToSaveWrapper, load_peft_weights
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, rename_source_key

from toolkit.errors import ModelError
from toolkit.models.adapter import TRAINED, check_initialisation, read_config
from toolkit.wording import first_line

Change = Callable[[torch.Tensor], torch.Tensor]

PREFIX = "base_model.model."
WAY_OUT = "serve the adapter as it is, or merge with PEFT's merge_and_unload"
NOT_FOLDED = {
    "target_parameters": "adapters of bare parameters",
    "trainable_token_indices": "trained tokens",
    "layer_replication": "replicated layers share one weight",
    "alora_invocation_tokens": "an activated LoRA is on for a part of the tokens only",
    "lora_bias": "a bias in lora_B",
    "use_qalora": "a LoRA of pooled inputs",
}


@dataclass(frozen=True)
class Tensor:
    """One tensor of the merged checkpoint."""

    name: str
    source: str
    """The tensor of the base's checkpoint it is made from."""
    change: Change | None
    """float32 to float32, of the same shape; `None` where the adapter does not touch it."""


def plan(empty: PreTrainedModel, adapter: Path, stored: Iterable[str]) -> tuple[list[Tensor], bool]:
    """Every tensor of the merged checkpoint, under the names that the base's checkpoint uses.

    Args:
        empty: the base's modules on the meta device; its linear layers are replaced by LoRA layers.
        stored: names of the tensors in the base's checkpoint.

    Returns:
        The tensors, and whether weights that the base ties (embedding and head) now differ.

    Raises:
        ModelError: the adapter holds something that is not folded, or something without a tensor to go to.
    """
    parameters = _parameter_names(empty, list(stored))
    tied = [set(pair) for pair in (getattr(empty, "all_tied_weights_keys", None) or {}).items()]
    changes = _changes(empty, adapter)
    tensors = [Tensor(key, key, changes.get(name)) for name, key in parameters.items()]
    untied = False
    for group in tied:
        if not group & set(changes):
            continue
        untied = True
        held = next((parameters[name] for name in sorted(group) if name in parameters), None)
        tensors += [Tensor(n, held, changes.get(n)) for n in sorted(group) if held and n not in parameters]
        parameters |= {name: held for name in group if held and name not in parameters}
    homeless = sorted(set(changes) - set(parameters))
    if homeless:
        raise ModelError(
            f"{adapter}: {homeless[0]} ({len(homeless)} such) is changed by the adapter, and the base does not store "
            f"it so; {WAY_OUT}"
        )
    return sorted(tensors, key=lambda tensor: tensor.source), untied


def _parameter_names(empty: PreTrainedModel, stored: list[str]) -> dict[str, str]:
    """Parameter of the model -> tensor of the checkpoint; those that loading fuses or splits go by their own name."""
    mapping = get_model_conversion_mapping(empty)
    converters = [m for m in mapping if isinstance(m, WeightConverter)]
    renamings: list[Any] = [m for m in mapping if not isinstance(m, WeightConverter)]
    state, names = empty.state_dict(), {}
    for key in stored:
        name, fused = rename_source_key(key, renamings, converters, empty.base_model_prefix, state)
        names[f"(converted) {key}" if fused is not None else name] = key
    if len(names) != len(stored):
        raise ModelError(f"two tensors of the base's checkpoint are loaded into one parameter; {WAY_OUT}")
    return names


def _changes(empty: PreTrainedModel, folder: Path) -> dict[str, Change]:
    model = _with_adapter(empty, folder)
    changes: dict[str, Change] = {}
    for name, module in model.named_modules():
        at = name.removeprefix(PREFIX)
        if isinstance(module, LoraLayer):
            _check_variant(module, folder)
            changes[f"{at}.weight"] = _lora(module)
        elif isinstance(module, ModulesToSaveWrapper):
            saved = module.modules_to_save[TRAINED].named_parameters()
            changes |= {f"{at}.{key}": _replacement(value.detach()) for key, value in saved}
    return changes


def _with_adapter(empty: PreTrainedModel, folder: Path) -> Any:
    """The base's modules on the meta device with the adapter's weights on the CPU; every one of them has its place."""
    config = read_config(folder)
    check_initialisation(config, str(folder))
    found = [f"{key}: {reason}" for key, reason in NOT_FOLDED.items() if config.get(key)]
    found += [f"bias: {config['bias']}"] if config.get("bias", "none") != "none" else []
    found += [f"peft_type {config['peft_type']}"] if config.get("peft_type") != "LORA" else []
    if found:
        raise ModelError(f"{folder}: cannot be merged ({'; '.join(found)}); {WAY_OUT}")
    try:
        settings = LoraConfig.from_pretrained(str(folder))
        settings.base_model_name_or_path = None  # the base is at hand, wherever it lay at the time
        model = get_peft_model(empty, settings, low_cpu_mem_usage=True)
        state, weights = model.state_dict(), load_peft_weights(str(folder), device="cpu")
        named = {id(value): name for name, value in state.items()}
        # PEFT's names in a file -> names in the model. Its own loading would move the weights to the meta device
        places = get_peft_model_state_dict(model, state, save_embedding_layers=False)
        _check_complete(set(weights), set(places), folder)
        filled = {named[id(places[key])]: value.float() for key, value in weights.items()}
        model.load_state_dict(filled, strict=False, assign=True)
    except (ValueError, RuntimeError, NotImplementedError) as error:
        raise ModelError(f"{folder}: does not fit the base: {first_line(error)}") from error
    return model.eval()


def _check_complete(found: set[str], expected: set[str], folder: Path) -> None:
    """Every tensor of the adapter has its place in the base, and every place its tensor."""
    for names, what in ((found - expected, "has no place in the base"), (expected - found, "is not in the file")):
        if names:
            raise ModelError(f"{folder}: {min(names)} {what} ({len(names)} such), so it cannot be merged; {WAY_OUT}")


def _check_variant(layer: LoraLayer, folder: Path) -> None:
    kinds = [type(v).__name__ for v in layer.lora_variant.values() if not type(v).__name__.startswith("Dora")]
    if kinds:
        raise ModelError(f"{folder}: cannot be merged ({kinds[0]}); {WAY_OUT}")


def _lora(layer: Any) -> Change:
    def change(weight: torch.Tensor) -> torch.Tensor:
        base = layer.get_base_layer()
        empty, base.weight = base.weight, torch.nn.Parameter(weight, requires_grad=False)
        try:
            layer.merge()
            return base.weight.data
        finally:
            layer.merged_adapters.clear()
            base.weight = empty

    return change


def _replacement(value: torch.Tensor) -> Change:
    return lambda _: value
