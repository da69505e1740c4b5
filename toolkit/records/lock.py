"""One run to a directory: a lock that the system lets go of however its holder ends, or failing that, a beating heart.

`flock` is kept by the system, on one host and, where NFS has locks, across hosts. Some cluster file systems are mounted
without it (Lustre by default). There the lock file itself is the lock: the holder writes its name into it and touches
it every few seconds; a file that is no longer touched is stale.
"""

import contextlib
import fcntl
import os
import socket
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

from toolkit.errors import RunError

HEARTBEAT = 10.0  # seconds
STALE = 6 * HEARTBEAT
_held: set[TextIO] = set()


@contextmanager
def held(file: Path) -> Iterator[None]:
    """Hold the lock that is this file; a crashed holder's is taken over.

    Raises:
        RunError: another process holds it, named by its number and host.
        OSError: the file cannot be written.
    """
    with file.open("a+", encoding="utf-8") as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise _refusal(file, stream) from None
        except OSError:  # no locks on this file system
            with beating(file):
                yield
            return
        _name(stream)
        _held.add(stream)
        try:
            yield
        finally:
            _held.discard(stream)


@contextmanager
def beating(file: Path, heartbeat: float = HEARTBEAT) -> Iterator[None]:
    """The same where the file system has no locks: hold the file as long as it is being touched."""
    with file.open("a+", encoding="utf-8") as stream:
        stream.seek(0)
        if stream.read() and _age(file) < STALE:
            raise _refusal(file, stream)
        _name(stream)
    done = threading.Event()

    def beat() -> None:
        while not done.wait(heartbeat):
            with contextlib.suppress(OSError):
                os.utime(file)

    thread = threading.Thread(target=beat, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
        with contextlib.suppress(OSError):
            os.truncate(file, 0)


def _name(stream: TextIO) -> None:
    stream.truncate(0)
    stream.write(f"process {os.getpid()} on {socket.gethostname()}")
    stream.flush()
    os.utime(stream.fileno())


def _refusal(file: Path, stream: TextIO) -> RunError:
    stream.seek(0)
    holder = stream.read().strip() or "another process"
    return RunError(f"{file.parent}: {holder} is at work here; wait for it, or choose another --output")


def _age(file: Path) -> float:
    """Seconds since the file was touched, by the clock of the machine that keeps it."""
    with tempfile.NamedTemporaryFile(dir=file.parent, prefix=".clock-") as now:
        return Path(now.name).stat().st_mtime - file.stat().st_mtime


def _let_go() -> None:
    """A forked worker shares its parent's lock, and would keep it when the parent is killed."""
    while _held:
        _held.pop().close()


os.register_at_fork(after_in_child=_let_go)
