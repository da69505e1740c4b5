"""Checkpoints that are whole or not there: written under a temporary name, synced, renamed, checked when they are read.

A checkpoint holds the adapter in training, optimizer, scheduler and RNG states, and the place in the data
(`trainer_state.json`): never the base, nor another adapter. `manifest.json`, written last, has the size and SHA-256 of
every file.
"""

import hashlib
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

from toolkit.launching.processes import from_main
from toolkit.models import sharding
from toolkit.models.adapter import TRAINED
from toolkit.records.rundir import read_json, sync, sync_tree, write_json
from toolkit.training.progress import say

FOLDER, PREFIX, MANIFEST = "checkpoints", "checkpoint-", "manifest.json"
PARTIAL, REMOVED = ".partial", ".removed-"


class WholeCheckpoints:
    """In front of a transformers `Trainer`: writes its checkpoints as this module describes.

    transformers 5.23 writes `checkpoint-N` in place, with the tokenizer, the arguments as a pickle and PEFT's other
    adapters, and deletes older ones unread. What is overridden has no public counterpart, but for
    `create_model_card`. Remove when transformers writes a checkpoint under another name first.
    """

    args: Any
    state: Any
    model: Any
    accelerator: Any
    is_deepspeed_enabled: bool

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        folder, name = Path(self.args.output_dir), f"{PREFIX}{self.state.global_step}"
        partial, whole, limit = folder / PARTIAL, folder / name, self.args.save_total_limit
        if self.args.should_save:
            shutil.rmtree(partial, ignore_errors=True)
        self.accelerator.wait_for_everyone()
        with _set(self.args, output_dir=str(partial), save_total_limit=None):
            super()._save_checkpoint(model, trial)  # type: ignore[misc]
        self.state.best_model_checkpoint = self._best(folder)
        self.accelerator.wait_for_everyone()  # every process has written its RNG state
        if self.args.should_save:
            self.state.save_to_json(str(partial / name / "trainer_state.json"))
            seal(partial / name, self.args.world_size)
            take_in(partial / name, whole)
            rotate(whole, limit, self.state.best_model_checkpoint)
        self.accelerator.wait_for_everyone()

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """A checkpoint has none, the run has its own; to link to it, TRL's imports every tracker that is installed."""

    def _best(self, folder: Path) -> str | None:
        """The best checkpoint so far, on every process: transformers looks before a sharded one has its folder."""
        step = self.state.best_global_step
        path = folder / f"{PREFIX}{step}"
        there = bool(step) and (step == self.state.global_step or path.is_dir())
        return from_main(str(path) if there else None)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        with sharding.trained_only(self.model) if self.is_deepspeed_enabled else nullcontext():
            super()._save_optimizer_and_scheduler(output_dir)  # type: ignore[misc]

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        if self.args.should_save:
            trained = self.accelerator.unwrap_model(self.model)
            only = {"selected_adapters": [TRAINED], "save_embedding_layers": False}
            trained.save_pretrained(output_dir, state_dict=state_dict, **only)
            (Path(str(output_dir)) / "README.md").unlink(missing_ok=True)  # PEFT's empty card


def seal(checkpoint: Path, processes: int) -> None:
    """Sync a checkpoint's files, and write `manifest.json` over them."""
    (checkpoint / MANIFEST).unlink(missing_ok=True)
    sync_tree(checkpoint)
    files = {str(path.relative_to(checkpoint)): path for path in sorted(checkpoint.rglob("*")) if path.is_file()}
    about = {name: {"bytes": path.stat().st_size, "sha256": _sha256(path)} for name, path in files.items()}
    write_json(checkpoint / MANIFEST, {"processes": processes, "files": about})


def take_in(partial: Path, whole: Path) -> None:
    """Give a sealed checkpoint its name. One of that name that is good already stays; a damaged one makes way."""
    if whole.exists() and problem_with(whole) is None:
        shutil.rmtree(partial.parent)
        return
    if whole.exists():
        remove(whole)
    partial.rename(whole)
    sync(whole.parent)
    shutil.rmtree(partial.parent)


def rotate(newest: Path, limit: int | None, best: str | None) -> None:
    """Delete the oldest checkpoints beyond `limit`, once the newest is known to be good; never the best one."""
    for leftover in newest.parent.glob(f"{REMOVED}*"):
        shutil.rmtree(leftover)
    if not limit or limit < 0:
        return
    if (problem := problem_with(newest)) is not None:
        say(f"  {newest.name}: {problem}; older checkpoints are kept")
        return
    kept = {newest.name, *([Path(best).name] if best else [])}
    found = by_age(newest.parent)
    spare = [path for path in found if path.name not in kept]
    for path in spare[: max(len(found) - max(limit, len(kept)), 0)]:
        remove(path)


def newest(folder: Path) -> tuple[Path | None, list[str]]:
    """The newest checkpoint that is whole and readable, and one line for each newer one that is not."""
    damaged: list[str] = []
    for path in reversed(by_age(folder)):
        problem = problem_with(path)
        if problem is None:
            return path, damaged
        damaged.append(f"{path.name} is passed over: {problem}")
    return None, damaged


def by_age(folder: Path) -> list[Path]:
    """Every checkpoint in a folder, good or not, the oldest first."""
    found = [path for path in folder.glob(f"{PREFIX}*") if path.name.removeprefix(PREFIX).isdigit()]
    return sorted(found, key=lambda path: int(path.name.removeprefix(PREFIX)))


def problem_with(checkpoint: Path) -> str | None:
    """Why a checkpoint cannot be resumed from: a file that is missing, cut off, changed or unreadable."""
    manifest = read_json(checkpoint / MANIFEST) or {}
    files, processes = manifest.get("files"), manifest.get("processes")
    if not isinstance(files, dict) or not isinstance(processes, int):
        return f"no whole {MANIFEST}, so it was not written to its end"
    states = ["rng_state.pth"] if processes == 1 else [f"rng_state_{rank}.pth" for rank in range(processes)]
    for name in [*files, *states, "trainer_state.json"]:
        if name not in files:
            return f"{name} was not written"
        try:
            size, expected = (checkpoint / name).stat().st_size, files[name]
            if size != expected["bytes"]:
                return f"{name} has {size:,} bytes of {expected['bytes']:,}"
            if _sha256(checkpoint / name) != expected["sha256"]:
                return f"{name} is not what was written (SHA-256)"
        except FileNotFoundError:
            return f"{name} is missing"
        except OSError as error:
            return f"{name} cannot be read: {error.strerror}"
        except (KeyError, TypeError):
            return f"{MANIFEST} is damaged"
    return None


def remove(checkpoint: Path) -> None:
    """Delete a checkpoint so that no half of it is ever found under its name."""
    gone = checkpoint.with_name(f"{REMOVED}{checkpoint.name}")
    shutil.rmtree(gone, ignore_errors=True)
    checkpoint.rename(gone)
    shutil.rmtree(gone)


def _sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


@contextmanager
def _set(target: Any, **values: Any) -> Iterator[None]:
    before = {name: getattr(target, name) for name in values}
    for name, value in values.items():
        setattr(target, name, value)
    try:
        yield
    finally:
        for name, value in before.items():
            setattr(target, name, value)
