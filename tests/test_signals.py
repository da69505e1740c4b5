"""The command that resumes, and a second Ctrl-C."""

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import Any

import pytest

from toolkit.launching import signals


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["python3", "-m", "toolkit", "train", "a b.yaml"], "python3 -m toolkit train 'a b.yaml'"),
        (["/venv/bin/python", "/venv/bin/toolkit", "train", "r.yaml", "--fresh"], "toolkit train r.yaml"),
        (["/venv/bin/python", "/venv/bin/accelerate", "launch", "-m", "toolkit"], "accelerate launch -m toolkit"),
        (["toolkit", "train", "r.yaml", "--set", "a=$x"], "toolkit train r.yaml --set 'a=$x'"),
    ],
)
def test_the_command_that_resumes_is_quoted_and_not_fresh(words: list[str], expected: str) -> None:
    assert signals.resume_command(words) == expected


@pytest.fixture(autouse=True)
def listening() -> Iterator[None]:
    """A job in the background ignores SIGINT, and the tests may be one."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_the_second_ctrl_c_leaves_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    with signals.noted() as note:
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGINT)  # within a second: the same one, passed on by a launcher
        assert note.signum == signal.SIGTERM
        monkeypatch.setattr(signals, "SECOND", 0.0)
        with pytest.raises(signals.Stopped, match="stopped by SIGINT"):
            os.kill(os.getpid(), signal.SIGINT)


def test_outside_a_step_a_signal_leaves_at_once() -> None:
    with pytest.raises(signals.Stopped) as stopped, signals.raised():
        os.kill(os.getpid(), signal.SIGTERM)
    assert stopped.value.exit_code == 75


STOPPED_AS_ONE_OF_TWO = """
import atexit, os, signal, sys
atexit.register(os.abort)  # as gloo's threads do where the interpreter ends before they do
told = []
def tell(event, args):
    if event == "open" and str(args[0]).endswith("recipe.yaml") and not told:
        told.append(event)
        signal.raise_signal(signal.SIGTERM)
sys.addaudithook(tell)
from toolkit.cli import main
sys.exit(main(["train", "recipe.yaml"]))
"""


def test_one_of_several_that_is_stopped_leaves_without_its_interpreters_end() -> None:
    two = {"WORLD_SIZE": "2", "RANK": "1"}
    command = [sys.executable, "-c", STOPPED_AS_ONE_OF_TWO]
    assert subprocess.run(command, env=os.environ | two, check=False, timeout=60).returncode == 75


def double(work: Any) -> None:
    """A data loader's worker, with PyTorch's handlers; it answers when every signal sent before was taken."""
    from torch.utils.data._utils.signal_handling import _set_worker_signal_handlers

    _set_worker_signal_handlers()
    while True:
        number = work.recv()
        while signal.sigpending():  # one that waits swallows the next one, its parent's perhaps
            time.sleep(0)
        work.send(2 * number)


def test_a_worker_forked_in_a_step_ends_at_its_parents_sigterm_only() -> None:
    ours, theirs = multiprocessing.get_context("fork").Pipe()
    with signals.noted():
        worker = multiprocessing.get_context("fork").Process(target=double, args=(theirs,), daemon=True)
        worker.start()
    theirs.close()
    try:
        for number in (1, 2):
            ours.send(number)
            assert ours.recv() == 2 * number
            subprocess.run(["kill", "-TERM", str(worker.pid)], check=True)  # as a queue does, to every process of a job
        ours.send(3)
        assert ours.recv() == 6
        worker.terminate()
        worker.join(10)
        assert worker.exitcode == 0
    finally:
        worker.kill()
