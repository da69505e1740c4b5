"""Runs of the command line as forked children of one process that has imported everything, killed where a test says."""

import io
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any


class Forks:
    """One process that forks; each run costs its own work and no import."""

    def __init__(self) -> None:
        command = [sys.executable, __file__]
        env = os.environ | {"PYTHONPATH": str(Path(__file__).parent.parent)}
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=env)

    def run(self, *arguments: str, kill_at: tuple[str, str] | None = None, **env: str) -> tuple[int, str]:
        """Run `toolkit ARGUMENTS`.

        Args:
            kill_at: SIGKILL to itself: `("print", line)`, when a line that starts so is printed; else at the first
                audit event of this name one of whose paths ends so, which is before what it announces happens.
            env: Environment variables.

        Returns:
            Exit code, -9 where it was killed, and what it printed.
        """
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write(json.dumps([arguments, kill_at, env]) + "\n")
        self.process.stdin.flush()
        code, said = json.loads(self.process.stdout.readline())
        return code, said

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()


class Printed(io.TextIOWrapper):
    """Standard output that kills its process after a line."""

    fatal = ""

    def write(self, text: str) -> int:
        written = super().write(text)
        if self.fatal and text.strip().startswith(self.fatal):
            self.flush()
            os.kill(os.getpid(), signal.SIGKILL)
        return written


def serve() -> None:
    import tempfile

    import toolkit.run
    from toolkit.cli import main

    assert toolkit.run
    for order in sys.stdin:
        arguments, kill_at, env = json.loads(order)
        with tempfile.TemporaryFile("w+") as log:
            child = os.fork()
            if child == 0:
                os.environ.update(env)
                work(main, arguments, kill_at, log.fileno())
            _, status = os.waitpid(child, 0)
            log.seek(0)
            print(json.dumps([os.waitstatus_to_exitcode(status), log.read()]), flush=True)


def work(main: Any, arguments: list[str], kill_at: list[str] | None, log: int) -> None:
    import traceback

    os.dup2(log, 1)
    os.dup2(log, 2)
    sys.stdout = Printed(io.FileIO(1, "w", closefd=False), write_through=True)
    if kill_at is not None and kill_at[0] == "print":
        sys.stdout.fatal = kill_at[1]
    elif kill_at is not None:
        sys.addaudithook(lambda event, args: fell(event, args, *kill_at))
    code = 1
    try:
        code = main(arguments)
    except BaseException:
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def fell(event: str, args: Any, fatal: str, path: str) -> None:
    if event == fatal and any(isinstance(arg, str | Path) and str(arg).endswith(path) for arg in args):
        if event == "open" and args[1] == "r":
            return
        os.kill(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":
    serve()
