"""What is finished is reused, what changed is run again, what was killed goes on, to the bit."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

import toolkit
from tests.conftest import messages, pairs, write_jsonl
from tests.forks import Forks
from toolkit.training.progress import read_metrics


@pytest.fixture
def train(recipe: dict[str, Any], write: Any, tmp_path: Path) -> Any:
    """Train the recipe as it stands into `run`."""
    return lambda **options: toolkit.train(write(recipe), output=options.pop("output", tmp_path / "run"), **options)


def stamps(result: toolkit.RunResult) -> dict[str, int]:
    """When each stage finished: a stage that is reused keeps its stamp."""
    return {name: (result.output / name / "stage.json").stat().st_mtime_ns for name in result.stages}


def rerun(before: dict[str, int], after: dict[str, int]) -> list[str]:
    return [name for name in after if before.get(name) != after[name]]


def test_finished_stages_are_reused(train: Any) -> None:
    first, second = train(), train()
    assert rerun(stamps(first), stamps(second)) == [] or stamps(first) == stamps(second)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ("stages.dpo.trainer.beta=0.3", ["dpo"]),
        ("stages.sft.trainer.learning_rate=5e-3", ["sft", "dpo"]),
        ("lora.r=2", ["sft", "dpo"]),
        ("stages.dpo.data=[{path: DPO, limit: 8}]", ["dpo"]),
        ("seed=8", ["sft", "dpo"]),
        ("stages.sft.trainer.logging_steps=2", []),
    ],
)
def test_a_changed_stage_and_its_descendants_run_again(
    train: Any, recipe: dict[str, Any], write: Any, tmp_path: Path, change: str, expected: list[str]
) -> None:
    before = stamps(train())
    change = change.replace("DPO", str(tmp_path / "dpo.jsonl"))
    after = stamps(toolkit.train(write(recipe), output=tmp_path / "run", overrides=(change,)))
    assert rerun(before, after) == expected
    assert (tmp_path / "run" / "dpo.previous" / "stage.json").exists() == ("dpo" in expected)


def test_changed_data_runs_again(train: Any, tmp_path: Path) -> None:
    before = stamps(train())
    file = tmp_path / "sft.jsonl"
    file.write_text(file.read_text().replace("it is", "it was"))
    assert rerun(before, stamps(train())) == ["sft", "dpo"]


def test_stage_and_fresh(train: Any) -> None:
    with pytest.raises(toolkit.RunError, match="starts from sft, which is not finished with these settings"):
        train(stage="dpo")
    first = train(stage="sft")
    assert (list(first.stages), first.adapter) == (["sft"], None)
    second = train(stage="dpo")
    assert rerun(stamps(first), stamps(second)) == ["dpo"]
    assert second.adapter is not None
    assert rerun(stamps(second), stamps(train(stage="dpo", fresh=True))) == ["dpo"]
    assert rerun(stamps(second), stamps(train(fresh=True))) == ["sft", "dpo"]


def test_a_stage_on_a_parent_that_was_replaced_runs_again(train: Any, tmp_path: Path) -> None:
    before = stamps(train())
    config = tmp_path / "run" / "sft" / "adapter" / "adapter_config.json"
    config.write_text(config.read_text().replace('"lora_alpha": 8', '"lora_alpha": 4'))
    assert rerun(before, stamps(train())) == ["dpo"]


def test_an_unfinished_attempt_never_takes_the_place_of_a_result(train: Any, tmp_path: Path) -> None:
    """The result before last is kept while a changed stage is interrupted and started again."""
    from toolkit.records.rundir import RunDirectory

    train(stage="sft")
    run = RunDirectory(tmp_path / "run")
    run.begin("sft", "changed", resume=False)
    run.begin("sft", "changed again", resume=False)
    assert (tmp_path / "run" / "sft.previous" / "stage.json").exists()
    assert not run.started("sft", "changed")


def command(file: Path, output: Path) -> list[str]:
    return ["train", str(file), "--output", str(output)]


@pytest.fixture(scope="module")
def uninterrupted(base: Path, forks: Forks, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A recipe with dropout and checkpoints, and its run."""
    folder = tmp_path_factory.mktemp("uninterrupted")
    trainer = {"per_device_train_batch_size": 4, "gradient_checkpointing": False, "logging_steps": 1}
    trainer |= {"learning_rate": 1e-2, "save_steps": 2, "num_train_epochs": 2}
    data = {"sft": write_jsonl(folder / "sft.jsonl", messages(12)), "dpo": write_jsonl(folder / "dpo.jsonl", pairs(12))}
    stages = [{"type": kind, "data": str(file), "trainer": trainer} for kind, file in data.items()]
    model, lora = {"name_or_path": str(base), "dtype": "float32"}, {"r": 4, "lora_dropout": 0.1}
    file = folder / "recipe.yaml"
    file.write_text(yaml.safe_dump({"model": model, "lora": lora, "stages": stages, "seed": 7}))
    assert forks.run(*command(file, folder / "whole"), TOOLKIT_CACHE=str(folder / "cache"))[0] == 0
    return file, folder / "whole"


