"""The run directory: whose it is, which stages are finished, and writes that are whole or not there."""

import errno
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from toolkit.errors import RunError, ToolkitError
from toolkit.recipe.sections import Recipe
from toolkit.records import lock
from toolkit.wording import first_line

RESOLVED, RECIPE, EVALUATION, LOCK = "resolved.json", "recipe.yaml", "evaluation.json", ".lock"
CARD, METRICS, REPORT, PICTURES = "README.md", "metrics.jsonl", "report.html", "report"
FINDINGS, MERGED = "findings.json", "merge.json"
STAGE, STARTED, ADAPTER, PARTIAL = "stage.json", "started.json", "adapter", ".partial"
TORN = ("PytorchStreamWriter", "inline_container")
NO_MEMORY = ("out of memory", "can't allocate memory", "cannot allocate memory", "cublas_status_alloc_failed")


class RunDirectory:
    """One recipe's run. A stage is finished when its `stage.json` is there: it is written last, and atomically."""

    def __init__(self, path: Path):
        self.path = path

    def claim(self, recipe: Recipe) -> None:
        """Make the directory, or recognise it as this recipe's.

        Raises:
            RunError: it holds something else, or cannot be written.
        """
        if self.path.exists() and (not self.path.is_dir() or (self._holds_something() and not self._resolved())):
            raise RunError(f"{self.path}: is not a run directory; choose another with --output")
        held = (self._resolved() or {}).get("identity", identity(recipe))
        asked = identity(recipe)
        if held != asked:
            raise RunError(
                f"{self.path}: holds the run of {held['recipe']} on {held['base']}, this is {asked['recipe']} on "
                f"{asked['base']}; choose another directory with --output"
            )
        with storage(self.path):
            self.path.mkdir(parents=True, exist_ok=True)
        if not os.access(self.path, os.W_OK):
            raise RunError(f"{self.path}: cannot be written; choose another directory with --output")

    @contextmanager
    def held(self) -> Iterator[None]:
        """Keep other runs out of the directory; the system lets go of it however this process ends.

        Raises:
            RunError: another process is at work here, named by its host and number.
        """
        with ExitStack() as stack:
            with storage(self.path):
                stack.enter_context(lock.held(self.path / LOCK))
            yield

    def record(self, recipe: Recipe, resolved: dict[str, Any]) -> None:
        """Write what was asked for and what it resolved to."""
        if recipe.file.is_file():
            text = recipe.file.read_text(encoding="utf-8")
        else:  # a recipe made in Python
            text = yaml.safe_dump(recipe.model_dump(mode="json", by_alias=True), sort_keys=False)
        with storage(self.path):
            write_json(self.path / RESOLVED, {"identity": identity(recipe), **resolved})  # first: it says whose this is
            write_text(self.path / RECIPE, text)

    def recipe(self, trust_remote_code: bool = False) -> Recipe:
        """The recipe as it was run, overrides included.

        Args:
            trust_remote_code: Whoever asks trusts the code that comes with its base; a run may come from the Hub.

        Raises:
            RunError: this is no run directory, or one of another version, or its base has code that is not trusted.
        """
        resolved = self._resolved()
        try:
            recipe = Recipe.model_validate((resolved or {})["recipe"])
        except (KeyError, ValidationError):
            found = "was written by another version" if resolved else "is not a run directory"
            raise RunError(f"{self.path}: {found}; expected what `toolkit train` leaves behind") from None
        if recipe.model.trust_remote_code and not trust_remote_code:
            raise RunError(
                f"{self.path}: its base {recipe.model.name_or_path} comes with Python code of its own; read that code, "
                f"then allow it with --trust-remote-code"
            )
        recipe._file = self.path / RECIPE
        return recipe

    def folder(self, stage: str) -> Path:
        """Where a stage keeps its adapter, checkpoints, metrics."""
        return self.path / stage

    def adapter(self, stage: str) -> Path:
        """The adapter a stage ended with: a plain PEFT adapter on the original base."""
        return self.path / stage / ADAPTER

    def finished(self, stage: str) -> dict[str, Any] | None:
        """The stage's `stage.json`, or `None` where it has not finished."""
        return read_json(self.folder(stage) / STAGE)

    def started(self, stage: str, key: str) -> bool:
        """Whether an unfinished attempt under exactly this key lies there, to be resumed."""
        return self.finished(stage) is None and self.noted(stage).get("key") == key

    def begin(self, stage: str, key: str, resume: bool) -> Path:
        """The folder to train in: as an interrupted attempt left it, or empty, with an older result kept aside."""
        folder = self.folder(stage)
        with storage(self.path):
            if not resume:
                self.set_aside(stage)
            folder.mkdir(exist_ok=True)
            # copies of what the stages hold, or held, that would no longer belong to them
            shutil.rmtree(self.path / ADAPTER, ignore_errors=True)
            (self.path / EVALUATION).unlink(missing_ok=True)
            (self.path / CARD).unlink(missing_ok=True)
            if not resume:
                write_json(folder / STARTED, {"key": key})
        return folder

    def note(self, stage: str, **about: Any) -> None:
        """Keep something beside an unfinished attempt, for whoever resumes it."""
        with storage(self.path):
            write_json(self.folder(stage) / STARTED, self.noted(stage) | about)

    def noted(self, stage: str) -> dict[str, Any]:
        """What is kept beside an unfinished attempt: its key, and what was noted."""
        return read_json(self.folder(stage) / STARTED) or {}

    def set_aside(self, stage: str) -> None:
        """Move a finished stage to `STAGE.previous`, in place of what was there; remove an unfinished one."""
        folder, previous = self.folder(stage), self.path / f"{stage}.previous"
        if self.finished(stage) is not None:
            shutil.rmtree(previous, ignore_errors=True)
            folder.rename(previous)
        elif folder.exists():
            (folder / STARTED).unlink(missing_ok=True)  # first: what is left of it must not be resumed
            shutil.rmtree(folder)

    def finish(self, stage: str, adapter: Path, record: dict[str, Any]) -> None:
        """Take a verified adapter in, and mark the stage as finished."""
        with storage(self.path):
            target = self.adapter(stage)
            shutil.rmtree(target, ignore_errors=True)
            sync_tree(adapter)
            adapter.rename(target)
            write_json(self.folder(stage) / STAGE, record)
            (self.folder(stage) / STARTED).unlink(missing_ok=True)

    def deliver(self, stage: str) -> Path:
        """Make `adapter/` the one of the given stage, in one step."""
        target, partial = self.path / ADAPTER, self.path / f"{ADAPTER}{PARTIAL}"
        with storage(self.path):
            shutil.rmtree(partial, ignore_errors=True)
            shutil.copytree(self.adapter(stage), partial)
            sync_tree(partial)
            shutil.rmtree(target, ignore_errors=True)
            partial.rename(target)
            sync(self.path)
        return target

    def _holds_something(self) -> bool:
        return any(path.name != LOCK and not path.name.endswith(PARTIAL) for path in self.path.iterdir())

    def _resolved(self) -> dict[str, Any] | None:
        return read_json(self.path / RESOLVED)


