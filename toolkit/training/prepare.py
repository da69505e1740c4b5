"""Everything a run needs before a weight is loaded, and the plan in words: what is trained against what."""

from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from platform import machine, python_version, system
from typing import Any

from toolkit.errors import ModelError, RunError
from toolkit.job import StageJob
from toolkit.launching import processes
from toolkit.models import adapter, model, prefix_check, sharding, targets
from toolkit.recipe.plan import Hardware, StagePlan, digest, model_dtype, quantization, stage_digest, stage_plans
from toolkit.recipe.sections import Recipe
from toolkit.records.rundir import ADAPTER, RunDirectory
from toolkit.rows import chat
from toolkit.rows import data as data_module
from toolkit.rows.data import Counts
from toolkit.rows.lengths import token_lengths
from toolkit.training import checkpoints, dpo, sft
from toolkit.training.progress import say
from toolkit.training.provenance import LIBRARIES
from toolkit.training.trainer import optimizer_steps, repeated_rows
from toolkit.wording import first_line


@dataclass(frozen=True)
class Prepared:
    """A run that is ready to go."""

    recipe: Recipe
    hardware: Hardware
    tokenizer: Any
    base: dict[str, str]
    jobs: list[StageJob]


def prepare(recipe: Recipe, run: RunDirectory) -> Prepared:
    """Resolve, check, load and tokenize everything but the weights.

    Raises:
        ToolkitError: whatever is wrong with the recipe's model, adapters or data, before anything is overwritten.
    """
    hardware = model.detect_hardware()
    processes.check_world(hardware.processes)
    sharding.check(recipe, hardware)
    tokenizer = chat.load_tokenizer(recipe)
    base = model.base_identity(recipe)
    empty = model.empty_base(recipe)
    prepared = Prepared(recipe, hardware, tokenizer, base, [])
    with processes.first_then_others():
        for plan in stage_plans(recipe, hardware):
            prepared.jobs.append(_job(prepared, plan, run, empty))
    return prepared


def state_of(job: StageJob, run: RunDirectory, rerun: set[str]) -> str:
    """`finished`, `interrupted` or `new`. A stage whose start is run again is run again."""
    name = job.plan.name
    record = run.finished(name)
    if job.plan.start in rerun:
        return "new"
    if record is not None and record["digest"] == job.digest:
        if not run.adapter(name).is_dir():  # what was pulled holds records of stages whose adapters it does not hold
            return "new"
        return "finished" if record["start_digest"] == digest_or_none(job.start) else "new"
    started = run.started(name, attempt_key(job))
    return "interrupted" if started and checkpoints.newest(job.folder / checkpoints.FOLDER)[0] else "new"


def attempt_key(job: StageJob) -> str:
    """What an interrupted stage must have been working on to be resumed: its settings, the very adapter it had,
    the same number of processes, since a checkpoint counts its steps and its place in the data by them, and the same
    sharding: transformers would go on without the optimizer's state where it finds none in its own form.
    """
    return digest([job.digest, digest_or_none(job.start), job.steps, job.hardware.processes, sharding.layout()])


def resolved(prepared: Prepared) -> dict[str, Any]:
    """For `resolved.json`: the recipe with every default filled in, and what it stands on."""
    recipe, hardware = prepared.recipe, prepared.hardware
    return {
        "recipe": recipe.model_dump(mode="json", by_alias=True),
        "base": prepared.base,
        "dtype": model_dtype(recipe, hardware),
        "quantization": quantization(recipe),
        "written": recipe.written,
        "own_tokenizer": chat.differs_from_base(recipe, prepared.tokenizer),
        "hardware": asdict(hardware),
        "machine": {"device": model.device_name(), "python": python_version(), "system": f"{system()} {machine()}"},
        "versions": {name: version(name) for name in ("trl-lora-toolkit", *LIBRARIES)},
        "stages": [_resolved_stage(job) for job in prepared.jobs],
    }


def start_commit(job: StageJob) -> str | None:
    """The commit of the Hub adapter that a stage starts from; the client's cache names its folders by it."""
    cached = job.start is not None and job.start.parent.name == "snapshots"
    return job.start.name if cached and job.start else None


def _resolved_stage(job: StageJob) -> dict[str, Any]:
    eval_counts = job.data.eval_counts
    return asdict(job.plan) | {
        "rows": asdict(job.data.counts),
        "eval_rows": asdict(eval_counts) if eval_counts else None,
        "sources": [source.origin for source in job.data.sources],
        "start_commit": start_commit(job),
        "steps": job.steps,
        "trainable_parameters": job.trainable,
        "token_lengths": token_lengths(job.data.train),
        "digest": job.digest,
    }