@pytest.mark.parametrize(
    ("event", "at", "resumes"),
    [
        ("print", "sft 2/", ""),
        ("print", "sft 5/", "checkpoint-4"),
        ("os.rename", "sft/checkpoints/checkpoint-4", "checkpoint-2"),
        ("open", "sft/adapter.partial/adapter_config.json", "checkpoint-6"),
        ("print", "dpo: dpo", ""),
        ("os.rename", ".safetensors", ""),  # the reference pass has been computed
        ("print", "dpo 5/", "checkpoint-4"),
        ("open", "dpo/checkpoints/.partial/checkpoint-6/.manifest.json.partial", "checkpoint-4"),
        ("open", "dpo/adapter.partial/adapter_config.json", "checkpoint-6"),
        ("os.rename", "dpo/adapter", "checkpoint-6"),
        ("os.rename", "dpo/stage.json", "checkpoint-6"),
        ("open", "killed/adapter.partial/adapter_model.safetensors", ""),
    ],
)
def test_a_killed_run_goes_on_to_the_same_bits(
    forks: Forks, uninterrupted: tuple[Path, Path], tmp_path: Path, event: str, at: str, resumes: str
) -> None:
    (file, whole), output, own = uninterrupted, tmp_path / "killed", {"TOOLKIT_CACHE": str(tmp_path / "cache")}
    assert forks.run(*command(file, output), at=(event, at), **own)[0] == -signal.SIGKILL
    assert_what_looks_finished_is_whole(output)
    code, said = forks.run(*command(file, output), **own)
    assert code == 0, said
    assert f"resumes from {resumes}" in said if resumes else "resumes from" not in said
    for name in ("sft/adapter", "dpo/adapter", "adapter"):
        assert adapter_bits(output, name) == adapter_bits(whole, name)
    for stage in ("sft", "dpo"):
        steps = [[line["step"] for line in read_metrics(run / stage / "metrics.jsonl")] for run in (whole, output)]
        assert steps[0] == steps[1]
        assert sorted(p.name for p in (output / stage).iterdir()) == sorted(p.name for p in (whole / stage).iterdir())
    assert sorted(p.name for p in output.iterdir()) == sorted(p.name for p in whole.iterdir())


