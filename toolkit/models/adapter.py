"""Adapters: create, stack, put together by rank, save, check, digest.

A stage trains the PEFT adapter named `default`. Where it starts from another adapter, that one stays attached, frozen,
under the name `start`.
"""

import hashlib
import json
import math
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, PeftModelForCausalLM, get_peft_model, get_peft_model_state_dict
from peft.utils.other import get_pattern_key
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel, set_seed

from toolkit.errors import ModelError, ProofError
from toolkit.recipe.lora_rules import not_by_rank
from toolkit.recipe.plan import StagePlan
from toolkit.wording import first_line

TRAINED, START = "default", "start"
WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
MATRIX = re.compile(r"^base_model\.model\.(?P<module>.+)\.(?P<kind>lora_(?:embedding_)?[AB])(?P<rest>\.weight)?$")


class StackedModel(PeftModelForCausalLM):
    """The adapter `default` in training over the frozen adapter `start`; both act on every forward pass.

    `disable_adapter`, by which TRL takes the reference, disables the stage's own adapter only: what remains is the
    model that the stage started from. Saving writes the trained adapter and no other.
    """

    def __init__(self, base: PreTrainedModel, config: LoraConfig, start: Path):
        super().__init__(base, config, adapter_name=TRAINED)
        self.load_adapter(str(start), adapter_name=START, is_trainable=False)
        self.activate()

    def activate(self) -> None:
        """Both adapters act, `default` is trainable, `start` is frozen."""
        # `start` acts first: on a quantized base PEFT casts the input to each adapter's type in turn, and `default`
        # is bf16 there, so that `start` would see a rounded input and the policy would not begin at its reference
        self.base_model.set_adapter([START, TRAINED])
        self.set_requires_grad(START, False)

    @property
    def active_adapters(self) -> list[str]:
        """The trained adapter first: transformers resumes a checkpoint into the first one."""
        return [TRAINED, START]

    @contextmanager
    def disable_adapter(self) -> Iterator[None]:
        self.base_model.set_adapter(START, inference_mode=True)
        try:
            yield
        finally:
            self.activate()

    def save_pretrained(self, save_directory: str, **kwargs: Any) -> None:
        super().save_pretrained(save_directory, **{**kwargs, "selected_adapters": [TRAINED]})


def lora_config(plan: StagePlan, where: str) -> LoraConfig:
    """`peft.LoraConfig` of the stage.

    Raises:
        ModelError: a value that PEFT refuses.
    """
    try:
        return LoraConfig(task_type="CAUSAL_LM", **plan.lora)
    except (ValueError, TypeError, ImportError) as error:
        raise ModelError(f"{where}: {first_line(error)}") from None


def policy(base: PreTrainedModel, plan: StagePlan, start: Path | None, seed: int, where: str) -> PeftModel | None:
    """The model a stage with a parent trains; `None` for a stage from the base, whose adapter TRL creates itself."""
    if plan.mode == "fresh" or start is None:
        return None
    if plan.mode == "continue":
        continued = PeftModel.from_pretrained(base, str(start), is_trainable=True)
        # PEFT looks the base up by it when an FSDP checkpoint is saved; of a local base the file has the last part only
        continued.peft_config[TRAINED].base_model_name_or_path = base.name_or_path
        return continued
    set_seed(seed)  # as TRL does before it creates an adapter
    return StackedModel(base, lora_config(plan, where), start)


def expected_shapes(
    empty: PreTrainedModel, plan: StagePlan, start: Path | None, where: str
) -> dict[str, tuple[int, ...]]:
    """Name -> shape of every tensor that the trained adapter has when it is saved whole.

    Args:
        empty: the base without weights.
        start: the adapter the stage starts from; one that is continued keeps its shapes.
    """
    if plan.mode == "continue" and start is not None:
        return {name: tuple(tensor.shape) for name, tensor in load_file(start / WEIGHTS).items()}
    config = lora_config(plan, where)
    config.init_lora_weights = True  # only shapes are asked for
    model = get_peft_model(empty, config, low_cpu_mem_usage=True)
    return {n: tuple(t.shape) for n, t in get_peft_model_state_dict(model, save_embedding_layers=False).items()}


