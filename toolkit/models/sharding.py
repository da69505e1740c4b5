"""A base that is sharded over the processes: what is refused before it is loaded, and the adapter gathered from all.

accelerate's launcher says by environment variables how a run is sharded; here they are read, and nowhere else.
"""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from transformers import TrainerCallback

from toolkit.errors import ModelError, ProofError, RunError
from toolkit.launching.division import launched_zero_stage
from toolkit.recipe.plan import Hardware, model_dtype, quantization
from toolkit.recipe.sections import Recipe

STORAGE = "bnb_4bit_quant_storage"


class OnceSharded(TrainerCallback):
    """Calls back when a trainer has sharded its model, before the first step of this process.

    Args:
        then: Called with whether the trainer goes on from a checkpoint, which is loaded by then.
    """

    def __init__(self, then: Callable[[bool], None]):
        self.then = then

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.then(state.global_step > 0)


def uses_fsdp() -> bool:
    """Whether the run was launched with FSDP."""
    return _is_on("ACCELERATE_USE_FSDP")


def zero_stage() -> int:
    """DeepSpeed's ZeRO stage; 0 without DeepSpeed."""
    return launched_zero_stage() if _is_on("ACCELERATE_USE_DEEPSPEED") else 0


def is_sharded() -> bool:
    """Whether no process holds the whole base while it trains: FSDP, or ZeRO-3."""
    return uses_fsdp() or zero_stage() == 3


def layout() -> str:
    """In which form a run keeps its optimizer's state, and so its checkpoints; empty for the plain one."""
    return "fsdp" if uses_fsdp() else f"zero{stage}" if (stage := zero_stage()) else ""


def check(recipe: Recipe, hardware: Hardware) -> None:
    """Refuse what is known to fail, or to be wrong, on a sharded base; before any weight is loaded.

    Raises:
        RunError: the launch configuration cannot be used, naming the setting.
        ModelError: the recipe cannot be trained this way, naming the upstream issue and the way out.
    """
    if uses_fsdp() and os.environ.get("FSDP_VERSION", "1") != "2":
        raise RunError(
            "FSDP 1 flattens adapter and base into one tensor, which takes one type only (huggingface/peft#1432); set "
            "fsdp_version: 2, as in accelerate_configs/fsdp2.yaml"
        )
    if is_sharded():
        _check_quantization(recipe, hardware)
    if zero_stage() == 3:
        _check_checkpointing(recipe)


def quantization_config(recipe: Recipe, hardware: Hardware) -> dict[str, Any] | None:
    """`BitsAndBytesConfig` fields of this run: FSDP shards 4-bit weights only if they are stored as the base's type."""
    asked = quantization(recipe)
    if asked and asked.get("load_in_4bit") and uses_fsdp():
        return {STORAGE: model_dtype(recipe, hardware)} | asked
    return asked


def gathered(model: Any) -> dict[str, torch.Tensor] | None:
    """The trainable parameters in whole, on the CPU, by name; `None` where no process lacks a part of them.

    A collective: every process calls it, whatever it does with the result.
    """
    from torch.distributed.tensor import DTensor

    # FSDP's own activation checkpointing puts a name of its own into those of the parameters
    names = {name: name.replace("_checkpoint_wrapped_module.", "") for name, _ in model.named_parameters()}
    trained = {names[name]: p for name, p in model.named_parameters() if p.requires_grad}
    if any(isinstance(p, DTensor) for p in trained.values()):
        return {name: _whole(p) for name, p in trained.items()}
    if any(hasattr(p, "ds_id") for p in trained.values()):  # ZeRO-3
        import deepspeed

        with deepspeed.zero.GatheredParameters(list(trained.values())):
            return {name: p.detach().cpu().clone() for name, p in trained.items()}
    return None


@contextmanager
def trained_only(model: Any) -> Iterator[None]:
    """Within, the model's `state_dict` is what is in training, and nothing of the base.

    DeepSpeed 0.19 leaves out frozen parameters by name: a tied head has a second one, and quantized weights keep their
    scales beside themselves.
    """
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}

    def leave_out(module: Any, state: dict[str, Any], prefix: str, metadata: Any) -> None:
        for name in state.keys() - trained:
            del state[name]

    hook = model.register_state_dict_post_hook(leave_out)
    try:
        yield
    finally:
        hook.remove()


