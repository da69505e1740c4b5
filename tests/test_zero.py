"""DeepSpeed's ZeRO on two CPU processes: what it trains is what one process trains, killed or not."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import toolkit
from tests.conftest import messages, pairs, write_jsonl
from tests.launched import logged, stopped
from toolkit.models import adapter
from toolkit.records.rundir import RunDirectory

pytest.importorskip("deepspeed")

CONFIGS = Path(__file__).parent.parent / "accelerate_configs"
SAVED = {"save_strategy": "steps", "save_steps": 2, "num_train_epochs": 2, "learning_rate": 1e-3}


def command(config: str, file: Path, output: Path) -> list[str]:
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(CONFIGS / f"{config}.yaml")]
    launch += ["--num_processes", "2", "--main_process_port", "0"]
    return [*launch, "-m", "tests.zero_on_cpu", "train", str(file), "--output", str(output)]


@pytest.fixture
def stages(recipe: dict[str, Any], tmp_path: Path) -> dict[str, Any]:
    """SFT, a stacked DPO over two epochs, and a continued one of which the best checkpoint is not the last."""
    sft, dpo = recipe["stages"]
    write_jsonl(tmp_path / "sft.jsonl", messages(16))
    write_jsonl(tmp_path / "dpo.jsonl", pairs(24))
    for stage in recipe["stages"]:
        stage["trainer"] |= SAVED
    more = dpo | {"name": "more", "adapter": "continue", "keep": "best", "eval_data": dpo["data"]}
    more["trainer"] = dpo["trainer"] | {"eval_strategy": "steps", "eval_steps": 2, "learning_rate": 1e-2}
    more["guard"] = {"prompts": 2, "max_new_tokens": 4, "kl": 0.02}
    recipe["stages"] = [sft, dpo, more]
    return recipe


@pytest.mark.parametrize("config", ["deepspeed_zero2", "deepspeed_zero3"])
def test_two_processes_train_what_one_does_and_resume(
    stages: dict[str, Any], write: Any, tmp_path: Path, config: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = toolkit.train(write(stages), output=tmp_path / "one")
    for stage in stages["stages"]:
        stage["trainer"]["per_device_train_batch_size"] = 2
    monkeypatch.setenv("PYTHONPATH", str(CONFIGS.parent))
    monkeypatch.setenv("TOOLKIT_CACHE", str(tmp_path / "cache"))
    two = tmp_path / "two"
    _, said = stopped(command(config, write(stages), two), at="  dpo 7/12")
    assert said.count("stopped by SIGTERM after step ") == 1, said
    assert_holds_the_trained_adapter_alone(max((two / "dpo" / "checkpoints").glob("checkpoint-*/global_step*")))
    done = subprocess.run(command(config, write(stages), two), capture_output=True, text=True, check=False, timeout=400)
    assert done.returncode == 0, done.stderr
    assert "  resumes from checkpoint-" in done.stdout
    for name, stage in one.stages.items():
        ours = RunDirectory(two).finished(name)
        assert ours is not None
        torch.testing.assert_close(logged(two / name), logged(one.output / name), rtol=1e-5, atol=1e-5)
        if stage["type"] == "dpo":
            assert ours["prefix_sharing"].startswith("on: ")
            assert ours["proof"]["policy_vs_reference"] == 0.0
            assert ours["proof"]["reference_vs_start"] < 1e-5
    chosen = [RunDirectory(out).finished("more") or {} for out in (one.output, two)]
    assert chosen[0]["kept"]["step"] == chosen[1]["kept"]["step"] < chosen[0]["steps"]
    weights = [load_file(out / "adapter" / adapter.WEIGHTS) for out in (one.output, two)]
    torch.testing.assert_close(weights[0], weights[1], rtol=1e-3, atol=1e-4)


def assert_holds_the_trained_adapter_alone(states: Path) -> None:
    """The base of these tests ties its head to its embedding, which DeepSpeed would keep under its second name."""
    for file in states.glob("*model_states.pt"):
        names = torch.load(file, weights_only=False)["module"].keys()
        assert names and all(f".{adapter.TRAINED}." in name for name in names)


def test_what_was_interrupted_under_zero_starts_again_without_it(
    recipe: dict[str, Any], write: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its optimizer's state is in DeepSpeed's form, which nothing else reads."""
    recipe["stages"] = recipe["stages"][:1]
    recipe["stages"][0]["trainer"] |= SAVED
    monkeypatch.setenv("PYTHONPATH", str(CONFIGS.parent))
    file, output = write(recipe), tmp_path / "run"
    assert "stopped by SIGTERM" in stopped(command("deepspeed_zero2", file, output), at="  sft 2/")[1]
    ddp = ["toolkit" if part == "tests.zero_on_cpu" else part for part in command("cpu_2proc", file, output)]
    done = subprocess.run(ddp, capture_output=True, text=True, check=False, timeout=240)
    assert done.returncode == 0, done.stderr
    assert "resumes from" not in done.stdout
