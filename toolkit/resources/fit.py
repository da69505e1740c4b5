"""Whether this machine has what a stage is estimated to need: memory of its GPU, and room on its disks."""

import shutil
from pathlib import Path

import torch

from toolkit.findings import Finding
from toolkit.resources.estimate import Disk, StageEstimate, amount

NEARLY_FULL = 0.9


def findings(found: list[StageEstimate], device_bytes: int | None, free: dict[Path, int]) -> list[Finding]:
    """What does not fit, or hardly, and the free disk.

    Args:
        device_bytes: memory of the GPU of one process; `None` where there is none.
        free: free bytes by folder: first the run directory's, then, if it lies on another disk, the cache's.
    """
    said: list[Finding] = []
    for stage in found:
        if stage.unknown:
            said.append(Finding("note", "memory-unknown", stage.name, f"activations not estimated: {stage.unknown}"))
        if device_bytes is not None:
            said += _memory_findings(stage, device_bytes)
    return said + disk_findings([stage.disk for stage in found], free)


def disk_findings(disks: list[Disk], free: dict[Path, int]) -> list[Finding]:
    """What all stages together write, and the room there is; see `findings`."""
    said: list[Finding] = []
    folders = list(free)
    needs = [sum(disk.output for disk in disks), sum(disk.reference_cache for disk in disks)]
    if len(folders) == 1:
        needs = [sum(needs)]
    for folder, need in zip(folders, needs, strict=False):
        said += _disk_findings(folder, need, free[folder])
    return said


def free_bytes(folders: list[Path]) -> dict[Path, int]:
    """Free bytes of the disks that these folders are, or will be, on; a disk is named once."""
    free: dict[Path, int] = {}
    disks = set()
    for folder in folders:
        there = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
        if there.stat().st_dev not in disks:
            disks.add(there.stat().st_dev)
            free[folder] = shutil.disk_usage(there).free
    return free


def device_bytes() -> int | None:
    """Memory of this process's GPU; `None` without one."""
    return torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory if _cuda() else None


def _memory_findings(stage: StageEstimate, there: int) -> list[Finding]:
    has = f"this GPU has {amount(there)}"
    if stage.items["weights"] + stage.items["context"] > there:
        text = (
            f"the weights alone need {amount(stage.items['weights'])}, {has}; use load_in_4bit, FSDP or a smaller base"
        )
        return [Finding("error", "memory", stage.name, text)]
    if stage.peak > NEARLY_FULL * there:
        text = (
            f"about {amount(stage.peak)} at the peak ({stage.worst}), {has}; a smaller per_device_train_batch_size "
            f"with more gradient_accumulation_steps, gradient_checkpointing or a smaller max_length need less"
        )
        return [Finding("warning", "memory", stage.name, text)]
    return []


def _disk_findings(folder: Path, need: int, free: int) -> list[Finding]:
    said = f"about {amount(need)} will be written, {amount(free)} are free"
    if need <= NEARLY_FULL * free:
        return [Finding("note", "disk", str(folder), said)]
    way_out = "free some, lower save_total_limit, or choose another disk with --output"
    return [Finding("error" if need > free else "warning", "disk", str(folder), f"{said}; {way_out}")]


def _cuda() -> bool:
    return torch.cuda.is_available()
