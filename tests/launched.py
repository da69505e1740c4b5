"""Runs of several processes: stopped where a test says, and what they logged."""

import subprocess
from pathlib import Path

import torch

from toolkit.training.progress import read_metrics


def stopped(command: list[str], at: str) -> tuple[int, str]:
    """Run a command, and end it with SIGTERM when a line starts so: its exit code, and what it said of that."""
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stderr is not None
        for line in process.stdout:
            if line.startswith(at):
                process.terminate()
        said = process.stderr.read()
    return process.returncode, said


def logged(stage: Path, name: str = "loss") -> torch.Tensor:
    """A metric of a stage, at every step that has it."""
    return torch.tensor([line[name] for line in read_metrics(stage / "metrics.jsonl") if name in line])
