"""The stages of a recipe in order: skip what is finished, resume what was interrupted, verify what came out."""

import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from accelerate import PartialState
from peft import PeftModel

from toolkit import adapter, dpo, evaluate, model, reference, sft, trainer
from toolkit.errors import ProofError
from toolkit.load import load_recipe
from toolkit.plan import model_dtype, quantization
from toolkit.prepare import Prepared, PreparedStage, check_parents, plan_text, prepare, resolved, state_of
from toolkit.recipe import Recipe
from toolkit.rundir import RunDirectory, default_output, storage, write_json

VERIFIED_ROWS = 4


@dataclass(frozen=True)
class RunResult:
    """What a run left behind."""

    output: Path
    adapter: Path | None
    """The deliverable; `None` where `--stage` left stages unfinished."""
    stages: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Stage name -> its `stage.json`."""
    evaluation: dict[str, Any] | None = None


def train(
    recipe: Recipe | str | Path,
    output: str | Path | None = None,
    stage: str | None = None,
    fresh: bool = False,
    overrides: tuple[str, ...] = (),
) -> RunResult:
    """Run a recipe's stages and hand back one adapter.

    Args:
        recipe: A recipe, or its file.
        output: The run directory; by default `runs/FOLDER-RECIPE`.
        stage: Run this stage only; what it starts from must be finished.
        fresh: Run again what is finished (the stage named, or all). The results before are kept in `STAGE.previous`.
        overrides: `--set` expressions, where `recipe` is a file.

    Raises:
        ToolkitError: bad input, or a result that failed its proof.
    """
    if not isinstance(recipe, Recipe):
        recipe = load_recipe(recipe, overrides)
    run = RunDirectory(Path(output) if output is not None else default_output(recipe))
    run.claim(recipe)
    prepared = prepare(recipe, run)
    states = _states(prepared, run, stage, fresh)
    check_parents(prepared, states, stage)
    if recipe.evaluate is not None:
        evaluate.held_out_rows(recipe)  # a column missing there should not be found after hours of training
    _say(plan_text(prepared, states) + "\n")
    if PartialState().is_main_process:
        run.record(recipe, resolved(prepared))
    for prepared_stage in prepared.stages:
        if states[prepared_stage.plan.name] != "finished" and stage in (None, prepared_stage.plan.name):
            _run_stage(prepared, prepared_stage, run)
    return _deliver(prepared, run)


def _states(prepared: Prepared, run: RunDirectory, only: str | None, fresh: bool) -> dict[str, str]:
    states: dict[str, str] = {}
    rerun: set[str] = set()
    for stage in prepared.stages:
        name = stage.plan.name
        asked_again = fresh and only in (None, name)
        states[name] = "new" if asked_again else state_of(stage, run, rerun)
        if states[name] != "finished":
            rerun.add(name)
    return states


def _run_stage(prepared: Prepared, stage: PreparedStage, run: RunDirectory) -> None:
    """Train, save, reload on a fresh base, compare; only then is the stage called finished."""
    plan, began = stage.plan, time.monotonic()
    _say(f"{plan.name}: {plan.type}")
    partial, record = _train_stage(prepared, stage, run)
    trainer.release()
    state = PartialState()
    if state.is_main_process:
        difference = _verify(prepared, stage, partial, record.pop("policy_logps"))
        record |= {
            "reloaded_vs_policy": difference,
            "adapter_digest": adapter.adapter_digest(partial),
            "seconds": time.monotonic() - began,
        }
        _say(f"  saved, reloaded on a fresh base: equal to the trained policy to {difference:.1e} nats per token\n")
        run.finish(plan.name, partial, record)
    state.wait_for_everyone()


def _train_stage(prepared: Prepared, stage: PreparedStage, run: RunDirectory) -> tuple[Path, dict[str, Any]]:
    recipe, plan, data = prepared.recipe, stage.plan, stage.data
    record: dict[str, Any] = {"name": plan.name, "type": plan.type, "digest": stage.digest, "start": plan.start}
    record |= {"policy": plan.policy, "reference": plan.reference, "steps": stage.steps}
    record["start_digest"] = adapter.adapter_digest(stage.start_adapter) if stage.start_adapter else None
    start = _start_logps(prepared, stage) if plan.type == "dpo" else None
    base = model.load_base(recipe, prepared.hardware)
    arguments = (recipe, plan, data, base, prepared.tokenizer, stage.start_adapter, run.folder(plan.name), prepared.hardware)
    built: Any = sft.build(*arguments) if plan.type == "sft" else dpo.build(*arguments)
    if start is not None:
        proof = dpo.prove(built, plan, start, recipe, prepared.hardware)
        record["proof"] = proof.as_dict()
        _say(f"  proof: {proof}")
    state = PartialState()
    if state.is_main_process:
        run.begin(plan.name, stage.digest)
    state.wait_for_everyone()
    record["metrics"] = trainer.fit(built, plan, run.folder(plan.name))
    record["trainer_args"] = built.args.to_dict()
    partial = run.folder(plan.name) / "adapter.partial"
    if state.is_main_process:
        record["policy_logps"] = reference.completion_logps(built.model, _probe(prepared, stage))
        with storage(run.path):
            _save(built.model, stage, prepared, partial)
    return partial, record


def _start_logps(prepared: Prepared, stage: PreparedStage) -> Any:
    """Log-probabilities of the first pairs under the start model, loaded by plain transformers and PEFT."""
    loaded: Any = model.load_base(prepared.recipe, prepared.hardware)
    if stage.start_adapter is not None:
        loaded = PeftModel.from_pretrained(loaded, str(stage.start_adapter))
    max_length = stage.plan.trainer.get("max_length", 1024)
    logps = dpo.start_logps(stage.data.train, loaded, prepared.tokenizer, max_length)
    del loaded
    trainer.release()
    return logps


def _save(trained: PeftModel, stage: PreparedStage, prepared: Prepared, folder: Path) -> None:
    name = _base_name(prepared.recipe)
    if stage.plan.mode == "stack" and stage.start_adapter is not None:
        own = folder.with_name("trained.partial")
        adapter.save(trained, own, name)
        adapter.check_values(own)
        adapter.concatenate(stage.start_adapter, own, folder)
        for file in own.iterdir():
            file.unlink()
        own.rmdir()
    else:
        adapter.save(trained, folder, name)
        adapter.check_values(folder)
    prepared.tokenizer.save_pretrained(str(folder))


def _verify(prepared: Prepared, stage: PreparedStage, folder: Path, policy_logps: Any) -> float:
    """Load the saved adapter as anyone would, and compare it with the policy that was trained.

    Raises:
        ProofError: they differ by more than rounding.
    """
    recipe, hardware = prepared.recipe, prepared.hardware
    batch = _probe(prepared, stage)
    reloaded = PeftModel.from_pretrained(model.load_base(recipe, hardware), str(folder))
    difference = reference.per_token_difference(reference.completion_logps(reloaded, batch), policy_logps, batch)
    rounds_in_16_bits = stage.plan.trainer["bf16"] or stage.plan.trainer.get("fp16") or quantization(recipe)
    tolerance = reference.OTHER_PATH["bfloat16" if rounds_in_16_bits else model_dtype(recipe, hardware)]
    if not difference <= tolerance:
        raise ProofError(
            f"{stage.plan.name}: the saved adapter, loaded on a fresh base, differs from the trained policy by "
            f"{difference:.3g} nats per token, at most {tolerance:.0e} expected; it lies in {folder} for inspection"
        )
    return difference


def _probe(prepared: Prepared, stage: PreparedStage) -> reference.Sequences:
    rows = [stage.data.train[i] for i in range(min(VERIFIED_ROWS, len(stage.data.train)))]
    return reference.sequences(rows, prepared.tokenizer.pad_token_id, stage.plan.trainer.get("max_length", 1024))


def _deliver(prepared: Prepared, run: RunDirectory) -> RunResult:
    records = {s.plan.name: run.finished(s.plan.name) for s in prepared.stages}
    done = {name: record for name, record in records.items() if record is not None}
    if len(done) < len(records):
        return RunResult(run.path, None, done)
    evaluation = None
    if PartialState().is_main_process:
        target = run.deliver(prepared.stages[-1].plan.name)
        _say(f"adapter: {target}")
        if prepared.recipe.evaluate is not None:
            adapters = {stage.plan.name: run.adapter(stage.plan.name) for stage in prepared.stages}
            evaluation = evaluate.evaluate(prepared.recipe, prepared.hardware, prepared.tokenizer, adapters)
            write_json(run.path / "evaluation.json", evaluation)
            _say("\n" + evaluate.table(evaluation))
    PartialState().wait_for_everyone()
    return RunResult(run.path, run.path / "adapter", done, evaluation)


def _base_name(recipe: Recipe) -> str:
    """The base as it may be written down: a Hub id, or the name of a local folder without its place on this machine."""
    path = Path(recipe.model.name_or_path)
    return path.name if path.is_absolute() else recipe.model.name_or_path


def _say(text: str) -> None:
    if PartialState().is_main_process:
        print(text, flush=True)