def check_gathered(saved: dict[str, torch.Tensor], expected: dict[str, tuple[int, ...]]) -> None:
    """Compare what is about to be called an adapter with the shapes that its configuration has on this base.

    Args:
        saved: the tensors of `adapter_model.safetensors`.
        expected: name -> shape, of the same adapter on the base without weights.

    Raises:
        ProofError: a module is missing, or has a part of its matrix only.
    """
    missing = sorted(expected.keys() - saved.keys())
    wrong = [name for name in sorted(expected.keys() & saved.keys()) if tuple(saved[name].shape) != expected[name]]
    if missing:
        raise ProofError(
            f"the saved adapter lacks {len(missing)} of {len(expected)} matrices, first {missing[0]}: it was not "
            f"gathered from all processes (huggingface/peft#2500)"
        )
    if wrong:
        name = wrong[0]
        raise ProofError(
            f"{len(wrong)} of {len(expected)} matrices of the saved adapter are parts, first {name}: "
            f"{tuple(saved[name].shape)}, expected {expected[name]}; they were not gathered from all processes "
            f"(huggingface/peft#2500, huggingface/accelerate#4206)"
        )


def forget_deepspeed() -> None:
    """Let transformers make the next model in whole: once a ZeRO-3 trainer was made, it shards all it makes.

    A model that one process loads to verify another, or makes without weights, would wait for the others for ever.
    """
    if zero_stage() == 3:
        from transformers.integrations.deepspeed import unset_hf_deepspeed_config

        unset_hf_deepspeed_config()


def _check_quantization(recipe: Recipe, hardware: Hardware) -> None:
    asked, where = quantization(recipe), recipe.where("quantization")
    if not asked:
        return
    if zero_stage() == 3:
        raise ModelError(
            f"{where}: ZeRO-3 cannot shard a quantized base (huggingface/peft#2016); launch with ddp or "
            f"deepspeed_zero2, where each GPU holds its own, or shard a 4-bit base with fsdp2_qlora"
        )
    if asked.get("load_in_8bit"):
        raise ModelError(
            f"{where}: FSDP cannot shard an 8-bit base (huggingface/peft#2833); use load_in_4bit, or launch with ddp"
        )
    dtype = model_dtype(recipe, hardware)
    if dtype != "bfloat16":
        raise ModelError(
            f"{where}: under FSDP the adapter on a 4-bit base is bfloat16, and the base {dtype}; they must be of one "
            f"type (huggingface/peft#1432): set model.dtype: bfloat16, or launch with ddp"
        )
    if asked.get(STORAGE, dtype) != dtype:
        raise ModelError(
            f"{recipe.where('quantization', STORAGE)}: found {asked[STORAGE]}, and FSDP shards 4-bit weights only if "
            f"they are stored as {dtype}, the base's type (huggingface/accelerate#3983); remove it, it is set so"
        )
    if _is_on("FSDP_CPU_RAM_EFFICIENT_LOADING"):
        raise RunError(
            "fsdp_cpu_ram_efficient_loading: FSDP2 does not send 4-bit weights from the first process to the others "
            "(huggingface/accelerate#3874); set it to false, as in accelerate_configs/fsdp2_qlora.yaml"
        )


def _check_checkpointing(recipe: Recipe) -> None:
    for i, stage in enumerate(recipe.stages):
        asked = stage.trainer.get("gradient_checkpointing_kwargs") or {}
        if asked.get("use_reentrant") is False:
            where = recipe.where("stages", i, "trainer", "gradient_checkpointing_kwargs")
            raise ModelError(
                f"{where}: LoRA under ZeRO-3 needs use_reentrant: true (huggingface/trl#2514), and TRL would set it; "
                f"remove it"
            )


def _whole(parameter: Any) -> torch.Tensor:
    full = parameter.full_tensor() if hasattr(parameter, "full_tensor") else parameter
    return full.detach().cpu()


def _is_on(name: str) -> bool:
    return os.environ.get(name, "false").lower() in ("true", "1", "yes", "on")
