"""A full model for serving: the base's tensors with an adapter folded in, one at a time, and how close that is."""

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download, split_state_dict_into_shards_factory
from peft import PeftModel
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

from toolkit.errors import DataError, ModelError, ProofError, RunError
from toolkit.models import fold, model
from toolkit.models.adapter import adapter_digest
from toolkit.publishing import agreement, card
from toolkit.publishing.agreement import Agreement
from toolkit.publishing.saved_run import SavedRun, load_run
from toolkit.recipe.plan import Hardware, model_dtype, quantization
from toolkit.records.rundir import CARD, MERGED, RESOLVED, read_json, storage, write_json
from toolkit.rows import chat
from toolkit.training.progress import say
from toolkit.training.proof import OTHER_PATH
from toolkit.training.trainer import release
from toolkit.wording import first_line

SHARD = 2 * 1024**3  # bytes; what is held in memory at a time is one shard, written, and the tensor at work
SPARE = 64 * 1024**2  # bytes for tokenizer, configuration and the file system
INDEX, SINGLE, PATTERN = "model.safetensors.index.json", "model.safetensors", "model{suffix}.safetensors"
COMES_ALONG = ("*.json", "*.jinja", "*.model", "*.txt", "*.tiktoken", "*.py", "LICENSE*", "NOTICE*")
TYPES = {  # as safetensors writes them
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


@dataclass(frozen=True)
class Stored:
    """A tensor in the base's checkpoint."""

    file: Path
    shape: tuple[int, ...]
    dtype: torch.dtype


def merge(
    run: str | Path,
    stage: str | None = None,
    dtype: str | None = None,
    output: str | Path | None = None,
    *,
    verify: bool = True,
    shard: int = SHARD,
    trust_remote_code: bool = False,
) -> Path:
    """Write base + adapter as one plain model that transformers and vLLM load without PEFT.

    Args:
        run: a run directory, or a pulled adapter.
        stage: whose adapter; the last finished one by default.
        dtype: `bfloat16`, `float16` or `float32`; by default the type that was trained on.
        output: a folder that is not there yet, or empty; by default `RUN/merged`, or `RUN/merged-STAGE`.
        verify: load the policy, then the merged model, and compare them on held-out rows of the run.
        trust_remote_code: run the Python code of a base that has its own; a run may come from the Hub.
        shard: largest file, in bytes.

    Returns:
        The folder. `RUN/merge.json` says what was measured.

    Raises:
        RunError: no such run or stage, the output holds something, the disk is too small.
        ModelError: an adapter that is not folded, a base without safetensors, or one that has changed.
        ProofError: an unquantized policy and its merged model differ by more than rounding; nothing is left behind.
    """
    saved = load_run(run, trust_remote_code)
    name = saved.stage(stage)
    target = Path(output) if output is not None else saved.path / ("merged" if stage is None else f"merged-{name}")
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise RunError(f"{target}: already there; remove it, or choose another folder with --output")
    hardware = model.detect_hardware()
    tokenizer = chat.load_tokenizer(saved.recipe)
    rows = _rows(saved, name, hardware, tokenizer) if verify else None
    dtype = dtype or model_dtype(saved.recipe, hardware)
    partial = target.with_name(f"{target.name}.partial")
    try:
        with storage(target):
            written = _write(saved, name, dtype, partial, tokenizer=tokenizer, shard=shard)
        compared = _compare(saved, saved.adapters[name], hardware, partial, dtype=dtype, rows=rows) if rows else None
        with storage(target):
            partial.replace(target)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    record = {"stage": name, "adapter_digest": adapter_digest(saved.adapters[name]), "dtype": dtype, **written}
    record |= {"output": target.name, "quantized_policy": bool(quantization(saved.recipe))}
    with storage(saved.path):
        write_json(saved.path / MERGED, record | {"agreement": compared.as_dict() if compared else None})
        if (saved.path / CARD).is_file() and "pulled" not in (read_json(saved.path / RESOLVED) or {}):
            card.write(saved.path)
    say(f"merged: {target}")
    return target


def _rows(saved: SavedRun, name: str, hardware: Hardware, tokenizer: Any) -> Any:
    """What is compared, found before anything is written; a pulled adapter comes without its data."""
    try:
        return agreement.rows_to_compare(saved, name, hardware, tokenizer)
    except DataError as error:
        raise DataError(f"{error}\nThere are no rows to compare on; --no-verify merges without comparing") from None


def _write(saved: SavedRun, name: str, dtype: str, folder: Path, *, tokenizer: Any, shard: int) -> dict[str, Any]:
    """The whole checkpoint; returns `{"bytes", "shards", "changed", "untied"}`."""
    base = _base_folder(saved)
    stored = _stored(base)
    empty = model.empty_base(saved.recipe)
    wide = {*(getattr(empty, "_keep_in_fp32_modules", None) or ()), *(empty._keep_in_fp32_modules_strict or ())}
    tensors, untied = fold.plan(empty, saved.adapters[name], stored)
    kinds = {tensor.name: _kind(tensor, stored[tensor.source].dtype, dtype, wide) for tensor in tensors}
    # tensors of the meta device have sizes and no memory
    sized = {t.name: torch.empty(stored[t.source].shape, dtype=kinds[t.name], device="meta") for t in tensors}
    total = sum(tensor.nbytes for tensor in sized.values())
    _check_disk(folder, total)
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    split = split_state_dict_into_shards_factory(
        sized, get_storage_size=lambda tensor: tensor.nbytes, filename_pattern=PATTERN, max_shard_size=shard
    )
    by_name = {tensor.name: tensor for tensor in tensors}
    for number, (file, names) in enumerate(split.filename_to_tensors.items(), 1):
        say(f"  writing {number}/{len(split.filename_to_tensors)}")
        _write_shard(folder / file, [by_name[n] for n in names], stored, kinds)
    if split.is_sharded:
        index = {"metadata": {"total_size": total}, "weight_map": split.tensor_to_filename}
        write_json(folder / INDEX, index)
    _other_files(base, folder, dtype, untied, tokenizer)
    changed = sum(tensor.change is not None for tensor in tensors)
    say(f"  {len(tensors)} tensors, {changed} changed by {name}, {total:,} bytes in {dtype}")
    return {"bytes": total, "shards": len(split.filename_to_tensors), "changed": changed, "untied": untied}


def _write_shard(
    file: Path, tensors: list[fold.Tensor], stored: dict[str, Stored], kinds: dict[str, torch.dtype]
) -> None:
    held: dict[str, torch.Tensor] = {}
    for tensor in tensors:
        with safe_open(stored[tensor.source].file, framework="pt") as weights:  # opened anew: pages read are given back
            value = weights.get_tensor(tensor.source)
        if tensor.change is not None:
            value = tensor.change(value.float())
        value = value.to(kinds[tensor.name], copy=True).contiguous()
        if value.is_floating_point() and not torch.isfinite(value).all():
            raise ProofError(f"{tensor.name}: NaN or infinite as {kinds[tensor.name]}; choose --dtype float32")
        held[tensor.name] = value
    save_file(held, file, metadata={"format": "pt"})
    file.chmod(0o644)  # safetensors writes files that only their owner can read; a model is served by others


def _kind(tensor: fold.Tensor, stored: torch.dtype, dtype: str, wide: set[str]) -> torch.dtype:
    """Integers stay what they are, and so does what the architecture keeps in float32."""
    if not stored.is_floating_point:
        return stored
    return torch.float32 if wide & set(tensor.name.split(".")) else getattr(torch, dtype)


def _base_folder(saved: SavedRun) -> Path:
    """The base's checkpoint on disk, at the commit that was trained on.

    Raises:
        ModelError: not to be had, changed since the training, or without full-precision safetensors.
    """
    settings = saved.recipe.model
    folder = Path(settings.name_or_path)
    if not folder.is_dir():
        try:
            files = [*COMES_ALONG, "model*.safetensors"]
            folder = Path(snapshot_download(settings.name_or_path, revision=settings.revision, allow_patterns=files))
        except Exception as error:  # the client raises a dozen unrelated types; all of them mean that it is not there
            raise ModelError(f"no base {settings.name_or_path!r}: {first_line(error)}") from error
    elif "sha256" in saved.base and model.base_identity(saved.recipe) != saved.base:
        raise ModelError(f"{folder}: the base has changed since {saved.path} was trained on it; train again")
    if "quantization_config" in (read_json(folder / "config.json") or {}):
        raise ModelError(f"{folder}: its weights are stored quantized; serve the adapter on it as it is")
    return folder


def _stored(base: Path) -> dict[str, Stored]:
    """Name -> where a tensor lies; read from the files' headers."""
    index = read_json(base / INDEX)
    files = sorted({base / name for name in index["weight_map"].values()}) if index else [base / SINGLE]
    stored: dict[str, Stored] = {}
    for file in files:
        if not file.is_file():
            raise ModelError(
                f"{base}: no {file.name}; merge reads safetensors: save the base with save_pretrained first"
            )
        with safe_open(file, framework="pt") as weights:
            for name in weights.keys():  # noqa: SIM118 - not a mapping
                part = weights.get_slice(name)
                stored[name] = Stored(file, tuple(part.get_shape()), TYPES[part.get_dtype()])
    return stored


def _check_disk(folder: Path, needed: int) -> None:
    place = next(parent for parent in folder.absolute().parents if parent.is_dir())
    free = shutil.disk_usage(place).free
    if free < needed + SPARE:
        raise RunError(
            f"{folder.with_suffix('')}: {needed / 1e9:.1f} GB are needed and {free / 1e9:.1f} GB are free; "
            f"free some space, or choose another disk with --output"
        )


def _other_files(base: Path, folder: Path, dtype: str, untied: bool, tokenizer: Any) -> None:
    """The base's own files, the run's tokenizer and template over them, the type, and where an answer ends."""
    for file in sorted({f for pattern in COMES_ALONG for f in base.glob(pattern)}):
        if file.is_file() and not file.name.endswith(".index.json") and not file.name.startswith("adapter_"):
            shutil.copyfile(file, folder / file.name)
    tokenizer.save_pretrained(str(folder))
    config = dict(read_json(folder / "config.json") or {})
    for part in (config, config.get("text_config", {})):
        part.update({key: dtype for key in ("dtype", "torch_dtype") if key in part})
        part.update({"tie_word_embeddings": False} if untied else {})
    write_json(folder / "config.json", config | ({} if "torch_dtype" in config else {"dtype": dtype}))
    generation = dict(read_json(folder / "generation_config.json") or {"bos_token_id": config.get("bos_token_id")})
    ends = generation.get("eos_token_id", config.get("eos_token_id"))
    known = ends if isinstance(ends, list) else [] if ends is None else [ends]
    generation["eos_token_id"] = sorted({*known, *chat.stop_token_ids(tokenizer)})
    write_json(folder / "generation_config.json", generation)


def _compare(saved: SavedRun, adapter: Path, hardware: Hardware, folder: Path, *, dtype: str, rows: Any) -> Agreement:
    """Load one after the other, and measure.

    Raises:
        ProofError: the policy is not quantized, and the two differ by more than the rounding of their types.
    """
    batch, rows_from = rows
    policy: Any = PeftModel.from_pretrained(model.load_base(saved.recipe, hardware), str(adapter))
    expected = agreement.log_probabilities(policy, batch)
    device = policy.device
    del policy
    release()
    trust = saved.recipe.model.trust_remote_code
    merged: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype), trust_remote_code=trust)
    try:
        logps = agreement.log_probabilities(merged.to(device), batch)
    except torch.OutOfMemoryError:  # what was trained in 4 bits need not fit the device in 16
        merged.to("cpu")
        release()
        logps = agreement.log_probabilities(merged, batch)
    found = agreement.compare(expected, logps, rows_from)
    say(f"  {found}")
    coarser = next((d for d in ("bfloat16", "float16") if d in (dtype, model_dtype(saved.recipe, hardware))), "float32")
    if not quantization(saved.recipe) and not found.kl <= OTHER_PATH[coarser]:
        raise ProofError(
            f"the merged model differs from the policy by {found.kl:.3g} nats per token, at most "
            f"{OTHER_PATH[coarser]:.0e} expected in {coarser}; it was not kept"
        )
    return found
