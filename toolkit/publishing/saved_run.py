"""A finished run, or an adapter pulled from the Hub, as the commands after training read it."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from toolkit.errors import RunError
from toolkit.models.adapter import CONFIG, WEIGHTS
from toolkit.recipe.sections import Recipe, Stage
from toolkit.records.rundir import ADAPTER, RESOLVED, RunDirectory, read_json


@dataclass(frozen=True)
class SavedRun:
    """What was trained, on what, and where the adapters lie."""

    path: Path
    recipe: Recipe
    """As it ran: the type of the weights and the commit of the base are the recorded ones."""
    base: dict[str, str]
    """What the base weights were: `{"commit": ...}` or `{"sha256": ...}`."""
    adapters: dict[str, Path]
    """Stage -> its adapter on the base, in order. A pulled adapter is alone, by its stage's name or as `adapter`."""

    def stage(self, name: str | None = None) -> str:
        """The stage of that name; the last one where none is named.

        Raises:
            RunError: no finished stage is named so.
        """
        if name is None:
            return next(reversed(self.adapters))
        if name not in self.adapters:
            raise RunError(f"{self.path}: no finished stage {name!r}; found {', '.join(self.adapters)}")
        return name

    def recipe_stage(self, name: str) -> Stage:
        """The recipe's section on a stage; of a pulled adapter, that of the last stage."""
        return next((stage for stage in self.recipe.stages if stage.name == name), self.recipe.stages[-1])


def load_run(path: str | Path, trust_remote_code: bool = False) -> SavedRun:
    """Read a run directory, or a folder with `adapter/` and `resolved.json`.

    Raises:
        RunError: there is no such folder, no record of a run in it, no finished stage, or code that is not trusted.
    """
    folder = Path(path)
    if not folder.is_dir():
        raise RunError(f"{folder}: no such folder; expected the output of toolkit train or toolkit pull")
    resolved = read_json(folder / RESOLVED)
    if resolved is None:
        raise RunError(f"{folder}: no {RESOLVED} in it; expected the output of toolkit train or toolkit pull")
    recipe = _pinned(RunDirectory(folder).recipe(trust_remote_code), resolved)
    adapters = _adapters(folder, recipe, str(resolved.get("delivered") or ADAPTER))
    if not adapters:
        raise RunError(f"{folder}: no stage is finished; run toolkit train again to resume")
    return SavedRun(folder, recipe, dict(resolved.get("base") or {}), adapters)


def _pinned(recipe: Recipe, resolved: dict[str, Any]) -> Recipe:
    recorded: dict[str, Any] = {"dtype": resolved.get("dtype", recipe.model.dtype)}
    commit = (resolved.get("base") or {}).get("commit")
    if commit not in (None, "None"):
        recorded["revision"] = commit
    return recipe.adjusted(model=recipe.model.model_copy(update=recorded))


def _adapters(folder: Path, recipe: Recipe, delivered: str) -> dict[str, Path]:
    """Finished stages whose adapter is here; of a pulled adapter, that one alone."""
    run = RunDirectory(folder)
    stages = {stage.name: run.adapter(stage.name) for stage in recipe.stages if run.finished(stage.name) is not None}
    found = {name: path for name, path in stages.items() if _is_adapter(path)}
    return found or {name: path for name, path in {delivered: folder / ADAPTER}.items() if _is_adapter(path)}


def _is_adapter(folder: Path) -> bool:
    return (folder / CONFIG).is_file() and (folder / WEIGHTS).is_file()