def check_stackable(config: dict[str, Any], where: str) -> None:
    """Refuse adapters whose sum is not one plain LoRA.

    Raises:
        ModelError: naming the setting, the reason and the way out.
    """
    found = [f"{key}: {reason}" for key, reason in not_by_rank(config).items()]
    if config.get("peft_type", "LORA") != "LORA":
        found.append(f"peft_type {config['peft_type']}: only LoRA adapters are put together by rank")
    if found:
        raise ModelError(f"{where}: a new adapter cannot be stacked here ({'; '.join(found)}); use adapter: continue")


def check_initialisation(config: dict[str, Any], where: str) -> None:
    """Refuse an adapter that is not relative to the base's own weights.

    Raises:
        ModelError
    """
    name = config.get("init_lora_weights", True)
    if name not in (True, False, "gaussian", "orthogonal"):
        raise ModelError(
            f"{where}: the adapter was initialised with {name!r}, so it stands on a base that loading it rewrites; "
            f"make it a plain one first (PEFT: save_pretrained with path_initial_model_for_weight_conversion)"
        )


def check_matrices(adapter: Path) -> None:
    """Refuse a saved adapter that holds anything but LoRA matrices, such as embeddings saved along with it.

    Raises:
        ModelError
    """
    with safe_open(adapter / WEIGHTS, framework="pt") as weights:
        for key in weights.keys():  # noqa: SIM118 - not a mapping
            _is_a(key)


def check_fits(adapter: Path, empty: PreTrainedModel, where: str) -> None:
    """Refuse an adapter that was trained on a model of other shapes.

    Args:
        empty: The base's modules; their weights are not read.

    Raises:
        ModelError: naming the first matrix that does not fit.
    """
    modules = dict(empty.named_modules())
    with safe_open(adapter / WEIGHTS, framework="pt") as weights:
        for key in weights.keys():  # noqa: SIM118 - not a mapping
            match = MATRIX.match(key)
            if match is None:
                continue
            module, shape = modules.get(match["module"]), weights.get_slice(key).get_shape()
            if module is None:
                raise ModelError(f"{where}: the adapter is for another base: this one has no {match['module']}")
            if not isinstance(module, torch.nn.Linear):
                continue
            found, expected = (shape[1], module.in_features) if _is_a(key) else (shape[0], module.out_features)
            if found != expected:
                side = "in" if _is_a(key) else "out"
                raise ModelError(
                    f"{where}: the adapter is for another base: {match['module']} has {expected} {side}puts here, "
                    f"{found} there"
                )


def read_config(adapter: Path) -> dict[str, Any]:
    """`adapter_config.json` of a folder."""
    return dict(json.loads((adapter / CONFIG).read_text(encoding="utf-8")))


def trainable_parameters(adapter: Path) -> int:
    """Number of values in a saved adapter."""
    return sum(tensor.numel() for tensor in load_file(adapter / WEIGHTS).values())


def save(model: PeftModel, folder: Path, base_name: str, gathered: dict[str, torch.Tensor] | None = None) -> None:
    """Write the trained adapter as plain PEFT files, naming the base as the recipe names it.

    Args:
        gathered: its parameters in whole, where the model is sharded.
    """
    shutil.rmtree(folder, ignore_errors=True)
    model.save_pretrained(str(folder), selected_adapters=[TRAINED], save_embedding_layers=False, state_dict=gathered)
    (folder / "README.md").unlink(missing_ok=True)  # PEFT's empty card
    _write_config(folder, read_config(folder) | {"base_model_name_or_path": base_name})


