"""Where a result comes from: git commit, versions, machine, memory. What cannot be known is left out."""

import platform
import resource
import shlex
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

LIBRARIES = ("torch", "transformers", "trl", "peft", "accelerate", "datasets", "bitsandbytes")
COMMANDS = ("toolkit", "__main__.py")


def provenance(recipe: Path, processes: int) -> dict[str, Any]:
    """`{"git"?, "command"?, "versions", "hardware"}` of this process, for `stage.json`.

    Args:
        recipe: The recipe file; the commit is that of the repository it lies in.
        processes: Number of processes that train together.
    """
    found: dict[str, Any] = {
        "git": git_state(recipe),
        "command": shlex.join(["toolkit", *sys.argv[1:]]) if Path(sys.argv[0]).name in COMMANDS else None,
        "versions": {"toolkit": version("trl-lora-toolkit"), "python": platform.python_version()}
        | {name: version(name) for name in LIBRARIES},
        "hardware": {"name": _device_name(), "processes": processes},
    }
    return {key: value for key, value in found.items() if value is not None}


def git_state(file: Path) -> dict[str, Any] | None:
    """`{"commit", "dirty"}` of the repository that holds a file, or `None` where there is none.

    A tree is dirty where tracked files have changed, or where the file itself is not tracked as it stands.
    """
    folder = str(file.resolve().parent)
    commit = _git(folder, "rev-parse", "HEAD")
    if not commit:
        return None
    changed = _git(folder, "status", "--porcelain", "--untracked-files=no")
    own = _git(folder, "status", "--porcelain", "--ignored", "--", file.name)
    return {"commit": commit, "dirty": bool(changed or own)}


def reset_peak_memory() -> None:
    """Start counting `peak_memory` anew, where the device can."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()


def peak_memory() -> int:
    """Bytes: the most that this process held on its GPU since the reset; without one, in main memory, ever."""
    if torch.cuda.is_available():
        return int(torch.cuda.max_memory_allocated())
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def _device_name() -> str:
    if torch.cuda.is_available():
        return str(torch.cuda.get_device_name())
    names = [line.partition(":")[2].strip() for line in _cpuinfo() if line.startswith("model name")]
    return f"{names[0] if names else platform.machine()} (CPU)"


def _cpuinfo() -> list[str]:
    try:
        return Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return []


def _git(folder: str, *arguments: str) -> str | None:
    """What git says, or `None` where it cannot."""
    try:
        done = subprocess.run(["git", "-C", folder, *arguments], capture_output=True, text=True, check=True, timeout=30)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()
