"""A run's records as others may see them: no path of this machine, and a recipe that stands on its own."""

import json
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from toolkit.errors import RunError
from toolkit.recipe.sections import Hub, Recipe
from toolkit.records.rundir import ADAPTER, EVALUATION, METRICS, PICTURES, RECIPE, REPORT, RESOLVED, STAGE, read_json

HEADER = """\
# Written by `toolkit`: one file with what `extends` and `--set` added; revisions as they resolved; without `hub`.
# Local files are named as the recipe names them, and are not part of this repository.
"""
NOT_SHARED = ("written", "pulled")
NOT_SHARED_OF_A_STAGE = ("trainer_args",)


class Places:
    """The places of this machine that a run knows, and what they are called elsewhere."""

    def __init__(self, run: Path, resolved: dict[str, Any]):
        self.names: dict[str, str] = {}
        for path in _absolute_paths(resolved):
            self.names[path] = f"./{Path(path).name}"
        self.names |= {str(run.resolve()): run.resolve().name, str(Path.cwd()): ".", str(Path.home()): "~"}
        self.names |= resolved.get("written", {})
        self.names.pop("/", None)

    def hide(self, value: Any) -> Any:
        """The value, strings inside it included, with every such place under its other name."""
        if isinstance(value, dict):
            return {key: self.hide(item) for key, item in value.items()}
        if isinstance(value, list):
            return [self.hide(item) for item in value]
        return self.hide_in_text(value) if isinstance(value, str) else value

    def hide_in_text(self, text: str) -> str:
        for place in sorted(self.names, key=len, reverse=True):
            text = text.replace(place, self.names[place])
        return text


def read_resolved(run: Path) -> dict[str, Any]:
    """`resolved.json` of a run.

    Raises:
        RunError: it is not a run directory.
    """
    resolved = read_json(run / RESOLVED)
    if resolved is None or "recipe" not in resolved:
        raise RunError(f"{run}: is not a run directory; expected the folder that `toolkit train` wrote")
    return resolved


def hub_section(run: Path, asked: dict[str, Any]) -> Hub:
    """The `hub` section of a run's recipe, with what is asked for over it.

    Raises:
        RunError: it names no repository, or a value is refused.
    """
    section = (read_resolved(run)["recipe"].get("hub") or {}) | asked
    if "repo_id" not in section:
        raise RunError(f"{run}: the recipe has no hub section; say where to push with --repo-id OWNER/NAME")
    try:
        return Hub.model_validate(section)
    except ValidationError as error:
        texts = [f"{'.'.join(map(str, e['loc'])) or 'hub'}: {e['msg']}" for e in error.errors()]
        raise RunError("; ".join(texts)) from None


def stages_up_to(resolved: dict[str, Any], stage: str | None) -> list[str]:
    """The stages of a run in order, up to the one whose adapter is handed on (by default the last one)."""
    names = [entry["name"] for entry in resolved["stages"]]
    last = stage or resolved.get("delivered") or names[-1]
    if last not in names:
        raise RunError(f"no stage is named {last!r}; found {', '.join(names)}")
    return names[: names.index(last) + 1]


def recipe_text(resolved: dict[str, Any], places: Places) -> str:
    """The whole recipe as YAML that `toolkit train` reads: only what differs from a default."""
    recipe = Recipe.model_validate(resolved["recipe"])
    data = places.hide(recipe.model_dump(mode="json", by_alias=True, exclude_defaults=True))
    data.pop("hub", None)
    commit = resolved["base"].get("commit")
    if commit and commit != "None":
        data["model"]["revision"] = commit
    for asked, stage in zip(data["stages"], resolved["stages"], strict=True):
        for source, origin in zip(asked["data"], stage.get("sources") or [], strict=False):
            if origin.get("commit"):
                source["revision"] = origin["commit"]
        if stage.get("start_commit"):
            asked["from"] = f"{asked['from'].partition('@')[0]}@{stage['start_commit']}"
    return HEADER + yaml.safe_dump(data, sort_keys=False, allow_unicode=True, width=110)


def records(run: Path, stage: str | None = None) -> dict[str, bytes]:
    """Path in a repository -> content, for everything that tells of the run, without adapter and card."""
    resolved = read_resolved(run)
    places, stages = Places(run, resolved), stages_up_to(resolved, stage)
    shared = {key: value for key, value in resolved.items() if key not in NOT_SHARED} | {"delivered": stages[-1]}
    files = {RECIPE: recipe_text(resolved, places).encode(), RESOLVED: _json(places.hide(shared))}
    evaluation = read_json(run / EVALUATION)
    if evaluation is not None:
        files[EVALUATION] = _json(places.hide(evaluation))
    for name in stages:
        record = read_json(run / name / STAGE)
        if record is not None:
            kept = {key: value for key, value in record.items() if key not in NOT_SHARED_OF_A_STAGE}
            files[f"{name}/{STAGE}"] = _json(places.hide(kept))
        if (run / name / METRICS).is_file():
            files[f"{name}/{METRICS}"] = (run / name / METRICS).read_bytes()
    if (run / REPORT).is_file():
        files[REPORT] = places.hide_in_text((run / REPORT).read_text(encoding="utf-8")).encode()
    for picture in sorted((run / PICTURES).glob("*.png")):
        files[f"{PICTURES}/{picture.name}"] = picture.read_bytes()
    return files


def adapter_folder(run: Path, stage: str | None = None) -> Path:
    """The finished adapter of a run, or of one of its stages.

    Raises:
        RunError: there is none.
    """
    folder = run / stage / ADAPTER if stage else run / ADAPTER
    if stage:
        stages_up_to(read_resolved(run), stage)
    unfinished = stage is not None and read_json(run / stage / STAGE) is None
    if unfinished or not (folder / "adapter_config.json").is_file():
        what = f"stage {stage} is not finished" if stage else "there is no finished adapter"
        raise RunError(f"{run}: {what}; train to the end first, or name a finished stage with --stage")
    return folder


def _absolute_paths(value: Any) -> set[str]:
    if isinstance(value, dict | list):
        items = value.values() if isinstance(value, dict) else value
        return {path for item in items for path in _absolute_paths(item)}
    if not isinstance(value, str) or " " in value:
        return set()
    return {value} if value.startswith("/") and value.count("/") > 1 else set()


def _json(value: Any) -> bytes:
    return (json.dumps(value, indent=2, default=str) + "\n").encode()
