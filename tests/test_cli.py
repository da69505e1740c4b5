"""The command as a user meets it: on a pipe, on a terminal, under accelerate."""

import os
import pty
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from toolkit.cli import main


@pytest.fixture
def file(recipe: dict[str, Any], write: Any) -> Path:
    return write(recipe)


def test_help_and_version(capsys: pytest.CaptureFixture[str]) -> None:
    for flag, expected in (("--help", "run the stages of a recipe"), ("--version", "0.1.0")):
        with pytest.raises(SystemExit, match="0"):
            main([flag])
        assert expected in capsys.readouterr().out


def test_on_a_pipe_the_plan_then_plain_lines(file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", str(file), "--output", str(tmp_path / "run"), "--set", "stages.dpo.trainer.beta=0.2"]) == 0
    said = capsys.readouterr().out
    plan, _, progress = said.partition("sft: sft\n")
    assert plan.startswith("base       base0 (float32, on cpu, 1 process, seed 7)\n")
    for line in (
        "  policy     base + sft adapter (frozen) + new adapter",
        "  reference  base + sft adapter (the new adapter disabled); proven before the first step",
        "  training   3 optimizer steps, 1 epoch, effective batch 4, learning rate 0.01, beta 0.2",
    ):
        assert line in plan.splitlines()
    assert re.search(r"^  sft 1/3  loss [\d.]+  token accuracy [\d.e-]+  tokens/s [\d,]+  0:\d\d left$", progress, re.M)
    assert "  proof: policy = reference to 0.0e+00, reference = start model loaded on its own to" in progress
    assert re.search(r"^  dpo 3/3  loss [\d.]+  margin -?[\d.]+  accuracy [\d.]+", progress, re.M)
    assert "\x1b" not in said
    assert main(["train", str(file), "--output", str(tmp_path / "run"), "--set", "stages.dpo.trainer.beta=0.2"]) == 0
    again = capsys.readouterr().out
    assert "sft        sft, finished: reused" in again
    assert "loss" not in again


def on_a_terminal(command: list[str]) -> str:
    """Run a command with a pseudo-terminal for its output, and return what it drew."""
    leader, follower = pty.openpty()
    process = subprocess.Popen(
        command, stdout=follower, stderr=follower, env=os.environ | {"TERM": "xterm", "COLUMNS": "160"}
    )
    os.close(follower)
    drawn = b""
    while True:
        try:
            chunk = os.read(leader, 65536)
        except OSError:  # Linux reports the end of a terminal this way
            break
        if not chunk:
            break
        drawn += chunk
    os.close(leader)
    assert process.wait() == 0
    return drawn.decode()


def test_on_a_terminal_a_live_bar(file: Path, tmp_path: Path) -> None:
    drawn = on_a_terminal([sys.executable, "-m", "toolkit", "train", str(file), "--output", str(tmp_path / "run")])
    assert "3/3" in drawn
    assert re.search(r"loss [\d.]+.*margin -?[\d.]+.*tokens/s", drawn)
    assert "\x1b[?25l" in drawn  # a live display hides the cursor, and gives it back
    assert drawn.rindex("\x1b[?25h") > drawn.rindex("\x1b[?25l")


def test_accelerate_launch_is_the_same_program(file: Path, tmp_path: Path) -> None:
    accelerate = Path(sys.executable).with_name("accelerate")
    command = [str(accelerate), "launch", "--cpu", "-m", "toolkit", "train", str(file), "--output", str(tmp_path / "a")]
    subprocess.run(command, check=True, capture_output=True)
    subprocess.run(
        [sys.executable, "-m", "toolkit", "train", str(file), "--output", str(tmp_path / "b")],
        check=True,
        capture_output=True,
    )
    weights = [(tmp_path / name / "adapter" / "adapter_model.safetensors").read_bytes() for name in "ab"]
    assert weights[0] == weights[1]


def test_python_and_the_command_line_do_the_same(file: Path, tmp_path: Path) -> None:
    import toolkit

    result = toolkit.train(file, output=tmp_path / "a", overrides=("seed=3",))
    assert main(["train", str(file), "--output", str(tmp_path / "b"), "--set", "seed=3"]) == 0
    assert result.adapter is not None
    ours = (result.adapter / "adapter_model.safetensors").read_bytes()
    assert ours == (tmp_path / "b" / "adapter" / "adapter_model.safetensors").read_bytes()