def concatenate(start: Path, trained: Path, folder: Path) -> None:
    """Write `start` + `trained` as one plain LoRA adapter, by rank: r = r_start + r_trained, scaling 1.

    For each module A = [s1 A1; s2 A2] `(r, in)` and B = [B1, B2] `(out, r)`, so B A = s1 B1 A1 + s2 B2 A2. Computed and
    stored in float32, with zeros where a module has only one of the two. PEFT's `add_weighted_adapter(..., "cat")`
    keeps `use_rslora`, so its result is scaled by sqrt(r), and it fails where `rank_pattern` exceeds `r`.
    """
    parts = [(read_config(path), load_file(path / WEIGHTS)) for path in (start, trained)]
    ranks = [max(tensor.shape[0] for key, tensor in w.items() if _is_a(key)) for _, w in parts]
    weights: dict[str, torch.Tensor] = {}
    for key in sorted({key for _, tensors in parts for key in tensors}):
        weights[key] = torch.cat(_blocks(key, parts, ranks), dim=0 if _is_a(key) else 1).contiguous()
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    save_file(weights, folder / WEIGHTS, metadata={"format": "pt"})
    config = parts[1][0] | {
        "r": sum(ranks),
        "lora_alpha": sum(ranks),
        "lora_dropout": max(c["lora_dropout"] for c, _ in parts),
        "use_rslora": False,
        "rank_pattern": {},
        "alpha_pattern": {},
        "init_lora_weights": True,
        **_targets([c for c, _ in parts], weights),
    }
    _write_config(folder, config)


def check_values(adapter: Path) -> None:
    """Refuse an adapter that holds NaN or infinity, that changes nothing, or that fits no base but a rewritten one.

    Raises:
        ProofError
    """
    weights = load_file(adapter / WEIGHTS)
    broken = [key for key, tensor in weights.items() if not torch.isfinite(tensor).all()]
    if broken:
        raise ProofError(f"the adapter holds NaN or infinite values, first in {broken[0]}; lower the learning rate")
    if not any(
        tensor.any() for key, tensor in weights.items() if "lora_A" not in key and "lora_embedding_A" not in key
    ):
        raise ProofError(
            "every lora_B is zero, so the adapter changes nothing: the learning rate was zero in every step, as it is "
            "in the first step of a warmup; train more steps, or set warmup_steps: 0"
        )
    check_initialisation(read_config(adapter), str(adapter))


def adapter_digest(adapter: Path) -> str:
    """SHA-256 over weights and configuration, without the name of the base."""
    config = read_config(adapter) | {"base_model_name_or_path": None}
    sha = hashlib.sha256(json.dumps(config, sort_keys=True).encode())
    with (adapter / WEIGHTS).open("rb") as stream:
        sha.update(hashlib.file_digest(stream, "sha256").digest())
    return sha.hexdigest()


def _is_a(key: str) -> bool:
    match = MATRIX.match(key)
    if match is None:
        raise ModelError(
            f"{key}: not a plain LoRA matrix, so the adapters cannot be put together; use adapter: continue"
        )
    return match["kind"].endswith("A")


def _blocks(
    key: str, parts: list[tuple[dict[str, Any], dict[str, torch.Tensor]]], ranks: list[int]
) -> list[torch.Tensor]:
    dim = 0 if _is_a(key) else 1
    like = next(tensors[key] for _, tensors in parts if key in tensors)
    blocks = []
    for (config, tensors), rank in zip(parts, ranks, strict=True):
        shape = list(like.shape)
        shape[dim] = rank
        block = torch.zeros(shape)
        if key in tensors:
            own = tensors[key].float()
            own = own * _scaling(key, config, own.shape[0]) if dim == 0 else own
            block.narrow(dim, 0, own.shape[dim]).copy_(own)
        blocks.append(block)
    return blocks


def _scaling(key: str, config: dict[str, Any], rank: int) -> float:
    match = MATRIX.match(key)
    assert match is not None
    pattern = config.get("alpha_pattern") or {}
    alpha = pattern.get(get_pattern_key(pattern.keys(), match["module"]), config["lora_alpha"])
    return float(alpha / math.sqrt(rank)) if config.get("use_rslora") else float(alpha / rank)


def _targets(configs: list[dict[str, Any]], weights: dict[str, torch.Tensor]) -> dict[str, Any]:
    """Names by suffix where both adapters cover whole layers, else every module by its full name."""
    plain = all(
        isinstance(c["target_modules"], list) and not c.get("layers_to_transform") and not c.get("exclude_modules")
        for c in configs
    )
    if plain:
        names = sorted({name for c in configs for name in c["target_modules"]})
    else:
        names = sorted({match["module"] for key in weights if (match := MATRIX.match(key))})
    return {"target_modules": names, "layers_to_transform": None, "layers_pattern": None, "exclude_modules": None}


def _write_config(folder: Path, config: dict[str, Any]) -> None:
    (folder / CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
