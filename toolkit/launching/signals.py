"""SIGTERM and SIGINT: what a queue that preempts, and Ctrl-C, ask of a run; and the command that resumes it.

Outside a training loop both leave at once, as `Stopped`. Inside one they are noted: the step is finished, a
checkpoint is written, and then the run leaves.
"""

import os
import shlex
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

EXIT_CODES = {signal.SIGTERM: 75, signal.SIGINT: 130}  # 75 is EX_TEMPFAIL of sysexits.h: try again
SECOND = 1.0  # seconds after which a Ctrl-C is another one: a launcher passes on the one that the terminal sent already


class Stopped(KeyboardInterrupt):
    """A signal ended the run. A `KeyboardInterrupt`, so that libraries clean up after it as they do after Ctrl-C.

    Args:
        signum: the signal.
        kept: what was done by then, and where it lies.
    """

    def __init__(self, signum: int, kept: str = "") -> None:
        self.signum = signal.Signals(signum)
        self.exit_code = EXIT_CODES.get(self.signum, 128 + signum)
        super().__init__(f"stopped by {self.signum.name}" + (f" {kept}" if kept else ""))


@dataclass
class Note:
    """The signal that came in while a step was being finished; 0 for none."""

    signum: int = 0
    at: float = 0.0


@contextmanager
def raised() -> Iterator[None]:
    """Within, a signal leaves at once.

    Raises:
        Stopped
    """

    def leave(signum: int, frame: Any) -> None:
        raise Stopped(signum)

    with _handled(leave):
        yield


@contextmanager
def noted() -> Iterator[Note]:
    """Within, the first signal is noted, for the code to end at a good place; a second Ctrl-C leaves at once.

    Raises:
        Stopped: at the second Ctrl-C.
    """
    note = Note()

    def take_note(signum: int, frame: Any) -> None:
        if not note.signum:
            note.signum, note.at = signum, time.monotonic()
            if os.environ.get("RANK", "0") == "0":  # not print, which must not be entered twice
                text = f"\n{signal.Signals(signum).name}: the step is finished, then a checkpoint is written; "
                os.write(2, (text + "Ctrl-C leaves at once\n").encode())
        elif signum == signal.SIGINT and time.monotonic() - note.at > SECOND:
            raise Stopped(signum)

    with _handled(take_note), _spared_workers():
        yield note


def resume_command(argv: Sequence[str] | None = None) -> str:
    """The command that resumes this process's run, quoted for a shell.

    `--fresh` is left out: it would start the run again. A process that a launcher started is not resumed by its own
    command line but by the launcher's.
    """
    words = list(sys.orig_argv if argv is None else argv)
    if argv is None and "LOCAL_RANK" in os.environ:
        words = _launcher() or words
    if Path(words[0]).name.startswith("python") and len(words) > 1 and not words[1].startswith("-"):
        words = [Path(words[1]).name, *words[2:]]  # a script of this environment, such as `toolkit`
    elif Path(words[0]).is_absolute() and "/bin/" in words[0]:
        words[0] = Path(words[0]).name
    return shlex.join(word for word in words if not (len(word) > 2 and "--fresh".startswith(word)))


def _launcher() -> list[str]:
    try:
        words = Path(f"/proc/{os.getppid()}/cmdline").read_text(encoding="utf-8").split("\0")[:-1]
    except OSError:
        return []
    starts = any(Path(word).name in ("accelerate", "torchrun") or word.startswith("--launch") for word in words)
    return words if starts else []


_sparing: list[bool] = []  # not empty: processes that are forked take SIGTERM from their parent only


@contextmanager
def _spared_workers() -> Iterator[None]:
    """Within, processes are forked that end at their parent's SIGTERM and at nobody else's.

    A queue sends it to every process of a job, and the step cannot be finished without its data loader's workers.
    PyTorch's own handler makes the same distinction and dies of the others', so the signal does not get so far.
    """
    _sparing.append(True)
    try:
        yield
    finally:
        _sparing.pop()


def _spare() -> None:
    if _sparing and hasattr(signal, "sigwaitinfo"):  # macOS has none, and starts its workers without a fork
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=_end_with_parent, args=(os.getppid(),), daemon=True).start()


def _end_with_parent(parent: int) -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != parent:
        pass
    os._exit(0)


os.register_at_fork(after_in_child=_spare)


@contextmanager
def _handled(handler: Callable[[int, Any], None]) -> Iterator[None]:
    """Python delivers signals to the main thread only, and lets no other one ask for them."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {signum: signal.getsignal(signum) for signum in EXIT_CODES}
    for signum, old in before.items():
        if old is not signal.SIG_IGN:  # `nohup`, or a job in the background, asked for that
            signal.signal(signum, handler)
    try:
        yield
    finally:
        for signum, old in before.items():
            signal.signal(signum, old)
