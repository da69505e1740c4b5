"""Guards speak when a bound is passed, leave training as it was, and `keep: best` keeps the checkpoint it names."""

import json
import math
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

import toolkit
from tests.conftest import pairs, write_jsonl
from tests.forks import Forks
from tests.test_resume import command
from toolkit.recipe.sections import Guard
from toolkit.training.guards import LN2, Said, Seen, selection, tripped
from toolkit.training.progress import read_metrics

CPU_2PROC = Path(__file__).parent.parent / "accelerate_configs" / "cpu_2proc.yaml"

GUARD = Guard()
QUIET: dict[str, Any] = {
    "step": 40,
    "max_steps": 60,
    "beta": 0.1,
    "learning_rate": 5e-6,
    "chosen_tokens": 10.0,
    "chosen_logratio": -1.0,
    "held_out": True,
    "margins": [(20, 0.7, 0.2), (40, 0.8, 0.4)],
    "losses": [(30, 0.6), (35, 0.58), (40, 0.55)],
    "kl": 0.1,
    "answers": Said(tokens=12, stopped=1.0, repetition=0.05),
    "reference": Said(tokens=10, stopped=1.0, repetition=0.02),
}


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"margins": [(20, 1.0, 4.0), (30, 1.0, 6.0), (40, 1.0, 6.0)]},
        {"margins": [(20, 0.9, 4.0), (40, 1.0, 6.0)]},
        {"margins": [(40, 1.0, 6.0)]},
    ],
)
def test_a_healthy_run_is_quiet(change: dict[str, Any]) -> None:
    assert tripped(Seen(**QUIET | change), GUARD) == []


@pytest.mark.parametrize(
    ("change", "guard", "number", "said"),
    [
        ({"chosen_logratio": -8.0}, "chosen_drop", 0.8, "less likely than under the reference, by 0.80 nats per token"),
        ({"kl": 2.0}, "kl", 2.0, "the KL to the reference is 2.00 nats per token"),
        ({"answers": Said(12, 1.0, 0.5)}, "repetition", 0.48, "50% of the 4-grams in its answers repeat themselves"),
        ({"answers": Said(30, 1.0, 0.0)}, "length", 3.0, "30 tokens, 3.0 times as many"),
        (
            {"answers": Said(12, 0.5, 0.0)},
            "stopped",
            0.5,
            "50% of its answers end by themselves, of the reference's 100%",
        ),
        ({"margins": [(20, 1.0, 4.0), (40, 1.0, 6.0)]}, "margin", 6.0, "still grows, from 4.0 to 6.0"),
        (
            {"margins": [(10, 0.9, 1.0), (20, 1.0, 4.6), (30, 1.0, 4.9), (40, 1.0, 5.2)]},
            "margin",
            5.2,
            "is 1.00 since step 20 and the margin still grows, from 4.6 to 5.2",
        ),
    ],
)
def test_each_bound_is_said_with_its_number(change: dict[str, Any], guard: str, number: float, said: str) -> None:
    (one,) = tripped(Seen(**QUIET | change), GUARD)
    assert (one.guard, one.step) == (guard, 40)
    assert one.value == pytest.approx(number)
    assert said in one.text


@pytest.mark.parametrize(
    ("change", "cause"),
    [
        ({}, "the learning rate 5e-06 is too small"),
        ({"beta": 1e-4, "margins": [(40, 0.9, 1e-3)]}, "the policy has moved by 10.00 nats, but beta 0.0001"),
        ({"identical_pairs": 0.9}, "90% of the pairs hold the same answer twice"),
    ],
)
def test_a_flat_loss_names_its_likely_cause(change: dict[str, Any], cause: str) -> None:
    flat = {"losses": [(30, LN2), (35, LN2 - 1e-3), (40, LN2 + 1e-3)], "margins": [(40, 0.5, 1e-3)]}
    (one,) = tripped(Seen(**QUIET | flat | change), GUARD)
    assert one.guard == "flat"
    assert cause in one.text


def test_checkpoints_are_ranked_by_accuracy_within_the_bound_then_by_loss() -> None:
    ranked = [
        selection(0.9, 0.2, kl=0.4, bound=0.5, pairs=10),
        selection(0.9, 0.6, kl=0.1, bound=0.5, pairs=10),
        selection(0.8, 0.1, kl=0.1, bound=0.5, pairs=10),
        selection(1.0, 0.0, kl=0.6, bound=0.5, pairs=10),
        selection(1.0, 0.0, kl=9.0, bound=0.5, pairs=10),
        selection(1.0, 0.0, kl=math.nan, bound=0.5, pairs=10),
        selection(1.0, 0.0, kl=0.0, bound=0.5, pairs=10),
    ]
    assert ranked == sorted(ranked, reverse=True)


