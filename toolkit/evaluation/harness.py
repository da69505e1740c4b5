"""Tasks of EleutherAI's lm-evaluation-harness, which is an extra: it is imported where a recipe asks for tasks."""

import math
from collections.abc import Iterator
from functools import cache
from hashlib import sha256
from importlib import import_module
from importlib.metadata import version
from importlib.util import find_spec
from numbers import Real
from pathlib import Path
from typing import Any

from toolkit.errors import ModelError
from toolkit.recipe.sections import Evaluate, Recipe
from toolkit.wording import did_you_mean

NOT_MEASURED = ("sample_len",)


def check(recipe: Recipe) -> None:
    """Look for the package and the tasks.

    Raises:
        ModelError: the package, the folder of tasks, or a task is not there.
    """
    assert recipe.evaluate is not None
    asked = recipe.evaluate
    if not asked.lm_eval:
        return
    if find_spec("lm_eval") is None:
        where = recipe.where("evaluate", "lm_eval")
        raise ModelError(f"{where}: lm-evaluation-harness is not installed; pip install lm-eval")
    if asked.include_path is not None and not Path(asked.include_path).is_dir():
        raise ModelError(f"{recipe.where('evaluate', 'include_path')}: no such folder: {asked.include_path}")
    known = _manager(asked).all_tasks
    for i, name in enumerate(asked.lm_eval):
        if name not in known:
            where, places = recipe.where("evaluate", "lm_eval", i), asked.include_path or "no include_path"
            raise ModelError(
                f"{where}: no task is named '{name}'{did_you_mean(name, known)}; expected one of the harness's "
                f"{len(known):,}, those of include_path among them ({places})"
            )


def results(asked: Evaluate, loaded: Any, tokenizer: Any, seed: int) -> dict[str, dict[str, float]] | None:
    """Task -> metric, under the harness's names, such as `acc,none` and `acc_stderr,none`, -> number."""
    if not asked.lm_eval:
        return None
    wrapped = import_module("lm_eval.models.huggingface").HFLM(
        pretrained=loaded, tokenizer=tokenizer, batch_size=asked.batch_size
    )
    found = import_module("lm_eval").simple_evaluate(
        model=wrapped, tasks=asked.lm_eval, task_manager=_manager(asked), random_seed=seed, log_samples=False
    )
    return {task: dict(_numbers(metrics)) for task, metrics in found["results"].items()}


def identity(asked: Evaluate) -> dict[str, Any]:
    """What the results depend on besides the tasks' names; nothing where no task is asked for."""
    if not asked.lm_eval:
        return {}
    folder = asked.include_path and Path(asked.include_path)
    files = sorted(file for file in folder.rglob("*") if file.is_file()) if folder else []
    return {"lm_eval": version("lm_eval"), "tasks": [sha256(file.read_bytes()).hexdigest() for file in files]}


def _manager(asked: Evaluate) -> Any:
    return _indexed(asked.include_path, tuple(asked.lm_eval), tuple(identity(asked)["tasks"]))


@cache
def _indexed(include_path: str | None, names: tuple[str, ...], files: tuple[str, ...]) -> Any:
    """The harness's `TaskManager`; `files` say what the folder holds. To list its own tasks takes it many seconds."""
    manager = import_module("lm_eval.tasks").TaskManager
    own = manager(include_path=include_path, include_defaults=False)
    return own if set(names) <= set(own.all_subtasks) else manager(include_path=include_path)


def _numbers(metrics: dict[str, Any]) -> Iterator[tuple[str, float]]:
    for name, value in metrics.items():  # texts too: an alias, `N/A`
        if isinstance(value, Real) and math.isfinite(value) and name not in NOT_MEASURED:
            yield name, float(value)
