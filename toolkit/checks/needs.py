"""What each stage will need, for the launch it is meant for, and whether this machine has it."""

from dataclasses import replace
from pathlib import Path

from toolkit.findings import Finding
from toolkit.job import StageJob
from toolkit.launching.division import Sharding, mapping_of
from toolkit.models import model
from toolkit.recipe.plan import Hardware, stage_plans
from toolkit.resources import estimate, fit
from toolkit.training import cache
from toolkit.training.trainer import optimizer_steps
from toolkit.wording import first_line


def check_resources(
    jobs: list[StageJob],
    output: Path,
    sharding: Sharding | None = None,
    *,
    this_machine: bool = True,
    told: bool = True,
) -> list[Finding]:
    """The estimate of each stage as a note; what does not fit, or hardly.

    Args:
        output: the run directory.
        sharding: see `estimate.estimate`.
        this_machine: whether the stages are meant for this machine's GPU.
        told: whether notes will be read; without a GPU it saves running the model's code where they are not.
    """
    if not jobs:
        return []
    free = fit.free_bytes([output, cache.folder()])
    device = fit.device_bytes() if this_machine and jobs[0].hardware.device == "cuda" else None
    if device is None and not told:
        return fit.disk_findings([estimate.disk(job) for job in jobs], free)
    try:
        empty = model.empty_base(jobs[0].recipe)
        stages = [estimate.estimate(job, empty, sharding) for job in jobs]
    except Exception as error:  # runs a model's own code; without an estimate a run is as good as before
        text = f"memory and disk could not be estimated: {type(error).__name__}: {first_line(error)}"
        return [Finding("note", "estimate", jobs[0].recipe.where("model", "name_or_path"), text)]
    notes = [Finding("note", "estimate", s.name, estimate.text(s).removeprefix(s.name).lstrip()) for s in stages]
    return notes + fit.findings(stages, device, free)


def hardware_of(file: Path, sharding: Sharding, here: Hardware) -> Hardware:
    """What an accelerate config file runs on: this machine's device, or GPUs that compute in bf16 where it has none."""
    if mapping_of(file).get("use_cpu"):
        return Hardware("cpu", bf16=False, processes=sharding.processes)
    if here.device != "cpu":
        return replace(here, processes=sharding.processes)
    return Hardware("cuda", bf16=True, processes=sharding.processes)


def planned_for(job: StageJob, hardware: Hardware) -> StageJob:
    """The same stage on other hardware: its plan and its number of steps."""
    plan = stage_plans(job.recipe, hardware)[job.plan.index]
    steps = optimizer_steps(job.data.steps_rows, plan, hardware)
    return replace(job, plan=plan, hardware=hardware, steps=steps)