@pytest.fixture
def held_out(recipe: dict[str, Any], tmp_path: Path) -> dict[str, Any]:
    """A DPO stage alone, too eager, with held-out pairs, evaluated every second of six steps."""
    stage = recipe["stages"][1]
    stage["eval_data"] = str(write_jsonl(tmp_path / "held.jsonl", pairs(6)))
    stage["trainer"] |= {"eval_steps": 2, "num_train_epochs": 2}
    stage["guard"] = {"max_new_tokens": 12, "prompts": 3}
    recipe["stages"] = [stage]
    return recipe


def trained(recipe: dict[str, Any], write: Any, output: Path, *overrides: str) -> toolkit.RunResult:
    return toolkit.train(write(recipe), output=output, overrides=tuple(overrides))


def losses(run: Path) -> list[tuple[float, ...]]:
    names = ("loss", "grad_norm", "rewards/margins")
    return [tuple(line[n] for n in names) for line in read_metrics(run / "dpo" / "metrics.jsonl") if "loss" in line]


@pytest.mark.parametrize("stacked", [False, True])
def test_training_is_the_same_to_the_bit_with_guards_and_without(
    held_out: dict[str, Any], write: Any, tmp_path: Path, stacked: bool
) -> None:
    stage = held_out["stages"][0]
    held_out["lora"]["lora_dropout"] = 0.1
    stage["trainer"] |= {"disable_dropout": False, "gradient_checkpointing": stacked}
    stage["prefix_sharing"] = stacked
    if stacked:
        stage["trainer"]["disable_dropout"] = True
        start = trained(held_out, write, tmp_path / "start", "stages.dpo.guard=off").output / "adapter"
        stage["from"] = str(start)
    runs = [tmp_path / "with", tmp_path / "without"]
    trained(held_out, write, runs[0], "stages.dpo.guard.kl=0.0001")
    trained(held_out, write, runs[1], "stages.dpo.guard=off")
    assert losses(runs[0]) == losses(runs[1])
    bits = [(run / "adapter" / "adapter_model.safetensors").read_bytes() for run in runs]
    assert bits[0] == bits[1]
    said = read_metrics(runs[0] / "dpo" / "guards.jsonl")
    assert "kl" in [one["guard"] for one in said]
    assert not (runs[1] / "dpo" / "guards.jsonl").exists()
    logged = [
        line["eval_guard/kl"] for line in read_metrics(runs[0] / "dpo" / "metrics.jsonl") if "eval_guard/kl" in line
    ]
    assert len(logged) == 3


def test_stop_ends_training_at_the_bound(held_out: dict[str, Any], write: Any, tmp_path: Path) -> None:
    record = trained(held_out, write, tmp_path / "run", "stages.dpo.guard={action: stop, kl: 0.0001}").stages["dpo"]
    assert (record["stopped"]["guard"], record["stopped"]["step"]) == ("kl", 2)
    assert max(line["step"] for line in read_metrics(tmp_path / "run" / "dpo" / "metrics.jsonl")) == 2


def test_without_held_out_pairs_training_pairs_are_watched(
    held_out: dict[str, Any], write: Any, tmp_path: Path
) -> None:
    del held_out["stages"][0]["eval_data"], held_out["stages"][0]["trainer"]["eval_steps"]
    held_out["stages"][0]["trainer"] |= {"learning_rate": 1e-9, "warmup_steps": 0}
    record = trained(held_out, write, tmp_path / "run").stages["dpo"]
    assert [one["guard"] for one in record["guards"]] == ["flat"]
    assert "the learning rate 1e-09 is too small" in record["guards"][0]["text"]


@pytest.fixture
def best(held_out: dict[str, Any]) -> dict[str, Any]:
    stage = held_out["stages"][0]
    stage["keep"] = "best"
    del stage["trainer"]["save_strategy"]
    stage["trainer"] |= {"eval_steps": 1, "save_total_limit": 9, "warmup_steps": 0}
    return held_out


