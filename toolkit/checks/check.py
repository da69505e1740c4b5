"""`toolkit check`: what is wrong, doubtful or good to know about a run, before a weight is loaded."""

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from accelerate import PartialState

from toolkit.checks import content as check_data
from toolkit.checks import pairs as check_pairs
from toolkit.checks import template as check_template
from toolkit.checks.access import check_access
from toolkit.checks.needs import check_resources, hardware_of, planned_for
from toolkit.errors import DataError, ToolkitError
from toolkit.evaluation import evaluate
from toolkit.findings import Finding
from toolkit.job import StageJob
from toolkit.launching import processes
from toolkit.launching.division import Sharding
from toolkit.recipe.sections import Recipe
from toolkit.records.rundir import RunDirectory, default_output
from toolkit.training.prepare import Prepared, prepare
from toolkit.wording import visible

Part = tuple[str, list[Finding]]


def check(
    recipe: Recipe, stages: dict[str, Any], launch: Path | None = None, number: int | None = None
) -> Iterator[Part]:
    """The findings part by part: access, tokenizer, each stage, evaluate, resources.

    Nothing is written, no weight is loaded.

    Args:
        stages: Filled with a summary of each stage.
        launch: The accelerate config file of the launch the run is meant for; by default one process here.
        number: Processes, over what that file says.

    Raises:
        RunError: the config file cannot be read.
    """
    sharding = None if launch is None else Sharding.from_file(launch, number)
    yield "access", check_access(recipe)
    run = RunDirectory(default_output(recipe))
    try:
        prepared = prepare(recipe, run)
    except ToolkitError as error:
        yield "run", _errors("run", error)
        return
    jobs, here = prepared.jobs, prepared.hardware
    if launch is not None and sharding is not None:
        hardware = hardware_of(launch, sharding, here)
        jobs = [planned_for(job, hardware) for job in jobs]
    stages.update({job.plan.name: summary(job) for job in jobs})
    yield from check_prepared(prepared, jobs)
    if recipe.evaluate is not None:
        yield "evaluate", _check_evaluate(prepared)
    found = check_resources(jobs, run.path, sharding, this_machine=jobs[0].hardware.device == here.device)
    yield "resources", ([] if launch is None else [_launch_note(launch, jobs[0])]) + found


def check_prepared(prepared: Prepared, jobs: list[StageJob]) -> Iterator[Part]:
    """The findings about tokenizer, template and data of these stages of a prepared run."""
    yield "tokenizer", check_template.check_tokenizer(prepared.recipe, prepared.tokenizer)
    for job in jobs:
        yield job.plan.name, _check_stage(job)


def stop_on_errors(prepared: Prepared, jobs: list[StageJob], output: Path) -> dict[str, list[Finding]]:
    """Check on the main process, for all: say its warnings on the error stream, and stop on errors.

    The other processes wait for its word; where it fails instead, the launcher ends them.

    Args:
        jobs: the stages that will run.
        output: the run directory.

    Returns:
        The findings part by part, on the main process; nothing elsewhere.

    Raises:
        DataError: with every error found.
    """
    parts: dict[str, list[Finding]] = {}
    if PartialState().is_main_process:
        parts = dict(check_prepared(prepared, jobs))
        parts["resources"] = check_resources(jobs, output, told=False)
        found = [finding for findings in parts.values() for finding in findings]
        for finding in found:
            if finding.level == "warning":
                print(visible(f"warning: {finding}"), file=sys.stderr, flush=True)
        errors = [str(finding) for finding in found if finding.level == "error"]
        if errors:
            raise DataError("\n".join(errors))
    processes.from_main(None)
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


def _check_evaluate(prepared: Prepared) -> list[Finding]:
    try:
        evaluate.check(prepared.recipe, prepared.hardware, prepared.tokenizer)
    except ToolkitError as error:
        return _errors("evaluate", error)
    return []


def _errors(check: str, error: ToolkitError) -> list[Finding]:
    return [Finding("error", check, *_where_and_text(line)) for line in str(error).split("\n")]


def _launch_note(file: Path, job: StageJob) -> Finding:
    n, device = job.hardware.processes, "CPUs" if job.hardware.device == "cpu" else "GPUs"
    kind = " computing in bf16" if job.plan.trainer.get("bf16") else ""
    return Finding("note", "launch", str(file), f"{n} {'process' if n == 1 else 'processes'} on {device}{kind}")


def _where_and_text(error: str) -> tuple[str, str]:
    """`file:line: key` and the sentence of an error that begins with them."""
    where, _, text = error.partition(": ")
    key, colon, rest = text.partition(": ")
    return (f"{where}: {key}", rest) if colon else (where, text)
