"""The stages of a recipe in order: skip what is finished, resume what was interrupted, verify what came out."""

import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from accelerate import PartialState
from peft import PeftModel
from safetensors.torch import load_file

from toolkit.checks import check
from toolkit.errors import ModelError, ProofError, RunError
from toolkit.evaluation import evaluate
from toolkit.findings import Finding
from toolkit.job import StageJob
from toolkit.launching import processes
from toolkit.models import adapter, model, sharding
from toolkit.pages import report
from toolkit.publishing import card, hub
from toolkit.recipe.load import load_recipe
from toolkit.recipe.plan import stage_plans
from toolkit.recipe.sections import Evaluate, Recipe, Source
from toolkit.records.rundir import EVALUATION, FINDINGS, RunDirectory, default_output, read_json, storage, write_json
from toolkit.rows.chat import load_tokenizer
from toolkit.training import dpo, proof, provenance, sft, trainer
from toolkit.training.prepare import (
    Prepared,
    attempt_key,
    check_parents,
    external_adapter,
    plan_text,
    prepare,
    resolved,
    start_commit,
    state_of,
)
from toolkit.training.probe import told, work
from toolkit.training.progress import say
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
            _run_stage(job, run, resume=states[job.plan.name] == "interrupted", probe=probe)
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
            say(f"{job.plan.name}: reference, {job.plan.reference}")
            start = _start_logps(job)
            built = _build(job, _load(job))
            dpo.share_prompts(job, built)
            dpo.prove(job, built, start)
            dpo.take_reference(job, built)
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
        What stands in `evaluation.json` (see `toolkit.evaluation.evaluate`); nothing on processes but the main one.

    Raises:
        RunError: it is no run directory, or nothing in it is finished.
        ToolkitError: as for `train`.
    """
    run = RunDirectory(Path(output))
    recipe = run.recipe(trust_remote_code)
    section = recipe.evaluate or Evaluate.model_validate({})
    if data:
        sources = [Source.model_validate({"path": _place(path)}) for path in data]
        section = section.model_copy(update={"data": sources})
    recipe = recipe.adjusted(evaluate=section, **({} if seed is None else {"seed": seed}))
    finished = [stage.name for stage in recipe.stages if run.finished(stage.name)]
    if unknown := [name for name in stages if name not in finished] or not finished:
        asked = ", ".join(unknown) if isinstance(unknown, list) else "every stage"
        raise RunError(f"{run.path}: {asked}: not finished here; finished: {', '.join(finished) or 'none'}")
    hardware, tokenizer = model.detect_hardware(), load_tokenizer(recipe)
    if not PartialState().is_main_process:
        return {}  # one process measures
    empty = model.empty_base(recipe)
    starts = {
        plan.name: run.adapter(plan.start) if plan.start in finished else external_adapter(recipe, plan, empty)
        for plan in stage_plans(recipe, hardware)
        if plan.name in (stages or finished)
    }
    with run.held():
        contenders = evaluate.contenders_of(recipe, run, starts)
        with told("evaluate: measuring base and stages"):
            found = evaluate.evaluate(recipe, hardware, tokenizer, run, contenders, limit=limit)
        write_json(run.path / EVALUATION, found)
    say(evaluate.table(found))
    return found


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


def _run_stage(job: StageJob, run: RunDirectory, resume: bool, probe: bool) -> None:
    """Train, save, reload on a fresh base, compare; only then is the stage called finished."""
    plan, began = job.plan, time.monotonic()
    say(f"{plan.name}: {plan.type}")
    partial, record = _train_stage(job, run, resume, probe)
    trainer.release()
    state = PartialState()
    if state.is_main_process:
        difference = _verify(job, partial, record.pop("policy_logps"))
        record |= {
            "reloaded_vs_policy": difference,
            "adapter_digest": adapter.adapter_digest(partial),
            "seconds": time.monotonic() - began,
        }
        say(f"  saved, reloaded on a fresh base: equal to the trained policy to {difference:.1e} nats per token\n")
        run.finish(plan.name, partial, record)
    state.wait_for_everyone()


def _train_stage(job: StageJob, run: RunDirectory, resume: bool, probe: bool) -> tuple[Path, dict[str, Any]]:
    plan, state = job.plan, PartialState()
    provenance.reset_peak_memory()
    record: dict[str, Any] = {"name": plan.name, "type": plan.type, "digest": job.digest, "start": plan.start}
    record |= {"policy": plan.policy, "reference": plan.reference, "steps": job.steps}
    record["start_digest"] = adapter.adapter_digest(job.start) if job.start else None
    record["start_commit"] = start_commit(job)
    record["provenance"] = provenance.provenance(job.recipe.file, job.hardware.processes)
    start = _start_logps(job) if plan.type == "dpo" else None
    built = _build(job, _load(job, to_shard=True))
    if start is not None:
        record["prefix_sharing"] = dpo.share_prompts(job, built)
        say(f"  prefix sharing {record['prefix_sharing']}")
        if sharding.is_sharded():
            built.add_callback(sharding.OnceSharded(lambda: _prove(job, built, start, record)))
        else:
            _prove(job, built, start, record)
        asked = time.monotonic()
        dpo.take_reference(job, built)
        record["reference_seconds"] = time.monotonic() - asked
    if state.is_main_process:
        run.begin(plan.name, attempt_key(job), resume)
    state.wait_for_everyone()
    watching = dpo.watch_over(job, built) if plan.type == "dpo" else None
    record["metrics"] = trainer.fit(built, job, probe)
    record["peak_memory"] = provenance.peak_memory()
    if watching is not None:
        record |= dpo.outcome(watching, built)
    record["trainer_args"] = built.args.to_dict()
    partial = job.folder / "adapter.partial"
    if sharding.is_sharded() or state.is_main_process:  # every process holds a part of a sharded model
        record["policy_logps"] = _logps_of(job, built.model)
    gathered = sharding.gathered(built.model)
    if state.is_main_process:
        with storage(run.path):
            _save(built.model, job, partial, gathered)
    return partial, record


def _prove(job: StageJob, built: Any, start: Any, record: dict[str, Any]) -> None:
    proven = dpo.prove(job, built, start)
    record["proof"] = proven.as_dict()
    say(f"  proof: {proven}")


@work("loading the base")
def _load(job: StageJob, to_shard: bool = False) -> Any:
    return model.load_base(job.recipe, job.hardware, to_shard)


def _build(job: StageJob, base: Any) -> Any:
    try:
        with told(f"{job.plan.name}: creating the adapter"):
            return sft.build(job, base) if job.plan.type == "sft" else dpo.build(job, base)
    except (ValueError, RuntimeError, ImportError) as error:  # how TRL and transformers refuse settings
        raise ModelError(f"{job.where('trainer')}: {first_line(error)}") from error


def _start_logps(job: StageJob) -> Any:
    """Log-probabilities of the first pairs under the start model, loaded by plain transformers and PEFT.

    By the main process for all where the base is too large for each of them.
    """
    if not sharding.is_sharded():
        return _logps_of_start(job)
    return processes.from_main(_logps_of_start(job) if PartialState().is_main_process else None)


@work("measuring the model it starts from")
def _logps_of_start(job: StageJob) -> Any:
    loaded: Any = model.load_base(job.recipe, job.hardware)
    if job.start is not None:
        loaded = PeftModel.from_pretrained(loaded, str(job.start))
    logps = proof.completion_logps(loaded, proof.first_sequences(job))
    del loaded
    trainer.release()
    return logps


@work("measuring the trained policy")
def _logps_of(job: StageJob, trained: Any) -> Any:
    return proof.completion_logps(trained, proof.first_sequences(job))


def _save(trained: PeftModel, job: StageJob, folder: Path, gathered: Any) -> None:
    stacked = job.plan.mode == "stack" and job.start is not None
    own = folder.with_name("trained.partial") if stacked else folder
    adapter.save(trained, own, _base_name(job.recipe), gathered)
    expected = adapter.expected_shapes(model.empty_base(job.recipe), job.plan, job.start, job.where("lora"))
    sharding.check_gathered(load_file(own / adapter.WEIGHTS), expected)
    adapter.check_values(own)
    if stacked and job.start is not None:
        adapter.concatenate(job.start, own, folder)
        shutil.rmtree(own)
    job.tokenizer.save_pretrained(str(folder))


@work("verifying the saved adapter")
def _verify(job: StageJob, folder: Path, policy_logps: Any) -> float:
    """Load the saved adapter as anyone would, and compare it with the policy that was trained.

    Raises:
        ProofError: they differ by more than rounding.
    """
    batch = proof.first_sequences(job)
    reloaded = PeftModel.from_pretrained(model.load_base(job.recipe, job.hardware), str(folder))
    difference = proof.per_token_difference(proof.completion_logps(reloaded, batch), policy_logps, batch)
    tolerance = proof.OTHER_PATH[proof.rounding(job)]
    if not difference <= tolerance:
        raise ProofError(
            f"{job.plan.name}: the saved adapter, loaded on a fresh base, differs from the trained policy by "
            f"{difference:.3g} nats per token, at most {tolerance:.0e} expected; it lies in {folder} for inspection"
        )
    return difference


def _evaluate(prepared: Prepared, run: RunDirectory, jobs: list[StageJob]) -> Any:
    """Measure base and stages, once each: what is stored and still holds is read."""
    recipe, evaluation = prepared.recipe, None
    if recipe.evaluate is not None and PartialState().is_main_process:
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
    evaluation, target = None, run.path / "adapter"
    if PartialState().is_main_process:
        run.deliver(prepared.jobs[-1].plan.name)
        say(f"adapter: {target}")
        if prepared.recipe.evaluate is not None:
            evaluation = _evaluate(prepared, run, prepared.jobs)
            write_json(run.path / EVALUATION, evaluation)
            say("\n" + evaluate.table(evaluation))
        _report(run)
        with storage(run.path):
            card.write(run.path)
    PartialState().wait_for_everyone()
    pushed = None
    if PartialState().is_main_process and prepared.recipe.hub is not None:  # the others need not wait for the Hub
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


def _base_name(recipe: Recipe) -> str:
    """The base as it may be written down: a Hub id, or the name of a local folder without its place on this machine."""
    path = Path(recipe.model.name_or_path)
    return path.name if path.is_absolute() else recipe.model.name_or_path