@pytest.mark.parametrize(
    ("event", "at", "resumes"),
    [
        ("os.mkdir", "dpo/checkpoints/.partial/checkpoint-4", "checkpoint-2"),  # before its adapter
        ("os.remove", "dpo/checkpoints/.partial/checkpoint-4/README.md", "checkpoint-2"),  # after it
        ("os.mkdir", "dpo/adapter.partial", "checkpoint-6"),
        ("open", "dpo/.stage.json.partial", "checkpoint-6"),
        ("os.mkdir", "run/adapter.partial", ""),
    ],
)
def test_a_full_disk_ends_a_run_that_goes_on_to_the_same_bits_when_there_is_room(
    forks: Forks, uninterrupted: tuple[Path, Path], event: str, at: str, resumes: str
) -> None:
    if forks.disk is None:
        pytest.skip("needs a system that lets a user mount a disk (unshare -rm)")
    (file, whole), output = uninterrupted, forks.seen / "run"
    shutil.rmtree(output, ignore_errors=True)
    own = {"TOOLKIT_CACHE": str(whole.parent / "cache")}
    code, said = forks.run(*command(file, forks.disk / "run"), at=(event, at), then="fill", **own)
    errors = [line for line in said.splitlines() if line.startswith("error")]
    assert (code, len(errors)) == (2, 1), said
    assert ": the disk is full; free some space or choose another --output, then run the same command" in errors[0]
    assert "Traceback" not in said
    assert_what_looks_finished_is_whole(output)
    assert (output / "sft" / "stage.json").exists()
    (forks.seen / "ballast").unlink()
    code, said = forks.run(*command(file, forks.disk / "run"), **own)
    assert code == 0, said
    assert f"resumes from {resumes}" in said if resumes else "resumes from" not in said
    assert adapter_bits(output) == adapter_bits(whole)
    assert sorted(p.name for p in output.iterdir()) == sorted(p.name for p in whole.iterdir())


def test_a_limit_on_open_files_ends_a_run_that_goes_on_to_the_same_bits(
    forks: Forks, uninterrupted: tuple[Path, Path], tmp_path: Path
) -> None:
    (file, whole), own = uninterrupted, {"TOOLKIT_CACHE": str(uninterrupted[0].parent / "cache")}
    code, said = forks.run(*command(file, tmp_path / "run"), at=("print", "dpo 3/"), then="open", **own)
    assert code == 2
    assert "error: " in said and "run/dpo: too many open files; raise `ulimit -n`" in said and "Traceback" not in said
    assert_what_looks_finished_is_whole(tmp_path / "run")
    code, said = forks.run(*command(file, tmp_path / "run"), **own)
    assert (code, "resumes from checkpoint-2" in said) == (0, True)
    assert adapter_bits(tmp_path / "run") == adapter_bits(whole)


def test_rows_whose_files_are_cut_off_in_mid_epoch_are_trained_on_all_the_same(
    forks: Forks, uninterrupted: tuple[Path, Path], tmp_path: Path
) -> None:
    (file, whole), own = uninterrupted, {"TOOLKIT_CACHE": str(uninterrupted[0].parent / "cache")}
    code, said = forks.run(*command(file, tmp_path / "run"), at=("print", "sft 2/"), then="cut", **own)
    assert code == 0, said
    assert int(said.split("cut off: ")[1].split()[0]) >= 2
    assert adapter_bits(tmp_path / "run") == adapter_bits(whole)


def adapter_bits(run: Path, name: str = "adapter") -> bytes:
    return (run / name / "adapter_model.safetensors").read_bytes()


def assert_what_looks_finished_is_whole(output: Path) -> None:
    from toolkit.models.adapter import adapter_digest
    from toolkit.training import checkpoints

    digests = {}
    for stage in ("sft", "dpo"):
        for path in checkpoints.by_age(output / stage / "checkpoints"):
            assert checkpoints.problem_with(path) is None
        if (output / stage / "stage.json").exists():
            digests[stage] = json.loads((output / stage / "stage.json").read_text())["adapter_digest"]
            assert adapter_digest(output / stage / "adapter") == digests[stage]
    if (output / "adapter").exists():
        assert adapter_digest(output / "adapter") == digests["dpo"]


