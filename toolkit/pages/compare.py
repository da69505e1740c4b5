"""Several runs beside each other, a folder of runs line by line, and where two recipes differ. Without torch."""

import os
import re
from collections.abc import Sequence
from pathlib import Path

from toolkit.errors import RunError
from toolkit.pages import page, settings
from toolkit.pages.pictures import Line, Picture, draw
from toolkit.pages.report import STEPS, leaves, panels, summaries
from toolkit.recipe.sections import Recipe
from toolkit.records.history import PastStage, Run, drawable, find_runs, number, read_run, series
from toolkit.records.rundir import storage, write_text
from toolkit.wording import amount, did_you_mean

PAGE = "comparison.html"
DRAWN = 16  # runs in one picture
NOT_RESULTS = ("step", "epoch", "learning_rate", "num_tokens", "total_flos")
# What gets a column without being asked for
TELLING = re.compile(
    r"\.(eval_)?(loss|mean_token_accuracy|rewards/margins|rewards/accuracies)$|\.(seconds|tokens_per_second|peak_memory_bytes"
    r"|perplexity|kl|preference\.accuracy|preference\.margin|greedy\.(tokens|stopped|loops|repetition))$|\.scores\.|\.lm_eval\."
)
# Of other metrics, less is better: losses, perplexity, KL, lengths, seconds, bytes.
MORE_IS_BETTER = ("accurac", "margin", "scores.", "tokens_per_second", "chosen", "stopped", "distinct", "lm_eval.")


def compare(paths: Sequence[str | Path], sort: str | None = None, output: str | Path | None = None) -> tuple[Path, str]:
    """Write a page with the runs' differing settings beside their differing results, and their curves.

    Args:
        paths: Run directories.
        sort: A metric, as `dpo.eval_loss`, or its end, as `eval_loss`, which is then the last stage's; best first.
        output: The page; by default `comparison.html` in the folder that the runs have in common.

    Returns:
        The page, and a line for each run in its order.

    Raises:
        RunError: one is no run directory; no run has that metric.
    """
    runs = [read_run(path) for path in paths]
    names = settings.tails([str(run.path.resolve()) for run in runs])
    found = [results(run) for run in runs]
    key = None if sort is None else _metric(sort, found)
    order = sorted(range(len(runs)), key=lambda i: _rank(key, found[i])) if key else list(range(len(runs)))
    runs, names, found = [runs[i] for i in order], [names[i] for i in order], [found[i] for i in order]
    said = [
        f"{name}  {key} {page.figure(one[key])}" if key in one else name for name, one in zip(names, found, strict=True)
    ]
    target = Path(output) if output is not None else _common(runs) / PAGE
    with storage(target.parent):
        target.parent.mkdir(parents=True, exist_ok=True)
        write_text(target, _html(runs, names, found, key))
    return target, "\n".join(said)


def results(run: Run) -> dict[str, float]:
    """What came out, by names such as `dpo.eval_loss` and `dpo.preference.accuracy`; numbers only."""
    found: dict[str, float | None] = {}
    for stage in run.stages:
        keys = dict.fromkeys(key for line in stage.lines for key in line if key not in NOT_RESULTS)
        logged = {key: stage.last(key) for key in keys}
        own = {"seconds": number(stage.record.get("seconds")), "tokens_per_second": stage.tokens_per_second}
        logged |= own | {"peak_memory_bytes": stage.peak_memory}
        found |= {f"{stage.name}.{key}": value for key, value in logged.items()}
    for name, summary in summaries(run.evaluation).items():
        for key, value in leaves(summary).items():
            found[f"{name}.{key}"] = number(value.get("value") if isinstance(value, dict) else value)
    return {key: value for key, value in found.items() if value is not None}


def list_runs(folder: str | Path) -> str:
    """One line for each run in a folder: base, stages, when, and what the last finished stage ended with.

    Raises:
        RunError: no run is in there.
    """
    rows = [_line(path, Path(folder)) for path in find_runs(folder)]
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return "\n".join("  ".join(f"{c:<{w}}" for c, w in zip(row, widths, strict=True)).rstrip() for row in rows)


