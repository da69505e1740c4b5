"""The command that resumes, and a second Ctrl-C."""

import os
import signal
from collections.abc import Iterator

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
