"""Runs of the command line as forked children of one process that has imported everything, killed where a test says."""

import contextlib
import io
import json
import os
import resource
import signal
import subprocess
import sys
import traceback
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

MOUNTED = 'mount -t tmpfs -o size=32m none "$0" && exec "$@"'


class Forks:
    """One process that forks; each run costs its own work and no import.

    Args:
        folder: Becomes a small disk of its own, for these runs only, where this system lets a user mount one.
    """

    def __init__(self, folder: Path) -> None:
        apart = ["unshare", "-rm", "sh", "-c", MOUNTED, str(folder)]
        try:
            may = subprocess.run([*apart, "true"], check=False, capture_output=True).returncode == 0
        except FileNotFoundError:
            may = False
        command = [*(apart if may else []), sys.executable, __file__]
        env = os.environ | {"PYTHONPATH": str(Path(__file__).parent.parent)}
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=env)
        self.disk = folder if may else None
        self.seen = Path(f"/proc/{self.process.pid}/root{folder}")
        """The disk's content, as it is seen from here."""

    def run(self, *arguments: str, at: tuple[str, str] = ("", ""), then: str = "kill", **env: str) -> tuple[int, str]:
        """Run `toolkit ARGUMENTS`, and let something befall it.

        Args:
            at: `("print", line)`, when a line that starts so is printed; else the first audit event of this name one of
                whose paths ends so, which is before what it announces happens.
            then: `kill`: SIGKILL. `fill`: the disk is full from there on. `open`: no further file can be opened.
                `memory`: 16 MB are left. `cut`: files of `datasets` that are mapped are cut off.
            env: Environment variables.

        Returns:
            Exit code, -9 where it was killed, and what it printed.
        """
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write(json.dumps([arguments, at, then, str(self.disk), env]) + "\n")
        self.process.stdin.flush()
        code, said = json.loads(self.process.stdout.readline())
        return code, said

    def close(self) -> None:
        with self.process:
            self.process.kill()


class Printed(io.TextIOWrapper):
    """Standard output that calls back after a line."""

    line, then = "", staticmethod(lambda: None)

    def write(self, text: str) -> int:
        written = super().write(text)
        if self.line and text.strip().startswith(self.line):
            self.flush()
            self.then()
        return written


def serve() -> None:
    import tempfile

    import toolkit.run
    from toolkit.cli import main

    assert toolkit.run
    for order in sys.stdin:
        arguments, at, then, disk, env = json.loads(order)
        with tempfile.TemporaryFile("w+") as log:
            child = os.fork()
            if child == 0:
                os.environ.update(env)
                for standard in (1, 2):
                    os.dup2(log.fileno(), standard)
                fates = {"kill": kill, "fill": partial(fill, disk), "open": open_no_more, "memory": take_memory}
                listen(*at, (fates | {"cut": cut_rows})[then])
                work(main, arguments)
            _, status = os.waitpid(child, 0)
            log.seek(0)
            print(json.dumps([os.waitstatus_to_exitcode(status), log.read()]), flush=True)


def listen(event: str, at: str, then: Callable[[], None]) -> None:
    sys.stdout = Printed(io.FileIO(1, "w", closefd=False), write_through=True)
    if event == "print":
        sys.stdout.line, sys.stdout.then = at, then
    elif event:
        waiting = [then]
        sys.addaudithook(lambda e, args: waiting.pop()() if waiting and e == event and names(args, at) else None)


def names(args: Any, at: str) -> bool:
    reads = len(args) > 1 and args[1] in ("r", "rb")
    return not reads and any(isinstance(arg, str | Path) and str(arg).endswith(at) for arg in args)


def work(main: Callable[[list[str]], int], arguments: list[str]) -> None:
    code = 1
    try:
        code = main(arguments)
    except BaseException:
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def fill(disk: str) -> None:
    with Path(disk, "ballast").open("wb", buffering=0) as ballast, contextlib.suppress(OSError):
        while True:
            ballast.write(b"x" * 4096)


def open_no_more() -> None:
    resource.setrlimit(resource.RLIMIT_NOFILE, (3, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))


def cut_rows() -> None:
    maps = Path("/proc/self/maps").read_text().splitlines()
    mapped = {Path(line.split(maxsplit=5)[5]) for line in maps if line.endswith(".arrow")}
    for file in mapped:
        os.truncate(file, 16)
        file.unlink()  # other runs find no cut file
    print(f"cut off: {len(mapped)}")


def take_memory() -> None:
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + 16 * 2**20, resource.getrlimit(resource.RLIMIT_AS)[1]))


if __name__ == "__main__":
    serve()
