"""Everything a run needs before a weight is loaded, and the plan in words: what is trained against what."""

from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from accelerate import PartialState

from toolkit import adapter, chat, dpo, model, sft
from toolkit import data as data_module
from toolkit.data import Counts, StageData
from toolkit.errors import ModelError, RunError
from toolkit.plan import Hardware, StagePlan, as_dict, model_dtype, quantization, stage_digest, stage_plans
from toolkit.recipe import Recipe
from toolkit.rundir import RunDirectory
from toolkit.trainer import last_checkpoint, optimizer_steps

LIBRARIES = ("torch", "transformers", "trl", "peft", "accelerate", "datasets", "bitsandbytes")


@dataclass(frozen=True)
class PreparedStage:
    """A stage, its rows, and the key of everything its result depends on."""

    plan: StagePlan
    data: StageData
    steps: int
    trainable: int
    digest: str
    start_adapter: Path | None
    """Where the adapter lies that the stage starts from; `None` for the base."""


@dataclass(frozen=True)
class Prepared:
    """A run that is ready to go."""

    recipe: Recipe
    hardware: Hardware
    tokenizer: Any
    base: dict[str, str]
    stages: list[PreparedStage]


def prepare(recipe: Recipe, run: RunDirectory) -> Prepared:
    """Resolve, check, load and tokenize everything but the weights.

    Raises:
        ToolkitError: whatever is wrong with the recipe's model, adapters or data, before anything is overwritten.
    """
    hardware = model.detect_hardware()
    tokenizer = chat.load_tokenizer(recipe)
    base = model.base_identity(recipe)
    empty = model.empty_base(recipe)
    stages: list[PreparedStage] = []
    with PartialState().main_process_first():
        for plan in stage_plans(recipe, hardware):
            stages.append(_stage(recipe, plan, run, hardware, tokenizer, base, empty, stages))
    return Prepared(recipe, hardware, tokenizer, base, stages)


def state_of(stage: PreparedStage, run: RunDirectory, rerun: set[str]) -> str:
    """`finished`, `interrupted` or `new`. A stage whose start is run again is run again."""
    record = run.finished(stage.plan.name)
    if stage.plan.start in rerun:
        return "new"
    if record is not None and record["digest"] == stage.digest:
        same_start = stage.start_adapter is None or record["start_digest"] == _digest_or_none(stage.start_adapter)
        return "finished" if same_start else "new"
    if run.started(stage.plan.name, stage.digest) and last_checkpoint(run.folder(stage.plan.name) / "checkpoints"):
        return "interrupted"
    return "new"


def resolved(prepared: Prepared) -> dict[str, Any]:
    """For `resolved.json`: the recipe with every default filled in, and what it stands on."""
    recipe, hardware = prepared.recipe, prepared.hardware
    return {
        "recipe": recipe.model_dump(mode="json", by_alias=True),
        "base": prepared.base,
        "dtype": model_dtype(recipe, hardware),
        "quantization": quantization(recipe),
        "hardware": asdict(hardware),
        "versions": {name: version(name) for name in LIBRARIES},
        "stages": [
            as_dict(stage.plan)
            | {
                "rows": asdict(stage.data.counts),
                "eval_rows": asdict(stage.data.eval_counts) if stage.data.eval_counts else None,
                "steps": stage.steps,
                "trainable_parameters": stage.trainable,
                "digest": stage.digest,
            }
            for stage in prepared.stages
        ],
    }


def plan_text(prepared: Prepared, states: dict[str, str]) -> str:
    """The plan, as it is printed before anything heavy."""
    recipe, hardware = prepared.recipe, prepared.hardware
    quantized = quantization(recipe)
    bits = "" if not quantized else ", nf4" if quantized.get("load_in_4bit") else ", int8"
    processes = "1 process" if hardware.processes == 1 else f"{hardware.processes} processes"
    where = f"{model_dtype(recipe, hardware)}{bits}, on {hardware.device}, {processes}, seed {recipe.seed}"
    lines = [f"base       {_short_name(recipe.model.name_or_path)} ({where})"]
    for stage in prepared.stages:
        lines += ["", *_stage_lines(stage, hardware, states[stage.plan.name])]
    return "\n".join(lines)


