"""The probe changes nothing that training depends on, and out of memory is answered with figures and a way out."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

from tests.conftest import pairs, write_jsonl
from tests.forks import Forks
from tests.tiny import make_base
from toolkit import load_recipe, run
from toolkit.errors import RunError
from toolkit.job import StageJob
from toolkit.models import model
from toolkit.records.rundir import RunDirectory
from toolkit.training import dpo, probe, stage, trainer
from toolkit.training.prepare import prepare


@pytest.fixture
def jobs(recipe: dict[str, Any], write: Callable[..., Path], tmp_path: Path) -> dict[str, StageJob]:
    """SFT with dropout, and DPO on the base."""
    recipe["lora"]["lora_dropout"] = 0.3
    recipe["stages"][1]["from"] = "base"
    directory = RunDirectory(tmp_path / "run")
    loaded = load_recipe(write(recipe))
    directory.claim(loaded)
    prepared = {job.plan.name: job for job in prepare(loaded, directory).jobs}
    for job in prepared.values():
        job.folder.mkdir()
    return prepared


def built_for(job: StageJob) -> Any:
    torch.manual_seed(0)
    built = stage.build(job, model.load_base(job.recipe, job.hardware))
    if job.plan.type == "dpo":
        dpo.share_prompts(job, built)
        dpo.take_reference(job, built)
    return built


def trained(job: StageJob, probed: bool) -> tuple[dict[str, torch.Tensor], list[Any]]:
    built = built_for(job)
    if probed:
        built.add_callback(probe.Probe(built, job))
    trainer.fit(built, job)
    weights = {name: p.detach().clone() for name, p in built.model.named_parameters() if p.requires_grad}
    logged = [
        {k: v for k, v in line.items() if "runtime" not in k and "second" not in k} for line in built.state.log_history
    ]
    return weights, logged


@pytest.mark.parametrize("stage", ["sft", "dpo"])
def test_training_is_the_same_to_the_bit_after_a_probe(jobs: dict[str, StageJob], stage: str) -> None:
    plain, plain_log = trained(jobs[stage], probed=False)
    probed, probed_log = trained(jobs[stage], probed=True)
    assert any(weight.any() for name, weight in plain.items() if "lora_B" in name)
    assert all(torch.equal(plain[name], probed[name]) for name in plain)
    assert plain_log == probed_log


def test_a_probe_leaves_no_gradient_no_metric_and_the_same_random_numbers(jobs: dict[str, StageJob]) -> None:
    built = built_for(jobs["sft"])
    seen: list[int] = []
    built.model.register_forward_pre_hook(lambda m, a, kw: seen.append(kw["input_ids"].shape[1]), with_kwargs=True)
    before = torch.get_rng_state()
    assert probe.probe(built, jobs["sft"]) == 0
    assert torch.equal(before, torch.get_rng_state())
    assert all(p.grad is None for p in built.model.parameters())
    assert not built._metrics["train"] and built._total_train_tokens == 0
    assert seen == [max(len(row["input_ids"]) for row in jobs["sft"].data.train)]


def out_of_memory_at(built: Any, call: int) -> None:
    """Raise what CUDA raises, on the n-th forward of the first layer."""
    calls = 0

    def hook(*_: Any) -> None:
        nonlocal calls
        calls += 1
        if calls == call:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    built.model.get_base_model().model.layers[0].register_forward_pre_hook(hook)


def test_out_of_memory_in_the_probe_names_three_settings(jobs: dict[str, StageJob]) -> None:
    built = built_for(jobs["sft"])
    out_of_memory_at(built, 1)
    built.add_callback(probe.Probe(built, jobs["sft"]))
    with pytest.raises(RunError) as caught:
        trainer.fit(built, jobs["sft"])
    said = str(caught.value)
    assert "out of memory on cpu on the longest batch, before the first step: CUDA out of memory" in said
    assert "activations" in said and "logits" in said and "weights" in said
    assert said.count("   saves ") == 3
    assert "per_device_train_batch_size: 2, gradient_accumulation_steps: 2" in said
    assert caught.value.exit_code == 2


def test_out_of_memory_while_training_names_the_last_checkpoint(jobs: dict[str, StageJob]) -> None:
    job = jobs["sft"]
    job.plan.trainer.update(save_strategy="steps", save_steps=1)
    built = built_for(job)
    out_of_memory_at(built, 3)
    with pytest.raises(RunError, match="while training; the last checkpoint is checkpoint-2"):
        trainer.fit(built, job)


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A recipe of DPO and an evaluation on a base whose weights and passes take tens of megabytes."""
    folder = tmp_path_factory.mktemp("wide")
    base = make_base(folder / "base", intermediate_size=60_000, num_hidden_layers=1)
    trainer = {"per_device_train_batch_size": 4, "gradient_checkpointing": False, "max_steps": 2}
    trainer |= {"logging_steps": 1, "save_strategy": "no"}
    stage = {"type": "dpo", "data": str(write_jsonl(folder / "dpo.jsonl", pairs(4))), "trainer": trainer}
    held = [{"prompt": "what is the sun", "answer": "red"}]
    evaluate = {"data": str(write_jsonl(folder / "held.jsonl", held)), "max_new_tokens": 2}
    evaluate["scores"] = {"right": {"column": "answer"}}
    model, lora = {"name_or_path": str(base), "dtype": "float32"}, {"r": 4, "target_modules": ["q_proj"]}
    recipe = {"model": model, "lora": lora, "stages": [stage], "evaluate": evaluate}
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    return folder / "recipe.yaml"