def plan_text(prepared: Prepared, states: dict[str, str]) -> str:
    """The plan, as it is printed before anything heavy."""
    recipe, hardware = prepared.recipe, prepared.hardware
    quantized = quantization(recipe)
    bits = "" if not quantized else ", nf4" if quantized.get("load_in_4bit") else ", int8"
    processes = "1 process" if hardware.processes == 1 else f"{hardware.processes} processes"
    where = f"{model_dtype(recipe, hardware)}{bits}, on {hardware.device}, {processes}, seed {recipe.seed}"
    lines = [f"base       {_short_name(recipe.model.name_or_path)} ({where})"]
    for job in prepared.jobs:
        lines += ["", *_stage_lines(job, states[job.plan.name])]
    return "\n".join(lines)


def _stage_lines(job: StageJob, state: str) -> list[str]:
    plan, counts = job.plan, job.data.counts
    does = {"finished": "finished: reused", "interrupted": "resumes from its last checkpoint", "new": "runs"}[state]
    lines = [f"{plan.name:<10} {plan.type}, {does}", f"  policy     {_short_name(plan.policy)}"]
    if plan.reference:
        lines.append(f"  reference  {_short_name(plan.reference)}; proven before the first step")
    lines.append(f"  data       {_counts_text(counts)}")
    if job.data.eval_counts:
        lines.append(f"  eval       {_counts_text(job.data.eval_counts)}")
    epochs = plan.trainer["num_train_epochs"]
    length = f"{epochs:g} {'epoch' if epochs == 1 else 'epochs'}"
    if plan.trainer.get("max_steps", -1) > 0:
        length = "as max_steps says"
    lines.append(
        f"  training   {job.steps:,} optimizer steps, {length}, effective batch {plan.batch_size(job.hardware)}, "
        f"learning rate {plan.trainer['learning_rate']:g}"
        + (f", beta {plan.trainer['beta']:g}" if plan.type == "dpo" else "")
    )
    if twice := repeated_rows(job.data.steps_rows, plan, job.hardware):
        lines.append(
            f"  last step  {twice:,} rows of an epoch come twice, to fill the batch of every process; "
            f"dataloader_drop_last leaves that step out"
        )
    if plan.type == "dpo":
        how = f"run twice: {job.no_sharing}" if job.no_sharing else "run once for each pair (checked on the model)"
        source = "once, kept for later runs" if plan.reference_from == "cached" else "on every step"
        source = "on every step, as the model is sharded" if sharding.is_sharded() else source
        lines.append(f"  speed      prompts {how}; reference log-probs computed {source}")
    lines.append(f"  adapter    {job.trainable:,} trainable parameters" + _lora_text(plan))
    return lines


def _lora_text(plan: StagePlan) -> str:
    if not plan.lora:
        return ""
    text = f", r {plan.lora['r']}, alpha {plan.lora['lora_alpha']}"
    if plan.lora.get("lora_dropout") and plan.type == "dpo" and plan.trainer.get("disable_dropout", True):
        text += "; lora_dropout is off here, as disable_dropout is on"
    return text


def _counts_text(counts: Counts) -> str:
    text = f"{counts.rows:,} rows, {counts.tokens:,} tokens, {counts.supervised:,} of them supervised"
    if counts.truncated:
        text += f"; {counts.truncated:,} rows truncated"
    return text + "".join(f"; {n:,} rows dropped: {reason}" for reason, n in counts.dropped.items())


def _short_name(text: str) -> str:
    """Absolute paths by their last part: a plan is read by people, and may be shared."""
    return " ".join(Path(word).name if word.startswith("/") else word for word in text.split(" "))


def _job(prepared: Prepared, plan: StagePlan, run: RunDirectory, empty: Any) -> StageJob:
    recipe, hardware = prepared.recipe, prepared.hardware
    parent = next((job for job in prepared.jobs if job.plan.name == plan.start), None)
    start = run.adapter(plan.start) if parent else external_adapter(recipe, plan, empty)
    if plan.mode == "stack":
        _check_stack(prepared, plan, parent, start)
    trainable = _trainable(recipe, plan, empty, parent, start)
    data = data_module.prepare(recipe, plan, prepared.tokenizer)
    key = stage_digest(
        plan,
        base=prepared.base,
        dtype=model_dtype(recipe, hardware),
        quantization=quantization(recipe),
        attn_implementation=recipe.model.attn_implementation,
        seed=recipe.seed,
        data=data.digest,
        start=parent.digest if parent else adapter.adapter_digest(start) if start else None,
    )
    job = StageJob(
        recipe=recipe,
        plan=plan,
        hardware=hardware,
        base=prepared.base,
        tokenizer=prepared.tokenizer,
        data=data,
        start=start,
        folder=run.folder(plan.name),
        steps=optimizer_steps(data.steps_rows, plan, hardware),
        trainable=trainable,
        digest=key,
        no_sharing=prefix_check.reason_against(empty) if plan.prefix_sharing else "prefix_sharing is false",
    )
    (sft if plan.type == "sft" else dpo).arguments(job)  # a value that TRL refuses is found before anything is trained
    return job