def test_the_best_checkpoint_is_the_one_delivered(best: dict[str, Any], write: Any, tmp_path: Path) -> None:
    free = trained(best, write, tmp_path / "free", "stages.dpo.guard.kl=1e9").stages["dpo"]["kept"]["candidates"]
    bound = (free[1]["kl"] + max(one["kl"] for one in free[2:])) / 2  # so that the last weights are beyond it
    result = trained(best, write, tmp_path / "run", f"stages.dpo.guard.kl={bound}")
    kept = result.stages["dpo"]["kept"]
    assert kept["candidates"] == free
    rank = {one["step"]: selection(one["accuracy"], one["loss"], one["kl"], bound, 6) for one in free}
    assert len(rank) == 6
    assert kept["step"] == max(rank, key=lambda step: rank[step])
    assert next(one["kl"] for one in free if one["step"] == kept["step"]) <= bound
    assert kept["why"].startswith(f"step {kept['step']}: best held-out preference accuracy ")
    checkpoint = tmp_path / "run" / "dpo" / "checkpoints" / f"checkpoint-{kept['step']}" / "adapter_model.safetensors"
    assert result.adapter is not None
    delivered, saved = load_file(result.adapter / "adapter_model.safetensors"), load_file(checkpoint)
    assert all(delivered[name].equal(saved[name]) for name in saved)


def test_a_killed_run_keeps_the_same_checkpoint(forks: Forks, best: dict[str, Any], write: Any, tmp_path: Path) -> None:
    whole = trained(best, write, tmp_path / "whole")
    file, output = write(best), tmp_path / "killed"
    assert forks.run(*command(file, output), at=("print", "dpo 5/"))[0] == -signal.SIGKILL
    resumed = toolkit.train(file, output=output)
    assert resumed.stages["dpo"]["kept"] == whole.stages["dpo"]["kept"]
    assert resumed.stages["dpo"]["guards"] == whole.stages["dpo"]["guards"]
    assert resumed.adapter is not None and whole.adapter is not None
    bits = [(run.adapter / "adapter_model.safetensors").read_bytes() for run in (resumed, whole)]
    assert bits[0] == bits[1]


def test_what_cannot_be_is_said_at_once(recipe: dict[str, Any], write: Any) -> None:
    recipe["stages"][0]["guard"] = "stop"
    recipe["stages"][1]["keep"] = "best"
    with pytest.raises(toolkit.RecipeError) as caught:
        toolkit.load_recipe(write(recipe))
    assert "stages[0].guard: is for dpo stages" in str(caught.value)
    assert "stages[1].keep: the best checkpoint is found on held-out pairs; give the stage eval_data" in str(
        caught.value
    )


def test_the_stages_guard_stands_over_the_recipes(recipe: dict[str, Any], write: Any) -> None:
    from toolkit.recipe.plan import Hardware, stage_plans

    recipe["guard"] = {"action": "stop", "kl": 0.3}
    recipe["stages"][1]["guard"] = "off"
    _, dpo = stage_plans(toolkit.load_recipe(write(recipe)), Hardware("cpu", bf16=False))
    assert (dpo.guard or {})["action"] == "off"
    assert (dpo.guard or {})["kl"] == 0.3
    assert json.dumps(dpo.guard)


def test_two_processes_agree_on_what_is_said_and_kept(best: dict[str, Any], write: Any, tmp_path: Path) -> None:
    best["stages"][0]["guard"]["kl"] = 0.001
    one = trained(best, write, tmp_path / "one")
    best["stages"][0]["trainer"]["per_device_train_batch_size"] = 2
    accelerate = Path(sys.executable).with_name("accelerate")
    command = [str(accelerate), "launch", "--config_file", str(CPU_2PROC), "-m", "toolkit", "train"]
    command += [str(write(best)), "--output", str(tmp_path / "two")]
    subprocess.run(command, check=True, capture_output=True)
    records = [one.stages["dpo"], json.loads((tmp_path / "two" / "dpo" / "stage.json").read_text())]
    assert records[0]["kept"]["step"] == records[1]["kept"]["step"]
    said = [[(g["guard"], g["step"]) for g in record["guards"]] for record in records]
    assert said[0] == said[1] != []


def test_a_continued_adapter_is_held_against_its_frozen_copy(
    held_out: dict[str, Any], write: Any, tmp_path: Path
) -> None:
    start = trained(held_out, write, tmp_path / "start", "stages.dpo.guard=off").output / "adapter"
    held_out["stages"][0] |= {"from": str(start), "adapter": "continue"}
    held_out["evaluate"] = {"max_new_tokens": 6}
    result = trained(held_out, write, tmp_path / "run", "stages.dpo.trainer.learning_rate=1e-9")
    kls = [
        line["eval_guard/kl"]
        for line in read_metrics(tmp_path / "run" / "dpo" / "metrics.jsonl")
        if "eval_guard/kl" in line
    ]
    assert max(kls) < 1e-6  # not the KL to the base
    assert result.evaluation is not None
    assert result.evaluation["models"]["dpo"]["kl"]["value"] < 1e-6
    assert trained(held_out, write, tmp_path / "fast").evaluation["models"]["dpo"]["kl"]["value"] > 1e-4