@pytest.mark.parametrize(
    ("event", "at", "said"),
    [
        ("print", "dpo: dpo", "error: dpo: measuring the model it starts from: out of memory: "),
        ("print", "proof: ", "error: dpo: computing the reference log-probs: out of memory: "),
        ("print", "dpo 1/", "stages[0]: out of memory on cpu while training, no checkpoint yet: "),
        ("os.mkdir", "dpo/adapter.partial", "error: dpo: verifying the saved adapter: out of memory: "),
        ("print", "saved, reloaded", "error: evaluate: measuring base and stages: out of memory: "),
    ],
)
def test_memory_that_runs_out_is_said_with_stage_and_work(
    forks: Forks, wide: Path, tmp_path: Path, event: str, at: str, said: str
) -> None:
    command = ["train", str(wide), "--output", str(tmp_path / "run")]
    code, printed = forks.run(*command, at=(event, at), then="memory", TOOLKIT_CACHE=str(tmp_path / "cache"))
    assert code == 2, printed
    assert said in printed and "Traceback" not in printed
    assert printed.count("\nerror") == 1


def test_other_errors_are_not_taken_for_out_of_memory(jobs: dict[str, StageJob], tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), probe.explained(jobs["sft"]):
        raise ZeroDivisionError


@pytest.mark.gpu
def test_the_probe_finds_out_of_memory_on_a_gpu(recipe: dict[str, Any], write: Callable[..., Path]) -> None:
    free, total = torch.cuda.mem_get_info()
    recipe["stages"] = recipe["stages"][:1]
    recipe["stages"][0]["trainer"] |= {"per_device_train_batch_size": 12}
    taken = torch.empty(int(free - 96 * 2**20), dtype=torch.uint8, device="cuda")
    torch.cuda.set_per_process_memory_fraction(min((taken.numel() + 4 * 2**20) / total, 1.0))
    try:
        with pytest.raises((RunError, torch.OutOfMemoryError)):
            run.train(write(recipe))
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)


@pytest.mark.gpu
def test_training_on_a_gpu_is_the_same_after_a_probe(
    recipe: dict[str, Any], write: Callable[..., Path], tmp_path: Path
) -> None:
    recipe["stages"] = recipe["stages"][:1]
    file = write(recipe)
    for name in (True, False):
        run.train(file, output=tmp_path / str(name), probe=name)
    one, other = (load_file(tmp_path / name / "adapter/adapter_model.safetensors") for name in ("True", "False"))
    assert all(torch.allclose(one[key], other[key], atol=1e-6) for key in one)
