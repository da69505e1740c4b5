"""Checkpoints are whole or passed over, hold no base and no other adapter, and steps that are not finite are left out."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest

import toolkit
from toolkit.records import lock
from toolkit.training import checkpoints
from toolkit.training.progress import read_metrics

FILES = [
    "adapter_config.json",
    "adapter_model.safetensors",
    "manifest.json",
    "optimizer.pt",
    "rng_state.pth",
    "scheduler.pt",
    "trainer_state.json",
]


def checkpoint(folder: Path, step: int) -> Path:
    path = folder / f"checkpoint-{step}"
    path.mkdir(parents=True)
    for name in FILES:
        (path / name).write_text(f"{name} of step {step}")
    checkpoints.seal(path, processes=1)
    return path


@pytest.mark.parametrize("adapter", ["new", "continue"])
def test_a_checkpoint_holds_the_trained_adapter_and_no_other(
    recipe: dict[str, Any], write: Any, base: Path, tmp_path: Path, adapter: str
) -> None:
    recipe["stages"][1]["adapter"] = adapter
    for stage in recipe["stages"]:
        stage["trainer"] |= {"save_strategy": "steps", "save_steps": 1}
    output = toolkit.train(write(recipe), output=tmp_path / "run").output
    for stage in ("sft", "dpo"):
        found = output / stage / "checkpoints"
        assert sorted(p.name for p in found.iterdir()) == ["checkpoint-2", "checkpoint-3"]
        for path in found.iterdir():
            assert sorted(str(p.relative_to(path)) for p in path.rglob("*")) == FILES
            assert checkpoints.problem_with(path) is None
        own = (output / "sft" / "adapter" / "adapter_model.safetensors").stat().st_size  # the same rank
        assert (found / "checkpoint-3" / "adapter_model.safetensors").stat().st_size <= 1.1 * own


def test_a_broken_tracker_that_was_not_asked_for_is_not_touched(
    recipe: dict[str, Any], write: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe["stages"] = recipe["stages"][:1]
    recipe["stages"][0]["trainer"] |= {"save_strategy": "steps", "save_steps": 1}
    monkeypatch.setattr("trl.trainer.utils.is_trackio_available", lambda: True)  # it is installed
    monkeypatch.setitem(sys.modules, "trackio", None)  # and cannot be imported
    assert toolkit.train(write(recipe), output=tmp_path / "run").stages["sft"]["steps"] == 3


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda p: (p / "optimizer.pt").write_text("cut"), "optimizer.pt has 3 bytes of 23"),
        (lambda p: (p / "scheduler.pt").write_text("x" * 23), "scheduler.pt is not what was written (SHA-256)"),
        (lambda p: (p / "rng_state.pth").unlink(), "rng_state.pth is missing"),
        (lambda p: (p / "manifest.json").write_text('{"files'), "no whole manifest.json, so it was not written"),
        (lambda p: checkpoints.seal(p, processes=2), "rng_state_0.pth was not written"),
    ],
)
def test_a_damaged_checkpoint_is_passed_over_with_its_reason(tmp_path: Path, damage: Any, said: str) -> None:
    good, bad = checkpoint(tmp_path, 4), checkpoint(tmp_path, 10)
    damage(bad)
    found, (line,) = checkpoints.newest(tmp_path)
    assert found == good
    assert line.startswith(f"checkpoint-10 is passed over: {said}")


def test_older_checkpoints_go_only_when_the_newest_is_good(tmp_path: Path) -> None:
    paths = [checkpoint(tmp_path, step) for step in (2, 4, 10)]
    (paths[2] / "optimizer.pt").unlink()
    checkpoints.rotate(paths[2], 1, None)
    assert checkpoints.by_age(tmp_path) == paths
    last = checkpoint(tmp_path, 12)
    checkpoints.rotate(last, 2, str(paths[0]))
    assert checkpoints.by_age(tmp_path) == [paths[0], last]


def test_without_locks_a_holder_is_known_by_its_heartbeat(tmp_path: Path) -> None:
    import os

    file = tmp_path / ".lock"
    with lock.beating(file), pytest.raises(toolkit.RunError, match=rf"process {os.getpid()} on .* is at work"):
        lock.beating(file).__enter__()
    file.write_text("process 1 on elsewhere")
    os.utime(file, (1, 1))
    with lock.beating(file):
        assert f"process {os.getpid()} on" in file.read_text()


def test_a_diverging_stage_stops_names_its_rows_and_is_never_finished(
    recipe: dict[str, Any], write: Any, tmp_path: Path
) -> None:
    recipe["stages"] = recipe["stages"][:1]
    recipe["stages"][0]["stop_after_nonfinite"] = 2
    recipe["stages"][0]["trainer"] |= {"learning_rate": 1e30, "num_train_epochs": 3, "lr_scheduler_type": "constant"}
    recipe["stages"][0]["trainer"] |= {"warmup_steps": 0, "save_strategy": "steps", "save_steps": 1}
    with pytest.raises(toolkit.ProofError, match=r"is not finite, the last 2 in a row; its rows: sft.jsonl row \d+, "):
        toolkit.train(write(recipe), output=tmp_path / "run")
    assert not (tmp_path / "run" / "sft" / "stage.json").exists()


@pytest.mark.parametrize("stage", ["sft", "dpo"])
def test_a_row_that_is_not_finite_is_named_and_left_out(
    recipe: dict[str, Any], write: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str], stage: str
) -> None:
    """One token's embedding is infinite; one row uses it."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from tests.tiny import make_base

    folder = make_base(tmp_path / "bad", tie_word_embeddings=False)
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    with torch.no_grad():
        model.model.embed_tokens.weight[tokenizer("Q").input_ids[0]] = float("inf")
    model.save_pretrained(folder)
    recipe["model"]["name_or_path"] = str(folder)
    recipe["stages"] = [s for s in recipe["stages"] if s["type"] == stage]
    recipe["stages"][0]["reference" if stage == "dpo" else "stop_after_nonfinite"] = "online" if stage == "dpo" else 3
    file = tmp_path / f"{stage}.jsonl"
    lines = file.read_text().splitlines()
    lines[7] = lines[7].replace("what is", "Q is")
    file.write_text("\n".join(lines) + "\n")
    output = toolkit.train(write(recipe), output=tmp_path / "run").output
    said = [line for line in capsys.readouterr().out.splitlines() if "is left out" in line]
    assert len(said) == 1 and f"{stage}.jsonl row 7" in said[0] and "1 of 3 in a row" in said[0]
    steps = [line for line in read_metrics(output / stage / "metrics.jsonl") if "grad_norm" in line]
    assert [line["grad_norm"] is None for line in steps].count(True) == 1
    assert json.loads((output / stage / "stage.json").read_text())["steps"] == 3


def test_a_full_disk_leaves_the_checkpoints_before_it(recipe: dict[str, Any], write: Any, tmp_path: Path) -> None:
    """A limit on the size of files stands for the disk: only the DPO optimizer's states are larger."""
    import resource

    recipe["stages"][1]["lora"] = {"r": 64}
    for stage in recipe["stages"]:
        stage["trainer"] |= {"save_strategy": "steps", "save_steps": 1}
    file = write(recipe)
    toolkit.train(file, output=tmp_path / "run", stage="sft")
    toolkit.compute_reference(file, output=tmp_path / "run")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, before[1]))
    try:
        with pytest.raises(toolkit.RunError, match=r"run/dpo: (the disk is full|files may not grow)"):
            toolkit.train(file, output=tmp_path / "run")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert checkpoints.newest(tmp_path / "run" / "sft" / "checkpoints")[0] is not None
    assert not (tmp_path / "run" / "dpo" / "stage.json").exists()
    assert toolkit.train(file, output=tmp_path / "run").adapter is not None
