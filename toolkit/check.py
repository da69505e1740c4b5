"""`toolkit check`: what is wrong, doubtful or good to know about a run, before a weight is loaded."""

import sys
from collections.abc import Iterator
from typing import Any

from accelerate import PartialState
from accelerate.utils import broadcast_object_list

from toolkit import check_data, check_pairs, check_template
from toolkit.check_access import check_access
from toolkit.errors import DataError, ToolkitError
from toolkit.findings import Finding
from toolkit.job import StageJob
from toolkit.prepare import Prepared, prepare
from toolkit.recipe import Recipe
from toolkit.rundir import RunDirectory, default_output

Part = tuple[str, list[Finding]]


def check(recipe: Recipe, stages: dict[str, Any]) -> Iterator[Part]:
    """The findings part by part: access, template, then each stage. Nothing is written, no weight is loaded.

    Args:
        stages: Filled with a summary of each stage.
    """
    access = check_access(recipe)
    yield "access", access
    try:
        prepared = prepare(recipe, RunDirectory(default_output(recipe)))
    except ToolkitError as error:
        yield "run", [Finding("error", "run", *_where_and_text(error))]
        return
    stages.update({job.plan.name: summary(job) for job in prepared.jobs})
    yield from check_prepared(prepared, prepared.jobs)


def check_prepared(prepared: Prepared, jobs: list[StageJob]) -> Iterator[Part]:
    """The findings about tokenizer, template and data of these stages of a prepared run."""
    yield "tokenizer", check_template.check_tokenizer(prepared.recipe, prepared.tokenizer)
    for job in jobs:
        yield job.plan.name, _check_stage(job)


def stop_on_errors(prepared: Prepared, jobs: list[StageJob]) -> dict[str, list[Finding]]:
    """Check on the main process; say its warnings on the error stream, and stop every process together on errors.

    Returns:
        The findings part by part, on the main process; nothing elsewhere.

    Raises:
        DataError: with every error found.
    """
    told: list[Any] = [None]
    parts: dict[str, list[Finding]] = {}
    state = PartialState()
    if state.is_main_process:
        try:
            parts = dict(check_prepared(prepared, jobs))
            found = [finding for findings in parts.values() for finding in findings]
            for finding in found:
                if finding.level == "warning":
                    print(f"warning: {finding}", file=sys.stderr, flush=True)
            told = ["\n".join(str(finding) for finding in found if finding.level == "error") or None]
        except ToolkitError as error:
            told = [str(error)]
    broadcast_object_list(told, from_process=0)  # the others wait here
    if told[0]:
        raise DataError(told[0] if state.is_main_process else "stopped, as the main process found errors")
    return parts


def summary(job: StageJob) -> dict[str, Any]:
    """A stage in numbers, for `--json`."""
    counts = job.data.counts
    numbers = {"rows": counts.rows, "tokens": counts.tokens, "supervised": counts.supervised, "steps": job.steps}
    return {"type": job.plan.type, **numbers, "truncated": counts.truncated, "dropped": counts.dropped}


def _check_stage(job: StageJob) -> list[Finding]:
    found = check_template.check_template(job.recipe, job.plan, job.data, job.tokenizer)
    found += check_data.check_lengths(job) + check_data.check_steps(job)
    text = check_data.read_text(job.data.sources, job.plan.type, job.tokenizer, job.recipe.seed)
    found += check_data.check_text(job, text) + check_data.check_overlap(job, text, job.tokenizer)
    return found + (check_pairs.check_pairs(job) if job.plan.type == "dpo" else [])


def _where_and_text(error: ToolkitError) -> tuple[str, str]:
    """`file:line: key` and the sentence of an error that begins with them."""
    where, _, text = str(error).partition(": ")
    key, colon, rest = text.partition(": ")
    return (f"{where}: {key}", rest) if colon else (where, text)