def identity(recipe: Recipe) -> dict[str, str]:
    """Which experiment a run directory belongs to, wherever the repository lies."""
    base = Path(recipe.model.name_or_path)
    name = f"{recipe.file.resolve().parent.name}/{recipe.file.name}"
    return {"recipe": name, "base": base.name if base.is_absolute() else str(base)}


def default_output(recipe: Recipe) -> Path:
    """`recipes/quickstart/sft_dpo_lora.yaml` runs in `runs/quickstart-sft_dpo_lora`."""
    return Path("runs") / f"{recipe.file.resolve().parent.name}-{recipe.file.stem}"


def read_json(file: Path) -> dict[str, Any] | None:
    """The object in a file, or `None` where there is none, or not a whole one."""
    try:
        return dict(json.loads(file.read_text(encoding="utf-8")))
    except (FileNotFoundError, NotADirectoryError, json.JSONDecodeError):
        return None


def write_json(file: Path, value: dict[str, Any]) -> None:
    """Write an object; nulls are kept."""
    write_text(file, json.dumps(value, indent=2, default=str) + "\n")


def write_text(file: Path, text: str) -> None:
    """Write a file so that it is the old one or the new one at any moment."""
    partial = file.with_name(f".{file.name}{PARTIAL}")
    with partial.open("w", encoding="utf-8") as stream:
        stream.write(text)
        stream.flush()
        os.fsync(stream.fileno())
    partial.replace(file)
    sync(file.parent)


def sync(path: Path) -> None:
    """Have a file's content, or a folder's entries, on the disk before going on."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno != errno.EINVAL:  # some network file systems do not sync folders
            raise
    finally:
        os.close(descriptor)


def sync_tree(folder: Path) -> None:
    """`sync` of a folder and everything in it."""
    for path in (*folder.rglob("*"), folder):
        sync(path)


@contextmanager
def storage(path: Path) -> Iterator[None]:
    """Say a failed read or write in one sentence; other errors pass through.

    Raises:
        RunError: the disk is full or fails, the path cannot be written, too many files are open, or memory is out.
    """
    try:
        yield
    except ToolkitError:
        raise
    except Exception as error:
        text = _failure(error)
        if text is None:
            raise
        raise RunError(f"{path}: {text}") from error


def exhausted(error: BaseException) -> str | None:
    """What this machine ran out of, and the way out; `None` where it is another kind of error."""
    code, text = getattr(error, "errno", None), str(error)
    # torch and safetensors write in C++ and Rust, and report a full disk in words of their own
    if code in (errno.ENOSPC, errno.EDQUOT) or any(t in text for t in ("No space left", "Disk quota exceeded", *TORN)):
        return "the disk is full; free some space or choose another --output, then run the same command to resume"
    if code == errno.EFBIG or "File too large" in text:
        return "files may not grow this large here; raise `ulimit -f`, then run the same command to resume"
    if code in (errno.EMFILE, errno.ENFILE) or "Too many open files" in text or "ancdata" in text:
        return "too many open files; raise `ulimit -n` (65536 will do), then run the same command to resume"
    if code in (errno.EIO, errno.ESTALE):
        return f"the disk fails: {os.strerror(code)}; then run the same command to resume from what is whole"
    if out_of_memory(error):
        way_out = "free some, or take a smaller batch or a quantized base, then run the same command to resume"
        return f"out of memory: {first_line(error)}; {way_out}"
    return None


def out_of_memory(error: BaseException) -> bool:
    """Whether the device's or the machine's memory ran out, in the words of torch, CUDA, safetensors or the system."""
    return isinstance(error, MemoryError) or any(words in str(error).lower() for words in NO_MEMORY)


def _failure(error: Exception) -> str | None:
    code = getattr(error, "errno", None)
    if (text := exhausted(error)) is not None:
        return text
    if code in (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST, errno.ENOENT):
        return f"cannot be written: {os.strerror(code)}; choose another directory with --output"
    return None
