"""The base model: hardware, loading, quantization, identity. Its weights are read and never written."""

import hashlib
import json
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from transformers import AutoConfig, AutoModelForCausalLM, BitsAndBytesConfig, PreTrainedModel

from toolkit.errors import ModelError
from toolkit.models import sharding
from toolkit.recipe.plan import Hardware, model_dtype
from toolkit.recipe.sections import Recipe
from toolkit.wording import first_line

WEIGHT_FILES = ("*.safetensors", "*.safetensors.index.json", "*.bin", "config.json", "*.py")
WAITS_FOR_MAIN = timedelta(hours=12)  # the main process tokenizes, verifies and evaluates while the others wait


def detect_hardware() -> Hardware:
    """The device of this process, whether it computes in bf16, and how many processes there are."""
    # Without being told, accelerate takes several processes on CPUs for several runs of one process
    state = PartialState(cpu=not torch.accelerator.is_available(), timeout=WAITS_FOR_MAIN)
    cuda = state.device.type == "cuda"
    return Hardware(state.device.type, cuda and torch.cuda.is_bf16_supported(), state.num_processes)


def device_name() -> str:
    """What computes: the GPU's name, or `cpu`."""
    return torch.cuda.get_device_name() if torch.cuda.is_available() else PartialState().device.type


def load_base(recipe: Recipe, hardware: Hardware, to_shard: bool = False) -> PreTrainedModel:
    """The base as the recipe asks for it, in evaluation mode; quantized models are placed on this process's device.

    Args:
        to_shard: this model will be sharded, so it waits in host memory; others spread over what GPUs have left.

    Raises:
        ModelError: the model is not there, or cannot be loaded this way.
    """
    model, quantized = recipe.model, sharding.quantization_config(recipe, hardware)
    sharding.forget_deepspeed()
    state = PartialState()
    settings: dict[str, Any] = {"attn_implementation": model.attn_implementation} if model.attn_implementation else {}
    if quantized:
        settings["quantization_config"] = BitsAndBytesConfig(**quantized)
        settings["device_map"] = {"": state.local_process_index if hardware.device == "cuda" else hardware.device}
    elif sharding.is_sharded() and not to_shard:
        settings["device_map"] = "auto"  # one GPU may be too small for it
    try:
        base = AutoModelForCausalLM.from_pretrained(
            model.name_or_path,
            revision=model.revision,
            dtype=getattr(torch, model_dtype(recipe, hardware)),
            trust_remote_code=model.trust_remote_code,
            use_safetensors=None if recipe.allow_pickle else True,
            **settings,
        )
    except (OSError, ValueError, ImportError) as error:
        way_out = (
            ""
            if "safetensors" not in str(error)
            else (
                " Weights are loaded from safetensors only; convert them, or allow pickles, which can run code, with "
                "--allow-pickle"
            )
        )
        where = recipe.where("model", "name_or_path")
        raise ModelError(f"{where}: cannot load {model.name_or_path!r}: {first_line(error)}{way_out}") from error
    if quantized:
        _keep_4bit_weights(base)
    elif not sharding.is_sharded():
        base.to(state.device)
    return base.eval()


def empty_base(recipe: Recipe) -> PreTrainedModel:
    """The base's modules without its weights, on the meta device: shapes and names for the plan.

    Raises:
        ModelError: there is no such model, or no such attention for it here.
    """
    model, config = recipe.model, _config(recipe)
    sharding.forget_deepspeed()
    try:
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(
                config, trust_remote_code=model.trust_remote_code, attn_implementation=model.attn_implementation
            )
    except (ValueError, ImportError) as error:
        if model.attn_implementation is None:
            raise
        raise ModelError(f"{recipe.where('model', 'attn_implementation')}: {first_line(error)}") from error


def base_identity(recipe: Recipe) -> dict[str, str]:
    """What the weights are: `{"commit": ...}` for a Hub model, `{"sha256": ...}` of its files for a folder."""
    folder = Path(recipe.model.name_or_path)
    if not folder.is_dir():
        return {"commit": str(getattr(_config(recipe), "_commit_hash", None))}
    sha = hashlib.sha256()
    for file in sorted({f for pattern in WEIGHT_FILES for f in folder.glob(pattern)}):
        with file.open("rb") as stream:
            sha.update(file.name.encode() + hashlib.file_digest(stream, "sha256").digest())
    return {"sha256": sha.hexdigest()}


def _keep_4bit_weights(base: PreTrainedModel) -> None:
    """On CPUs with AVX512-BF16, bitsandbytes 0.50 repacks 4-bit weights on the first forward in evaluation mode.

    That rounds their scales to bf16 for good, in the middle of training, so that the base would change under policy and
    reference. Remove when `Linear4bit` leaves its weights as they were loaded.
    """
    for module in base.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False


def _config(recipe: Recipe) -> Any:
    model = recipe.model
    try:
        return AutoConfig.from_pretrained(
            model.name_or_path, revision=model.revision, trust_remote_code=model.trust_remote_code
        )
    except (OSError, ValueError, json.JSONDecodeError) as error:
        where = recipe.where("model", "name_or_path")
        raise ModelError(f"{where}: no model in {model.name_or_path!r}: {first_line(error)}") from None
