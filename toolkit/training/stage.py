"""One stage from start to finish: train it, save it, reload it on a fresh base, compare."""

import shutil
import time
from functools import partial
from pathlib import Path
from typing import Any

from accelerate import PartialState
from peft import PeftModel
from safetensors.torch import load_file

from toolkit.errors import ModelError, ProofError
from toolkit.job import StageJob
from toolkit.launching import processes
from toolkit.models import adapter, head, model, sharding
from toolkit.recipe.sections import Recipe
from toolkit.records.rundir import RunDirectory, storage
from toolkit.training import dpo, proof, provenance, sft, trainer
from toolkit.training.prepare import (
    attempt_key,
    start_commit,
)
from toolkit.training.probe import told, work
from toolkit.training.progress import say
from toolkit.wording import first_line


def run_stage(job: StageJob, run: RunDirectory, resume: bool, probe: bool) -> None:
    """Train, save, reload on a fresh base, compare; only then is the stage called finished.

    Args:
        resume: Go on from the last good checkpoint.
        probe: On CUDA, try the longest batch before the first step.

    Raises:
        ProofError: the reference is not what it is said to be, or the saved adapter is not the trained policy.
        ToolkitError: as for `toolkit.train`.
    """
    plan, began = job.plan, time.monotonic()
    say(f"{plan.name}: {plan.type}")
    with head.small_tiles(job.hardware.device):
        unverified, record = _trained(job, run, resume, probe)
    trainer.release()
    state = PartialState()
    if state.is_main_process:
        difference = verify(job, unverified, record.pop("policy_logps"))
        record |= {
            "reloaded_vs_policy": difference,
            "adapter_digest": adapter.adapter_digest(unverified),
            "seconds": time.monotonic() - began,
        }
        say(f"  saved, reloaded on a fresh base: equal to the trained policy to {difference:.1e} nats per token\n")
        run.finish(plan.name, unverified, record)
    state.wait_for_everyone()


def fill_reference(job: StageJob) -> None:
    """Compute the reference log-probs of a DPO stage, proven first, and leave them in the cache.

    Raises:
        ToolkitError: as for `run_stage`.
    """
    say(f"{job.plan.name}: reference, {job.plan.reference}")
    start = start_logps(job)
    built = build(job, _load(job))
    with head.small_tiles(job.hardware.device):
        dpo.share_prompts(job, built)
        dpo.prove(job, built, start)
        dpo.take_reference(job, built)


def _trained(job: StageJob, run: RunDirectory, resume: bool, probe: bool) -> tuple[Path, dict[str, Any]]:
    plan, state = job.plan, PartialState()
    provenance.reset_peak_memory()
    record: dict[str, Any] = {"name": plan.name, "type": plan.type, "digest": job.digest, "start": plan.start}
    record |= {"policy": plan.policy, "reference": plan.reference, "steps": job.steps}
    record["start_digest"] = adapter.adapter_digest(job.start) if job.start else None
    record["start_commit"] = start_commit(job)
    record["provenance"] = provenance.provenance(job.recipe.file, job.hardware.processes)
    start = start_logps(job) if plan.type == "dpo" else None
    built = build(job, _load(job, to_shard=True))
    if start is not None:
        if sharding.is_sharded():
            about = {"job": job, "built": built, "run": run, "start": start, "record": record}
            built.add_callback(sharding.OnceSharded(partial(_once_sharded, **about)))
        else:
            _share_prompts(job, built, record)
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
    unverified = job.folder / "adapter.partial"
    if sharding.is_sharded() or state.is_main_process:  # every process holds a part of a sharded model
        record["policy_logps"] = _logps_of(job, built.model)
    gathered = sharding.gathered(built.model)
    if state.is_main_process:
        with storage(run.path):
            _save(built.model, job, unverified, gathered)
    return unverified, record


def _once_sharded(
    resumed: bool, *, job: StageJob, built: Any, run: RunDirectory, start: Any, record: dict[str, Any]
) -> None:
    """What a DPO stage does before its first step, on a model that is sharded by then.

    A stage that resumes has left its start; it was proven when it began.
    """
    _share_prompts(job, built, record)
    if resumed:
        record["proof"] = run.noted(job.plan.name).get("proof")
        return
    _prove(job, built, start, record)
    if PartialState().is_main_process:
        run.note(job.plan.name, proof=record["proof"])


def _share_prompts(job: StageJob, built: Any, record: dict[str, Any]) -> None:
    record["prefix_sharing"] = dpo.share_prompts(job, built)
    say(f"  prefix sharing {record['prefix_sharing']}")


def _prove(job: StageJob, built: Any, start: Any, record: dict[str, Any]) -> None:
    proven = dpo.prove(job, built, start)
    record["proof"] = proven.as_dict()
    say(f"  proof: {proven}")


@work("loading the base")
def _load(job: StageJob, to_shard: bool = False) -> Any:
    return model.load_base(job.recipe, job.hardware, to_shard)


def build(job: StageJob, base: Any) -> Any:
    """TRL's trainer for the stage, ready to train.

    Raises:
        ModelError: settings that TRL or transformers refuse, or that this hardware has no use for.
    """
    if job.hardware.device == "cpu" and job.plan.trainer.get("activation_offloading"):
        where = job.where("trainer", "activation_offloading")
        raise ModelError(f"{where}: moves activations from a GPU to host memory, and there is no GPU here; remove it")
    try:
        with told(f"{job.plan.name}: creating the adapter"):
            return sft.build(job, base) if job.plan.type == "sft" else dpo.build(job, base)
    except (ValueError, RuntimeError, ImportError) as error:  # how TRL and transformers refuse settings
        raise ModelError(f"{job.where('trainer')}: {first_line(error)}") from error


def start_logps(job: StageJob) -> Any:
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
def verify(job: StageJob, folder: Path, policy_logps: Any) -> float:
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


def _base_name(recipe: Recipe) -> str:
    """The base as it may be written down: a Hub id, or the name of a local folder without its place on this machine."""
    path = Path(recipe.model.name_or_path)
    return path.name if path.is_absolute() else recipe.model.name_or_path