def diff(one: Recipe, other: Recipe) -> str:
    """Where two recipes differ once `extends`, overrides and defaults are resolved; a line for each key."""
    found = settings.differing([settings.flat(settings.of_recipe(recipe)) for recipe in (one, other)])
    if not found:
        return "no differences"
    names = settings.tails([str(recipe.file.resolve()) for recipe in (one, other)])
    rows = [["", *names]] + [[key, *settings.tails(values)] for key, values in found.items()]
    widths = [max(len(row[i]) for row in rows) for i in range(3)]
    return "\n".join("  ".join(f"{c:<{w}}" for c, w in zip(row, widths, strict=True)).rstrip() for row in rows)


def _html(runs: list[Run], names: list[str], found: list[dict[str, float]], key: str | None) -> str:
    chosen = settings.differing([settings.flat(settings.of_run(run)) for run in runs])
    came_out = {metric: values for metric, values in settings.differing(found).items() if TELLING.search(metric)}
    if key is not None:
        came_out = {key: [one.get(key) for one in found], **came_out}
    drawn = [draw(picture, png=False) for picture in pictures(runs[:DRAWN], names)]
    return page.render(
        "compare",
        title=f"{len(runs)} runs",
        order=f"sorted by {key}, best first" if key else "in the order given",
        names=names,
        settings={name.replace("stages.", "", 1): settings.tails(values) for name, values in chosen.items()},
        results={metric: [_cell(metric, value) for value in values] for metric, values in came_out.items()},
        left_out=max(len(runs) - DRAWN, 0),
        pictures=[(one.picture.name, page.element(one)) for one in drawn],
    )


def pictures(runs: list[Run], names: list[str]) -> list[Picture]:
    """The curves of every stage and metric, one line for each run."""
    stages: dict[str, list[tuple[int, PastStage]]] = {}
    for i, run in enumerate(runs):
        for stage in run.stages:
            stages.setdefault(stage.name, []).append((i, stage))
    found = []
    for number_, (name, those) in enumerate(stages.items()):
        for panel, title, unit, keys in panels([stage for _, stage in those]):
            for label, key, *_ in keys:
                lines = [Line(names[i], series(stage.lines, key), i, i // 8) for i, stage in those]
                lines = [line for line in lines if drawable(line.points)]
                if lines:
                    text = f"{name}: {title}" + (f", {label}" if label else "")
                    found.append(Picture(f"{number_}-{panel}-{key}", text, STEPS, unit, lines))
    return found


def _cell(metric: str, value: float | None) -> str:
    if value is None:
        return settings.MISSING
    if metric.endswith(".seconds"):
        return page.duration(value)
    return amount(value) if metric.endswith("_bytes") else page.figure(value)


def _metric(asked: str, found: list[dict[str, float]]) -> str:
    known = list(dict.fromkeys(key for one in found for key in one))
    matching = [key for key in known if key == asked] or [
        key for key in known if key.endswith((f".{asked}", f"/{asked}"))
    ]
    if not matching:
        endings = sorted({key.split(".", 1)[-1] for key in known})
        told = did_you_mean(asked, [*known, *endings])
        raise RunError(f"--sort {asked}: no run has this metric{told}; found {', '.join(endings) or 'none'}")
    return matching[-1]


def _rank(key: str, found: dict[str, float]) -> tuple[bool, float]:
    value = found.get(key)
    if value is None:
        return True, 0.0
    return False, -value if any(word in key for word in MORE_IS_BETTER) else value


def _common(runs: list[Run]) -> Path:
    return Path(os.path.commonpath([run.path.resolve().parent for run in runs]))


def _line(path: Path, folder: Path) -> list[str]:
    name = str(path.relative_to(folder)) if path != folder else path.resolve().name
    try:
        run = read_run(path)
    except RunError as error:
        return [name, "", "", str(error).removeprefix(f"{path}: "), ""]
    stages = ", ".join(f"{stage.name} {stage.state}" for stage in run.stages) or "no stage"
    logged = [stage for stage in run.stages if stage.lines]
    ended = ""
    if logged:
        keys = {"loss": "loss", "eval_loss": "eval loss", "rewards/margins": "margin", "rewards/accuracies": "accuracy"}
        values = {title: logged[-1].last(key) for key, title in keys.items()}
        ended = f"{logged[-1].name}: " + ", ".join(f"{t} {v:.4g}" for t, v in values.items() if v is not None)
    return [name, run.written, page.short(run.base), stages, ended]
