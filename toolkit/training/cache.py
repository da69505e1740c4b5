"""Reference log-probabilities on disk, under a key of what they mean.

The key holds what the numbers depend on: base weights, quantization, dtype, the adapter the stage starts from, token
ids, truncation. Not seed, rank, alpha, learning rate, beta or epochs: a sweep over those computes them once. (TRL's own
cache hashes the whole model with its random LoRA matrices, so that every new seed or rank is a miss.)
"""

import contextlib
import hashlib
import json
import os
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch
from datasets import Dataset
from safetensors.torch import load, save

from toolkit.job import StageJob
from toolkit.models import adapter
from toolkit.recipe.plan import digest, model_dtype, quantization
from toolkit.rows.data import content_digest
from toolkit.wording import first_line

VERSION = "1"
NAMES = ("ref_chosen_logps", "ref_rejected_logps")
ROWS = "rows"

Pairs = dict[int, list[float]]
"""Row -> reference log-probabilities of its chosen and its rejected answer, in nats."""


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
    tensors, unusable = _read(folder() / f"{entry_key}.safetensors", entry_key, NAMES)
    if tensors and any(tensor.shape != (rows,) for tensor in tensors.values()):
        return None, f"{entry_key}.safetensors: has other rows"
    return Entry(**tensors) if tensors else None, unusable


def write(entry_key: str, entry: Entry) -> str:
    """Store an entry, whole or not at all; two writers of one key leave one of their equal files.

    Returns:
        Why it could not be stored, or nothing: a run goes on without its cache.
    """
    return _write(folder() / f"{entry_key}.safetensors", entry_key, {name: getattr(entry, name) for name in NAMES})


def read_parts(entry_key: str, rows: int) -> tuple[Pairs, list[str]]:
    """What interrupted passes over these rows had computed, and a line for each file of theirs that is unusable."""
    found: Pairs = {}
    said = []
    for file in sorted(folder().glob(_part(entry_key, "*"))):
        tensors, unusable = _read(file, entry_key, (ROWS, *NAMES))
        if tensors and not _fits(tensors, rows):
            unusable = f"{file.name}: has other rows"
        if unusable:
            said.append(unusable)
        elif tensors:
            found |= {row: pair for row, *pair in zip(*(tensor.tolist() for tensor in tensors.values()), strict=True)}
    return found, said


def write_part(entry_key: str, process: int, known: Pairs) -> None:
    """Store what one process knows of an unfinished pass, in place of what it stored before; best effort."""
    order = sorted(known)
    table = torch.tensor([known[row] for row in order], dtype=torch.float32)
    tensors = {ROWS: torch.tensor(order), NAMES[0]: table[:, 0], NAMES[1]: table[:, 1]}
    _write(folder() / _part(entry_key, process), entry_key, tensors)


def remove_parts(entry_key: str) -> None:
    """Delete what unfinished passes left behind, once the whole entry is stored."""
    for file in folder().glob(_part(entry_key, "*")):
        with contextlib.suppress(OSError):
            file.unlink()


def _fits(tensors: dict[str, torch.Tensor], rows: int) -> bool:
    numbers = tensors[ROWS]
    one_each = all(tensor.shape == (numbers.numel(),) for tensor in tensors.values())
    return numbers.dtype == torch.int64 and one_each and bool(((numbers >= 0) & (numbers < rows)).all())


def _part(entry_key: str, process: int | str) -> str:
    return f".{entry_key}.{process}.part"


def _read(file: Path, entry_key: str, names: tuple[str, ...]) -> tuple[dict[str, torch.Tensor], str]:
    """The tensors of a file, or none and why it cannot be used."""
    try:
        content = file.read_bytes()  # not mapped: a file that is cut while it is mapped kills its reader
        tensors = load(content)
        about = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")]).get("__metadata__", {})
        tensors = {name: tensors[name] for name in names}
    except (FileNotFoundError, NotADirectoryError):
        return {}, ""
    except Exception as error:  # safetensors raises its own type for each kind of damage; all mean: recompute
        return {}, f"{file.name}: damaged ({first_line(error)})"
    if about.get("version") != VERSION:
        return {}, f"{file.name}: written by another version ({about.get('version', 'none')})"
    if about.get("key") != entry_key or about.get("sha256") != _checksum(tensors):
        return {}, f"{file.name}: does not hold what it was written with"
    if not all(torch.isfinite(tensor).all() for tensor in tensors.values()):
        return {}, f"{file.name}: has values that are not finite"
    return tensors, ""


def _write(file: Path, entry_key: str, tensors: dict[str, torch.Tensor]) -> str:
    tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
    about = {"version": VERSION, "key": entry_key, "sha256": _checksum(tensors)}
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=file.parent, prefix=".") as partial:
            written = Path(partial) / file.name
            with written.open("wb") as stream:
                stream.write(save(tensors, metadata=about))
                stream.flush()
                os.fsync(stream.fileno())
            written.replace(file)
    except OSError as error:
        return f"{file.parent} cannot be written ({error.strerror or error})"
    return ""


def _checksum(tensors: dict[str, torch.Tensor]) -> str:
    sha = hashlib.sha256(json.dumps({name: list(tensor.shape) for name, tensor in tensors.items()}).encode())
    for tensor in tensors.values():
        sha.update(tensor.numpy().tobytes())
    return sha.hexdigest()
