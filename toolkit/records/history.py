"""What a run left behind, read back for reports: settings, stages, metrics, evaluation. Without torch; nothing written.

A run may be unfinished, of an older version, or damaged: what is not there is empty here.
"""

import json
import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from toolkit.errors import RunError
from toolkit.records.rundir import EVALUATION, FINDINGS, RESOLVED, STAGE, STARTED, read_json

METRICS, GUARDS = "metrics.jsonl", "guards.jsonl"
Points = list[tuple[float, float]]


@dataclass(frozen=True)
class PastStage:
    """One stage of a run, finished or not."""

    name: str
    plan: dict[str, Any]
    """Its part of `resolved.json`."""
    record: dict[str, Any]
    """Its `stage.json`; empty where it has not finished."""
    lines: list[dict[str, Any]]
    """Its `metrics.jsonl`."""
    guards: list[dict[str, Any]]
    """What the guards said, in order."""
    rewards: dict[str, list[float]]
    """`chosen` and `rejected` of every held-out pair, where they were measured."""
    begun: bool

    @property
    def type(self) -> str:
        return str(self.plan.get("type", ""))

    @property
    def state(self) -> str:
        """`finished`, `step 40 of 120`, `begun` or `not run`."""
        if self.record:
            return "finished"
        step = max((number(line.get("step")) or 0 for line in self.lines), default=0)
        if step:
            return f"step {step:g} of {self.plan.get('steps', '?')}"
        return "begun" if self.begun else "not run"

    def last(self, key: str) -> float | None:
        """The last value logged under this name."""
        points = series(self.lines, key)
        return points[-1][1] if points and math.isfinite(points[-1][1]) else None

    @property
    def seconds(self) -> float | None:
        """Of the training loop, as transformers measured it."""
        return number((self.record.get("metrics") or {}).get("train_runtime")) or self.last("train_runtime")

    @property
    def tokens_per_second(self) -> float | None:
        """Tokens as TRL counts them, padding left out, by the seconds of the training loop."""
        tokens, seconds = self.last("num_tokens"), self.seconds
        return tokens / seconds if tokens and seconds else None

    @property
    def peak_memory(self) -> float | None:
        """Bytes, on the main process: of the GPU while it trained; without one, of the process so far."""
        return number(self.record.get("peak_memory"))


@dataclass(frozen=True)
class Run:
    """A run directory, read."""

    path: Path
    resolved: dict[str, Any]
    stages: list[PastStage]
    evaluation: dict[str, Any]
    findings: list[dict[str, Any]]
    """What the checks said before training, part by part."""

    @property
    def name(self) -> str:
        return self.path.resolve().name

    @property
    def recipe(self) -> dict[str, Any]:
        return dict(self.resolved.get("recipe") or {})

    @property
    def base(self) -> str:
        """The base by its Hub id or the name of its folder."""
        return str((self.resolved.get("identity") or {}).get("base", "base"))

    @property
    def written(self) -> str:
        """When the last of its stages wrote anything, as `2026-11-23 11:05`."""
        files = [self.path / RESOLVED]
        files += [self.path / stage.name / name for stage in self.stages for name in (STAGE, METRICS)]
        latest = max(file.stat().st_mtime for file in files if file.is_file())
        return time.strftime("%Y-%m-%d %H:%M", time.localtime(latest))


def read_run(path: str | Path) -> Run:
    """Read a run directory.

    Raises:
        RunError: it is none, or cannot be read.
    """
    folder = Path(path)
    try:
        resolved = read_json(folder / RESOLVED)
        if resolved is None:
            found = "is not a run directory" if folder.is_dir() else "no such directory"
            raise RunError(f"{folder}: {found}; expected one that `toolkit train` made, with {RESOLVED}")
        plans = [plan for plan in resolved.get("stages") or [] if isinstance(plan, dict)]
        stages = [_stage(folder, str(plan.get("name", f"stage {i}")), plan) for i, plan in enumerate(plans)]
        evaluation = _read(folder / EVALUATION) or _by_model(folder, ["base", *(stage.name for stage in stages)])
        parts = _read(folder / FINDINGS).values()
    except (OSError, UnicodeDecodeError, TypeError, ValueError) as error:
        raise RunError(f"{folder}: cannot be read: {error}") from None
    findings = [one for part in parts if isinstance(part, list) for one in part if isinstance(one, dict)]
    return Run(folder, resolved, stages, evaluation, findings)


def find_runs(folder: str | Path) -> list[Path]:
    """Every run directory in a folder, or one level below, by name.

    Raises:
        RunError: there is none.
    """
    top = Path(folder)
    files = sorted({*top.glob(RESOLVED), *top.glob(f"*/{RESOLVED}"), *top.glob(f"*/*/{RESOLVED}")})
    if not files:
        found = "no run is in here" if top.is_dir() else "no such directory"
        raise RunError(f"{top}: {found}; expected the folder that holds run directories, as in --list runs")
    return [file.parent for file in files]


def read_metrics(file: Path) -> list[dict[str, Any]]:
    """The whole lines of a `metrics.jsonl`; a last line cut off by a crash is left out."""
    if not file.exists():
        return []
    lines = []
    for line in file.read_text(encoding="utf-8").splitlines():
        try:
            lines.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return lines


def series(lines: list[dict[str, Any]], key: str) -> Points:
    """Step and value of every line that has this key; a value that is not a finite number is NaN."""
    found = []
    for line in lines:
        step = number(line.get("step"))
        if key in line and step is not None:
            value = number(line[key])
            found.append((step, math.nan if value is None else value))
    return found


def drawable(points: Points) -> bool:
    """Whether any of these is a number."""
    return any(math.isfinite(value) for _, value in points)


def number(value: Any) -> float | None:
    """The value as a number, or `None` where it is not a finite one."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return float(value) if math.isfinite(value) else None


def _stage(folder: Path, name: str, plan: dict[str, Any]) -> PastStage:
    inside = folder / name
    if inside.parent != folder:  # a name that is no name of a folder: damaged, or not ours
        return PastStage(name, plan, {}, [], [], {}, False)
    record = _read(inside / STAGE)
    guards = record["guards"] if isinstance(record.get("guards"), list) else read_metrics(inside / GUARDS)
    rewards = _read(inside / EVALUATION).get("rewards")
    return PastStage(
        name=name,
        plan=plan,
        record=record,
        lines=[line for line in read_metrics(inside / METRICS) if isinstance(line, dict)],
        guards=[one for one in guards if isinstance(one, dict)],
        rewards={k: list(v) for k, v in rewards.items() if isinstance(v, list)} if isinstance(rewards, dict) else {},
        begun=(inside / STARTED).is_file(),
    )


def _by_model(folder: Path, names: list[str]) -> dict[str, Any]:
    """What has been measured of each model, where it is not put together yet."""
    found = {name: _read(folder / name / EVALUATION).get("summary") for name in names}
    models = {name: summary for name, summary in found.items() if isinstance(summary, dict)}
    return {"models": models} if models else {}


def _read(file: Path) -> dict[str, Any]:
    return read_json(file) or {}
