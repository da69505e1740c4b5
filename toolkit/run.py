"""The stages of a recipe in order: skip what is finished, resume what was interrupted, verify what came out."""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from accelerate import PartialState

from toolkit.checks import check
from toolkit.errors import RunError
from toolkit.evaluation import evaluate
from toolkit.findings import Finding
from toolkit.job import StageJob
from toolkit.launching import processes
from toolkit.models import model, sharding
from toolkit.pages import report
from toolkit.publishing import card, hub
from toolkit.recipe.load import load_recipe
from toolkit.recipe.plan import Hardware, stage_plans
from toolkit.recipe.sections import Evaluate, Recipe, Source
from toolkit.records.rundir import EVALUATION, FINDINGS, RunDirectory, default_output, read_json, storage, write_json
from toolkit.rows.chat import load_tokenizer
from toolkit.training import trainer
from toolkit.training.prepare import (
    Prepared,
    check_parents,
    digest_or_none,
    external_adapter,
    plan_text,
    prepare,
    resolved,
    state_of,
)
from toolkit.training.probe import told
from toolkit.training.progress import say
from toolkit.training.stage import fill_reference, run_stage
from toolkit.wording import first_line


@dataclass(frozen=True)
class RunResult:
    """What a run left behind."""

    output: Path
    adapter: Path | None
    """The deliverable; `None` where `--stage` left stages unfinished."""
    stages: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Stage name -> its `stage.json`."""
    evaluation: dict[str, Any] | None = None
    pushed: str | None = None
    """Address of the commit on the Hub, where the recipe has a `hub` section."""


def train(
    recipe: Recipe | str | Path,
    output: str | Path | None = None,
    stage: str | None = None,
    fresh: bool = False,
    overrides: tuple[str, ...] = (),
    *,
    probe: bool = True,
) -> RunResult:
    """Run a recipe's stages and hand back one adapter.

    A script of your own that `accelerate launch` starts ends with `torch.distributed.destroy_process_group()`; the
    command line does that by itself.

    Args:
        recipe: A recipe, or its file.
        output: The run directory; by default `runs/FOLDER-RECIPE`.
        stage: Run this stage only; what it starts from must be finished.
        fresh: Run again what is finished (the stage named, or all). The results before are kept in `STAGE.previous`.
        overrides: `--set` expressions, where `recipe` is a file.
        probe: On CUDA, try each stage's longest batch before its first step.

    Raises:
        ToolkitError: bad input, or a result that failed its proof.
    """
    with _claimed(recipe, output, overrides) as (asked, run):
        prepared = prepare(asked, run)
        states = _states(prepared, run, stage, fresh)
        check_parents(prepared, states, stage)
        if asked.evaluate is not None:
            evaluate.check(asked, prepared.hardware, prepared.tokenizer)  # better now than after hours
        jobs = [job for job in prepared.jobs if states[job.plan.name] != "finished" and stage in (None, job.plan.name)]
        findings = check.stop_on_errors(prepared, jobs, run.path)
        say(plan_text(prepared, states) + "\n")
        _record(prepared, run)
        _record_findings(run, findings)
        for job in jobs:
            run_stage(job, run, resume=states[job.plan.name] == "interrupted", probe=probe)
            _evaluate(prepared, run, [job])
        return _deliver(prepared, run)


def compute_reference(
    recipe: Recipe | str | Path, output: str | Path | None = None, overrides: tuple[str, ...] = ()
) -> list[str]:
    """Fill the reference cache for the recipe's DPO stages, as a step of its own; `train` then finds it.

    Args:
        recipe: A recipe, or its file.
        output: The run directory whose finished stages the DPO stages start from.
        overrides: `--set` expressions, where `recipe` is a file.

    Returns:
        The names of the stages that are filled.

    Raises:
        RunError: a stage starts from one that is not finished.
        ToolkitError: as for `train`.
    """
    with _claimed(recipe, output, overrides) as (asked, run):
        if sharding.is_sharded():
            raise RunError("the reference cache is filled by whole models; launch this step with ddp or single_gpu")
        prepared = prepare(asked, run)
        states = _states(prepared, run, None, False)
        jobs = [job for job in prepared.jobs if job.plan.reference_from == "cached"]
        for job in jobs:
            check_parents(prepared, states, job.plan.name)
        _record(prepared, run)
        for job in jobs:
            fill_reference(job)
    return [job.plan.name for job in jobs]


def evaluate_run(
    output: str | Path,
    stages: Sequence[str] = (),
    data: Sequence[str] = (),
    limit: int | None = None,
    seed: int | None = None,
    *,
    trust_remote_code: bool = False,
) -> dict[str, Any]:
    """Measure the base and the finished stages of a run, as `train` does, and write `evaluation.json`.

    Args:
        output: The run directory.
        stages: These stages only; by default every finished one.
        data: Held-out data sets in place of the recipe's.
        limit: At most this many rows of each.
        seed: In place of the recipe's, for what is drawn here: answers and intervals.
        trust_remote_code: Run the Python code of a base that has its own; a run may come from the Hub.

    Returns:
        What stands in `evaluation.json` (see `toolkit.evaluation.evaluate`).

    Raises:
        RunError: it is no run directory, another process is at work in it, nothing in it is finished, or a stage was
            trained from another adapter than is there now.
        ToolkitError: as for `train`.
    """
    run = RunDirectory(Path(output))
    recipe = run.recipe(trust_remote_code)
    hardware = model.detect_hardware()
    main = PartialState().is_main_process
    with run.held() if main else nullcontext():
        recipe = _with_held_out(recipe, data, seed)
        starts = _starts(recipe, run, hardware, stages)
        contenders = evaluate.contenders_of(recipe, run, starts)
        with told("evaluate: measuring base and stages"):
            found = evaluate.evaluate(recipe, hardware, load_tokenizer(recipe), run, contenders, limit=limit)
        if main:
            write_json(run.path / EVALUATION, found)
    say(evaluate.table(found))
    return found


def _with_held_out(recipe: Recipe, data: Sequence[str], seed: int | None) -> Recipe:
    section = recipe.evaluate or Evaluate.model_validate({})
    if data:
        sources = [Source.model_validate({"path": _place(path)}) for path in data]
        section = section.model_copy(update={"data": sources})
    return recipe.adjusted(evaluate=section, **({} if seed is None else {"seed": seed}))


def _starts(recipe: Recipe, run: RunDirectory, hardware: Hardware, stages: Sequence[str]) -> dict[str, Path | None]:
    """The adapters that finished stages were trained from, and are measured against; `None` for the base."""
    records = {stage.name: run.finished(stage.name) for stage in recipe.stages}
    finished = {name: record for name, record in records.items() if record is not None and run.adapter(name).is_dir()}
    if unknown := [name for name in stages if name not in finished] or not finished:
        asked = ", ".join(unknown) if isinstance(unknown, list) else "every stage"
        raise RunError(f"{run.path}: {asked}: not finished here; finished: {', '.join(finished) or 'none'}")
    empty = model.empty_base(recipe)
    starts: dict[str, Path | None] = {}
    for plan in stage_plans(recipe, hardware):
        if plan.name in (stages or finished):
            within = plan.start in records
            start = run.adapter(plan.start) if within else external_adapter(recipe, plan, empty)
            if (found := digest_or_none(start)) != finished[plan.name]["start_digest"]:
                now = "another one now" if found else "not there now"
                raise RunError(
                    f"{run.path}: {plan.name} was trained from {plan.start}, which is {now}; `toolkit train` trains it "
                    f"again, --stage measures others"
                )
            starts[plan.name] = start
    return starts


def _place(path: str) -> str:
    return str(Path(path).resolve()) if Path(path).exists() else path


@contextmanager
def _claimed(
    recipe: Recipe | str | Path, output: str | Path | None, overrides: tuple[str, ...]
) -> Iterator[tuple[Recipe, RunDirectory]]:
    """The recipe, and its run directory held against other runs, before anything slow.

    Raises:
        RunError: on every process, also where only the main one finds the directory held.
    """
    if not isinstance(recipe, Recipe):
        recipe = load_recipe(recipe, overrides)
    run = RunDirectory(Path(output) if output is not None else default_output(recipe))
    model.detect_hardware()  # sets up the process group, by which the processes speak to each other
    refused: RunError | None = None
    with ExitStack() as stack:
        if PartialState().is_main_process:
            try:
                run.claim(recipe)
                stack.enter_context(run.held())
                run.claim(recipe)  # another run may have begun and ended since
            except RunError as error:
                refused = error
        refused = processes.from_main(refused)
        if refused is not None:
            raise refused
        yield recipe, run


def _record(prepared: Prepared, run: RunDirectory) -> None:
    if PartialState().is_main_process:
        run.record(prepared.recipe, resolved(prepared))


def _record_findings(run: RunDirectory, findings: dict[str, list[Finding]]) -> None:
    """Keep what the checks said, beside what they said earlier about stages that are finished."""
    if findings:
        told = {part: [finding.as_dict() for finding in found] for part, found in findings.items()}
        with storage(run.path):
            write_json(run.path / FINDINGS, (read_json(run.path / FINDINGS) or {}) | told)


def _states(prepared: Prepared, run: RunDirectory, only: str | None, fresh: bool) -> dict[str, str]:
    states: dict[str, str] = {}
    rerun: set[str] = set()
    for job in prepared.jobs:
        name = job.plan.name
        asked_again = fresh and only in (None, name)
        states[name] = "new" if asked_again else state_of(job, run, rerun)
        if states[name] != "finished":
            rerun.add(name)
    return dict(processes.from_main(states))  # one decision for all, whatever a shared disk shows to each


def _evaluate(prepared: Prepared, run: RunDirectory, jobs: list[StageJob]) -> Any:
    """Measure base and stages, once each: what is stored and still holds is read."""
    recipe = prepared.recipe
    if recipe.evaluate is None:
        return None
    contenders = evaluate.contenders_of(recipe, run, {job.plan.name: job.start for job in jobs})
    with told("evaluate: measuring base and stages"):
        evaluation = evaluate.evaluate(recipe, prepared.hardware, prepared.tokenizer, run, contenders)
    trainer.release()
    return evaluation


def _deliver(prepared: Prepared, run: RunDirectory) -> RunResult:
    states = _states(prepared, run, None, False)  # with --stage, a stage after it may have become stale
    records = {name: run.finished(name) for name, state in states.items() if state == "finished"}
    done = {name: record for name, record in records.items() if record is not None}
    if len(done) < len(states):
        _report(run)
        return RunResult(run.path, None, done)
    main, target = PartialState().is_main_process, run.path / "adapter"
    if main:
        run.deliver(prepared.jobs[-1].plan.name)
        say(f"adapter: {target}")
    evaluation = _evaluate(prepared, run, prepared.jobs)
    if main:
        if evaluation is not None:
            write_json(run.path / EVALUATION, evaluation)
            say("\n" + evaluate.table(evaluation))
        _report(run)
        with storage(run.path):
            card.write(run.path)
    PartialState().wait_for_everyone()
    pushed = None
    if main and prepared.recipe.hub is not None:  # the others need not wait for the Hub
        pushed = hub.push(run.path, prepared.recipe.hub)
        say(f"\n{pushed}")
    return RunResult(run.path, target, done, evaluation, pushed.url if pushed else None)


def _report(run: RunDirectory) -> None:
    """Write the page about the run; a run is what it is without one."""
    if PartialState().is_main_process:
        try:
            say(f"report: {report.write(run.path)}")
        except Exception as error:  # whatever it is, hours of training are not to end in it
            say(f"report: not written: {first_line(error)}; `toolkit report {run.path}` tries again")