def _stage_lines(stage: PreparedStage, hardware: Hardware, state: str) -> list[str]:
    plan, counts = stage.plan, stage.data.counts
    does = {"finished": "finished: reused", "interrupted": "resumes from its last checkpoint", "new": "runs"}[state]
    lines = [f"{plan.name:<10} {plan.type}, {does}", f"  policy     {_short_name(plan.policy)}"]
    if plan.reference:
        lines.append(f"  reference  {_short_name(plan.reference)}; proven before the first step")
    lines.append(f"  data       {_counts_text(counts)}")
    if stage.data.eval_counts:
        lines.append(f"  eval       {_counts_text(stage.data.eval_counts)}")
    epochs = plan.trainer["num_train_epochs"]
    lines.append(
        f"  training   {stage.steps:,} optimizer steps, {epochs:g} {'epoch' if epochs == 1 else 'epochs'}, effective "
        f"batch {plan.batch_size(hardware)}, learning rate {plan.trainer['learning_rate']:g}"
        + (f", beta {plan.trainer['beta']:g}" if plan.type == "dpo" else "")
    )
    lines.append(f"  adapter    {stage.trainable:,} trainable parameters" + _lora_text(plan))
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


def _stage(
    recipe: Recipe,
    plan: StagePlan,
    run: RunDirectory,
    hardware: Hardware,
    tokenizer: Any,
    base: dict[str, str],
    empty: Any,
    earlier: list[PreparedStage],
) -> PreparedStage:
    parent = next((stage for stage in earlier if stage.plan.name == plan.start), None)
    start = _start_adapter(recipe, plan, run, parent)
    trainable = _trainable(recipe, plan, empty, start if parent is None else None, parent)
    (sft if plan.type == "sft" else dpo).arguments(recipe, plan, run.folder(plan.name), hardware)
    data = data_module.prepare(recipe, plan, tokenizer)
    digest = stage_digest(
        plan,
        base=base,
        dtype=model_dtype(recipe, hardware),
        quantization=quantization(recipe),
        attn_implementation=recipe.model.attn_implementation,
        seed=recipe.seed,
        data=data.digest,
        start=parent.digest if parent else adapter.adapter_digest(start) if start else None,
    )
    steps = optimizer_steps(data.steps_rows, plan, hardware)
    return PreparedStage(plan, data, steps, trainable, digest, start)


def _start_adapter(recipe: Recipe, plan: StagePlan, run: RunDirectory, parent: PreparedStage | None) -> Path | None:
    if plan.start == "base":
        return None
    if parent is not None:
        return run.adapter(plan.start)
    where = recipe.where("stages", plan.index, "from")
    folder = Path(plan.start)
    if not folder.is_dir():
        folder = _from_hub(plan.start, where)
    missing = [name for name in (adapter.CONFIG, adapter.WEIGHTS) if not (folder / name).is_file()]
    if missing:
        raise ModelError(f"{where}: {plan.start} is not an adapter: no {' and no '.join(missing)}")
    return folder


def _from_hub(name: str, where: str) -> Path:
    from huggingface_hub import snapshot_download

    repo_id, _, revision = name.partition("@")
    try:
        files = [adapter.CONFIG, adapter.WEIGHTS]
        return Path(snapshot_download(repo_id, revision=revision or None, allow_patterns=files))
    except Exception as error:  # the client raises a dozen unrelated types; all of them mean that it is not to be had
        raise ModelError(f"{where}: no adapter {name!r} on disk or on the Hub: {chat.first_line(error)}") from None


def _trainable(
    recipe: Recipe, plan: StagePlan, empty: Any, start: Path | None, parent: PreparedStage | None
) -> int:
    where = recipe.where("stages", plan.index, "lora" if recipe.stages[plan.index].lora else "adapter")
    if plan.mode == "stack":
        adapter.check_stackable(plan.lora, where)
        start_config = adapter.read_config(start) if start else (parent.plan.lora if parent else {})
        adapter.check_stackable(start_config, where)
    if start is not None:
        adapter.check_initialisation(adapter.read_config(start), recipe.where("stages", plan.index, "from"))
    if plan.mode != "continue":
        return adapter.check_targets(empty, plan, recipe.where("lora", "target_modules"))
    return parent.trainable if parent else adapter.trainable_parameters(start) if start else 0


def _digest_or_none(folder: Path) -> str | None:
    return adapter.adapter_digest(folder) if (folder / adapter.CONFIG).is_file() else None


def check_parents(prepared: Prepared, states: dict[str, str], only: str | None) -> None:
    """With `--stage`, what the stage starts from must be finished already.

    Raises:
        RunError
    """
    names = [stage.plan.name for stage in prepared.stages]
    if only is None:
        return
    if only not in names:
        raise RunError(f"--stage {only}: no such stage; the recipe has {', '.join(names)}")
    start = next(stage.plan.start for stage in prepared.stages if stage.plan.name == only)
    if start in names and states[start] != "finished":
        raise RunError(f"--stage {only}: starts from {start}, which is not finished; run it first, or leave --stage out")