def external_adapter(recipe: Recipe, plan: StagePlan, empty: Any) -> Path | None:
    """The folder of the adapter that a stage starts from; `None` for the base.

    Args:
        empty: the base without its weights, which the adapter must fit.

    Raises:
        ModelError: there is none, or it does not fit.
    """
    if plan.start == "base":
        return None
    where = recipe.where("stages", plan.index, "from")
    folder = Path(plan.start)
    if folder.is_absolute() and not folder.is_dir():
        raise ModelError(f"{where}: no such folder: {folder}")
    if not folder.is_dir():
        folder = _from_hub(plan.start, where)
    elif not (folder / adapter.CONFIG).is_file() and (folder / ADAPTER).is_dir():
        folder = folder / ADAPTER  # a run directory
    missing = [name for name in (adapter.CONFIG, adapter.WEIGHTS) if not (folder / name).is_file()]
    if missing:
        raise ModelError(f"{where}: {plan.start} is not an adapter: no {' and no '.join(missing)}")
    config = adapter.read_config(folder)
    adapter.check_initialisation(config, where)
    adapter.check_fits(folder, empty, where)
    named = str(config.get("base_model_name_or_path") or "")
    if named and Path(named).name != Path(recipe.model.name_or_path).name:
        say(f"warning: {where}: the adapter names {named} as its base; its shapes fit, but is this the same model?")
    return folder


def _from_hub(name: str, where: str) -> Path:
    """The files of an adapter in the client's cache, whose folder is named by the commit that they resolved to."""
    from huggingface_hub import snapshot_download

    repo_id, _, revision = name.partition("@")
    try:
        files = [adapter.CONFIG, adapter.WEIGHTS]
        return Path(snapshot_download(repo_id, revision=revision or None, allow_patterns=files))
    except Exception as error:  # the client raises a dozen unrelated types; all of them mean that it is not to be had
        raise ModelError(f"{where}: no adapter {name!r} on disk or on the Hub: {first_line(error)}") from None


def _check_stack(prepared: Prepared, plan: StagePlan, parent: StageJob | None, start: Path | None) -> None:
    """Refuse a stack whose sum is no plain LoRA; an adapter that was continued is what it was when it was new."""
    recipe = prepared.recipe
    where = recipe.where("stages", plan.index, "lora" if recipe.stages[plan.index].lora else "adapter")
    adapter.check_stackable(plan.lora, where)
    while parent is not None and parent.plan.mode == "continue":
        start = parent.start
        parent = next((job for job in prepared.jobs if job.plan.name == parent.plan.start), None)
    if parent is not None:
        adapter.check_stackable(parent.plan.lora, where)
    elif start is not None:
        adapter.check_stackable(adapter.read_config(start), where)
        adapter.check_matrices(start)


def _trainable(recipe: Recipe, plan: StagePlan, empty: Any, parent: StageJob | None, start: Path | None) -> int:
    """Parameters in training; refuses targets that match nothing."""
    if plan.mode == "continue":
        return parent.trainable if parent else adapter.trainable_parameters(start) if start else 0
    own = recipe.stages[plan.index].lora or {}
    return targets.check_targets(
        empty, plan, lambda key: recipe.where(*(("stages", plan.index) if key in own else ()), "lora", key)
    )


def digest_or_none(start: Path | None) -> str | None:
    """Of the adapter that a stage starts from; `None` for the base, and where there is no adapter."""
    return adapter.adapter_digest(start) if start is not None and (start / adapter.CONFIG).is_file() else None


def check_parents(prepared: Prepared, states: dict[str, str], only: str | None) -> None:
    """With `--stage`, what the stage starts from must be finished already.

    Raises:
        RunError
    """
    starts = {job.plan.name: job.plan.start for job in prepared.jobs}
    if only is None:
        return
    if only not in starts:
        raise RunError(f"{only}: no such stage; the recipe has {', '.join(starts)}")
    start = starts[only]
    if start in starts and states[start] != "finished":
        raise RunError(f"{only}: starts from {start}, which is not finished with these settings; train {start} first")