def test_anothers_directory_is_left_alone(train: Any, recipe: dict[str, Any], write: Any, tmp_path: Path) -> None:
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "thesis.tex").write_text("years of work")
    with pytest.raises(toolkit.RunError, match="is not a run directory; choose another with --output"):
        train(output=mine)
    assert [p.name for p in mine.iterdir()] == ["thesis.tex"]
    before = stamps(train(stage="sft"))
    with pytest.raises(toolkit.RunError, match=r"holds the run of .*/recipe.yaml on .*, this is .*/other.yaml"):
        toolkit.train(write(recipe, "other.yaml"), output=tmp_path / "run")
    assert stamps(train(stage="sft")) == before


def test_the_recipe_and_what_it_resolved_to_are_kept(train: Any, recipe: dict[str, Any]) -> None:
    output = train(stage="sft").output
    assert yaml.safe_load((output / "recipe.yaml").read_text()) == recipe
    resolved = yaml.safe_load((output / "resolved.json").read_text())
    assert resolved["stages"][1]["trainer"]["beta"] == 0.1
    assert resolved["recipe"]["model"]["revision"] is None
    assert resolved["dtype"] == "float32"
    assert len(resolved["base"]["sha256"]) == 64


def test_a_stage_that_became_stale_is_not_delivered(
    train: Any, recipe: dict[str, Any], write: Any, tmp_path: Path
) -> None:
    train()
    result = toolkit.train(write(recipe), output=tmp_path / "run", stage="sft", overrides=("lora.r=2",))
    assert (result.adapter, list(result.stages)) == (None, ["sft"])
    assert not (tmp_path / "run" / "adapter").exists()
    assert (tmp_path / "run" / "dpo" / "adapter").exists()


def test_a_second_run_in_the_same_directory_is_refused(train: Any, tmp_path: Path) -> None:
    from toolkit.records.rundir import RunDirectory

    train(stage="sft")
    with (
        RunDirectory(tmp_path / "run").held(),
        pytest.raises(toolkit.RunError, match=rf"process {os.getpid()} on .* is at work"),
    ):
        train()
    assert train().adapter is not None


@pytest.mark.parametrize(("signum", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 75)])
def test_a_signal_ends_the_run_with_a_checkpoint_and_the_command_that_resumes(
    recipe: dict[str, Any], write: Any, tmp_path: Path, signum: signal.Signals, code: int
) -> None:
    for stage in recipe["stages"]:
        stage["trainer"] |= {"save_strategy": "steps", "save_steps": 100, "num_train_epochs": 2}
    file = write(recipe)
    whole = toolkit.train(file, output=tmp_path / "whole").output
    listen = lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)  # noqa: E731 - a job in the background ignores it
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    started = [sys.executable, "-m", "toolkit", *command(file, tmp_path / "run")]
    process = subprocess.Popen(started, preexec_fn=listen, **pipes)  # noqa: PLW1509
    assert process.stdout is not None and process.stderr is not None
    for printed in process.stdout:
        if printed.strip().startswith("sft 3/"):
            process.send_signal(signum)
            break
    process.stdout.read()
    said = process.stderr.read()
    assert f"stopped by {signum.name} after step" in said
    assert f"resume with:\n  python -m toolkit train {file} --output {tmp_path / 'run'}" in said
    assert process.wait() == code
    assert list((tmp_path / "run" / "sft" / "checkpoints").glob("checkpoint-[345]"))
    toolkit.train(file, output=tmp_path / "run")
    assert adapter_bits(tmp_path / "run") == adapter_bits(whole)


def test_another_number_of_processes_does_not_resume(recipe: dict[str, Any], write: Any, tmp_path: Path) -> None:
    from dataclasses import replace

    from toolkit.recipe.plan import Hardware
    from toolkit.records.rundir import RunDirectory
    from toolkit.training.prepare import attempt_key, prepare

    job = prepare(toolkit.load_recipe(write(recipe)), RunDirectory(tmp_path / "run")).jobs[0]
    assert attempt_key(job) != attempt_key(replace(job, hardware=Hardware("cpu", bf16=False, processes=2)))
    assert attempt_key(job) == attempt_key(replace(job))
