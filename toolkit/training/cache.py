"""Reference log-probabilities on disk, under a key of what they mean.

The key holds what the numbers depend on: base weights, quantization, dtype, the adapter the stage starts from, token
ids, truncation. Not seed, rank, alpha, learning rate, beta or epochs: a sweep over those computes them once. (TRL's own
cache hashes the whole model with its random LoRA matrices, so that every new seed or rank is a miss.)
"""

import hashlib
import json
import os
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from safetensors import safe_open
from safetensors.torch import save

from toolkit.job import StageJob
from toolkit.models import adapter
from toolkit.recipe.plan import digest, model_dtype, quantization
from toolkit.rows.data import content_digest
from toolkit.wording import first_line

VERSION = "1"
NAMES = ("ref_chosen_logps", "ref_rejected_logps")


@dataclass(frozen=True)
class Entry:
    """Reference log-probabilities of a data set, in nats, in the order of its rows; each `(rows,)`, float32."""

    ref_chosen_logps: torch.Tensor
    ref_rejected_logps: torch.Tensor


def folder() -> Path:
    """`$TOOLKIT_CACHE/reference`; by default in the user's cache folder. Runs and ranks may share it."""
    default = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "trl-lora-toolkit"
    return Path(os.environ.get("TOOLKIT_CACHE", default)) / "reference"


def key(job: StageJob, rows: Dataset) -> str:
    """Digest of everything that reference log-probabilities of these rows depend on."""
    return digest(
        {
            "base": job.base,
            "quantization": quantization(job.recipe),
            "dtype": model_dtype(job.recipe, job.hardware),
            "autocast": [name for name in ("bf16", "fp16") if job.plan.trainer.get(name)],
            "start": adapter.adapter_digest(job.start) if job.start else None,
            "rows": content_digest(rows.select_columns(["prompt_ids", "chosen_ids", "rejected_ids"])),
            "max_length": job.plan.max_length,
            "ld_alpha": job.plan.trainer.get("ld_alpha"),
        }
    )


def read(entry_key: str, rows: int) -> tuple[Entry | None, str]:
    """The entry under a key, or `None` and why it cannot be used: nothing there, damaged, of another version."""
    file = folder() / f"{entry_key}.safetensors"
    if not file.is_file():
        return None, ""
    try:
        with safe_open(file, framework="pt") as stored:
            about = stored.metadata() or {}
            tensors = {name: stored.get_tensor(name) for name in NAMES}
    except Exception as error:  # safetensors raises its own type for each kind of damage; all mean: recompute
        return None, f"{file.name}: damaged ({first_line(error)})"
    if about.get("version") != VERSION:
        return None, f"{file.name}: written by another version ({about.get('version', 'none')})"
    if about.get("key") != entry_key or about.get("sha256") != _checksum(tensors):
        return None, f"{file.name}: does not hold what it was written with"
    if any(tensor.shape != (rows,) or not torch.isfinite(tensor).all() for tensor in tensors.values()):
        return None, f"{file.name}: has other rows, or values that are not finite"
    return Entry(**tensors), ""


def write(entry_key: str, entry: Entry) -> str:
    """Store an entry, whole or not at all; two writers of one key leave one of their equal files.

    Returns:
        Why it could not be stored, or nothing: a run goes on without its cache.
    """
    tensors = {name: getattr(entry, name).contiguous() for name in NAMES}
    about = {"version": VERSION, "key": entry_key, "sha256": _checksum(tensors)}
    try:
        folder().mkdir(parents=True, exist_ok=True)
        descriptor, partial = tempfile.mkstemp(dir=folder(), prefix=".", suffix=".partial")
        with os.fdopen(descriptor, "wb") as stream:
            stream.write(save(tensors, metadata=about))
            stream.flush()
            os.fsync(stream.fileno())
        Path(partial).replace(folder() / f"{entry_key}.safetensors")
    except OSError as error:
        return f"{folder()} cannot be written ({error.strerror or error})"
    return ""


def _checksum(tensors: dict[str, Any]) -> str:
    sha = hashlib.sha256(json.dumps({name: list(tensors[name].shape) for name in NAMES}).encode())
    for name in NAMES:
        sha.update(tensors[name].numpy().tobytes())
    return sha.hexdigest()
