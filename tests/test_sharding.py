"""A sharded base: what is refused before it is loaded, and what is trained on one that is really sharded."""

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import toolkit
from tests.conftest import messages, pairs, write_jsonl
from tests.launched import logged, stopped
from toolkit.errors import ModelError, ProofError, RunError, ToolkitError
from toolkit.models import adapter, sharding
from toolkit.recipe.plan import Hardware, stage_plans
from toolkit.records.rundir import RunDirectory

FSDP2 = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}
ZERO3 = {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "3"}
GPU = Hardware("cuda", bf16=True)
NF4 = {"load_in_4bit": True}


@pytest.mark.parametrize(
    ("env", "quantization", "dtype", "error", "said"),
    [
        (FSDP2 | {"FSDP_VERSION": "1"}, None, "bfloat16", RunError, "set fsdp_version: 2"),
        (FSDP2, {"load_in_8bit": True}, "bfloat16", ModelError, "huggingface/peft#2833"),
        (ZERO3, NF4, "bfloat16", ModelError, "huggingface/peft#2016"),
        (FSDP2, NF4, "float32", ModelError, "set model.dtype: bfloat16"),
        (FSDP2, NF4 | {"bnb_4bit_quant_storage": "uint8"}, "bfloat16", ModelError, "huggingface/accelerate#3983"),
        (FSDP2 | {"FSDP_CPU_RAM_EFFICIENT_LOADING": "true"}, NF4, "auto", RunError, "huggingface/accelerate#3874"),
    ],
)
def test_what_is_known_to_fail_is_refused(
    recipe: dict[str, Any],
    write: Any,
    monkeypatch: pytest.MonkeyPatch,
    env: dict[str, str],
    quantization: dict[str, Any] | None,
    dtype: str,
    error: type[ToolkitError],
    said: str,
) -> None:
    recipe["quantization"], recipe["model"]["dtype"] = quantization, dtype
    loaded = toolkit.load_recipe(write(recipe))
    sharding.check(loaded, GPU)  # without sharding all of it is fine
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(error, match=said):
        sharding.check(loaded, GPU)


def test_reentrant_checkpointing_is_what_zero_3_needs(
    recipe: dict[str, Any], write: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe["stages"][1]["trainer"]["gradient_checkpointing_kwargs"] = {"use_reentrant": False}
    for name, value in ZERO3.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ModelError, match=r"stages\[1\].trainer.gradient_checkpointing_kwargs: .*huggingface/trl#2514"):
        sharding.check(toolkit.load_recipe(write(recipe)), GPU)


def test_the_stage_in_a_configuration_file_of_deepspeed_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """accelerate's launcher leaves its own variable out then."""
    (tmp_path / "ds.json").write_text('{"zero_optimization": {"stage": 3}}')
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    assert sharding.zero_stage() == 2
    monkeypatch.setenv("ACCELERATE_DEEPSPEED_CONFIG_FILE", str(tmp_path / "ds.json"))
    assert sharding.zero_stage() == 3 and sharding.is_sharded()


def test_fsdp_stores_4bit_weights_as_the_base_type(
    recipe: dict[str, Any], write: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe["quantization"], recipe["model"]["dtype"] = NF4, "auto"
    loaded = toolkit.load_recipe(write(recipe))
    assert "bnb_4bit_quant_storage" not in (sharding.quantization_config(loaded, GPU) or {})
    for name, value in FSDP2.items():
        monkeypatch.setenv(name, value)
    assert (sharding.quantization_config(loaded, GPU) or {})["bnb_4bit_quant_storage"] == "bfloat16"
    sharding.check(loaded, GPU)


@pytest.fixture
def mesh(tmp_path: Path) -> Iterator[Any]:
    """A process group of one, on gloo: FSDP2 shards on CPUs as well, which accelerate does not offer."""
    from torch import distributed
    from torch.distributed.device_mesh import init_device_mesh

    distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/meet", rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    distributed.destroy_process_group()


def test_an_adapter_is_gathered_from_a_sharded_model(
    recipe: dict[str, Any], write: Any, base: Path, mesh: Any, tmp_path: Path
) -> None:
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import DTensor

    loaded = toolkit.load_recipe(write(recipe))
    plan = stage_plans(loaded, Hardware("cpu", bf16=False))[0]
    torch.manual_seed(0)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), LoraConfig(task_type="CAUSAL_LM", **plan.lora))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)
    whole = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    assert sharding.gathered(model) is None
    adapter.save(model, tmp_path / "plain", "base")
    for layer in model.get_base_model().model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    assert all(isinstance(p, DTensor) for p in model.parameters())
    gathered = sharding.gathered(model)
    assert gathered is not None and gathered.keys() == whole.keys()
    assert all(type(gathered[name]) is torch.Tensor and torch.equal(gathered[name], whole[name]) for name in whole)
    adapter.save(model, tmp_path / "sharded", "base", gathered)
    plain, saved = (load_file(tmp_path / name / adapter.WEIGHTS) for name in ("plain", "sharded"))
    assert plain.keys() == saved.keys() and all(torch.equal(plain[name], saved[name]) for name in plain)
    from toolkit.models.model import empty_base

    expected = adapter.expected_shapes(empty_base(loaded), plan, None, "")
    sharding.check_gathered(saved, expected)
    first = sorted(saved)[0]
    with pytest.raises(ProofError, match=r"lacks 1 of 28 matrices, first .* \(huggingface/peft#2500\)"):
        sharding.check_gathered({k: v for k, v in saved.items() if k != first}, expected)
    for part in (saved[first][:2], saved[first][:0], saved[first].flatten()):
        with pytest.raises(ProofError, match=r"1 of 28 matrices of the saved adapter are parts, .*accelerate#4206"):
            sharding.check_gathered(saved | {first: part}, expected)


def on_cpu(config: str, tmp_path: Path, *arguments: str) -> list[str]:
    """The command that runs `toolkit ARGUMENTS` as a configuration says, but on two CPU processes."""
    folder = Path(__file__).parent.parent / "accelerate_configs"
    file = tmp_path / f"{config}.yaml"
    file.write_text((folder / f"{config}.yaml").read_text() + "use_cpu: true\n")
    command = [str(Path(sys.executable).with_name("accelerate")), "launch", "--config_file", str(file)]
    command += ["--num_processes", "2", "--main_process_port", "0", "-m", "tests.fsdp_on_cpu"]
    return [*command, *arguments]


def test_two_shards_train_what_one_process_does_and_resume(recipe: dict[str, Any], write: Any, tmp_path: Path) -> None:
    """SFT, a stacked DPO that is stopped by a signal and goes on, a continued one of which the best is kept."""
    sft, dpo = recipe["stages"]
    write_jsonl(tmp_path / "sft.jsonl", messages(16))
    write_jsonl(tmp_path / "dpo.jsonl", pairs(16))
    for stage in recipe["stages"]:
        stage["trainer"]["learning_rate"] = 1e-3
    longer = dpo | {"trainer": dpo["trainer"] | {"num_train_epochs": 4}}
    held_out = str(write_jsonl(tmp_path / "held_out.jsonl", pairs(4)))
    best = dpo | {"name": "more", "adapter": "continue", "keep": "best", "eval_data": held_out}
    best["trainer"] = dpo["trainer"] | {"eval_strategy": "steps", "eval_steps": 2}
    del best["trainer"]["save_strategy"]
    recipe["stages"], recipe["guard"] = [sft, longer, best], {"prompts": 2, "max_new_tokens": 4, "kl": 1e-4}
    recipe["evaluate"] = {"max_new_tokens": 4}  # by the main process, which has the whole base to itself then
    one = toolkit.train(write(recipe), output=tmp_path / "one")
    for stage in recipe["stages"]:
        stage["trainer"] = stage["trainer"] | {"per_device_train_batch_size": 2}
    command = on_cpu("fsdp2", tmp_path, "train", str(write(recipe)), "--output", str(tmp_path / "two"))
    _, said = stopped(command, at="  dpo 2/16")
    assert "stopped by SIGTERM after step " in said
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=240)
    assert done.returncode == 0, done.stderr
    assert "  resumes from checkpoint-" in done.stdout
    assert done.stdout.count("reference log-probs computed on every step, as the model is sharded") == 2
    for name, stage in one.stages.items():
        ours = RunDirectory(tmp_path / "two").finished(name)
        assert ours is not None
        torch.testing.assert_close(logged(one.output / name), logged(tmp_path / "two" / name), rtol=1e-5, atol=1e-5)
        if stage["type"] == "dpo":
            assert ours["prefix_sharing"].startswith("on: ")
            assert ours["proof"]["policy_vs_reference"] == 0.0
            assert ours["proof"]["reference_vs_start"] < 1e-5
        if name == "more":
            assert ours["kept"]["step"] == stage["kept"]["step"] == 2  # of 4: nearest to the bound
    weights = [load_file(out / "adapter" / adapter.WEIGHTS) for out in (one.output, tmp_path / "two")]
    torch.testing.assert_close(weights[0], weights[1], rtol=1e-3, atol=1e-4)
    models = json.loads((tmp_path / "two" / "evaluation.json").read_text())["models"]
    for name, summary in (one.evaluation or {})["models"].items():
        assert models[name]["perplexity"]["value"] == pytest.approx(summary["perplexity"]["value"], rel=1e-3)


def test_two_shards_of_a_4bit_base_are_proven_and_verified(recipe: dict[str, Any], write: Any, tmp_path: Path) -> None:
    recipe["quantization"], recipe["model"]["dtype"] = NF4, "bfloat16"
    command = on_cpu("fsdp2_qlora", tmp_path, "train", str(write(recipe)), "--output", str(tmp_path / "run"))
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=240)
    assert done.returncode == 0, done.stderr
    assert "(bfloat16, nf4, on cpu, 2 processes, seed 7)" in done.stdout
    record = RunDirectory(tmp_path / "run").finished("dpo")
    assert record is not None
    assert record["prefix_sharing"].startswith("on: ")
    assert record["proof"]["policy_vs_reference"] == 0.0
    assert record["proof"]["reference_vs_start"] <= 5e-2
    assert record["reloaded_vs_policy"] <= 5e-2


def launched(file: Path, output: Path, config: str, *flags: str) -> None:
    command = [sys.executable, "-m", "toolkit", "train", str(file), "--output", str(output), "--launch", config, *flags]
    subprocess.run(command, check=True, timeout=500)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("config", ["fsdp2", "fsdp2_qlora", "deepspeed_zero2", "deepspeed_zero3"])
def test_a_sharded_run_of_one_process_is_proven_and_verified(
    recipe: dict[str, Any], write: Any, tmp_path: Path, config: str
) -> None:
    if config.startswith("deepspeed"):
        pytest.importorskip("deepspeed")
    recipe["model"]["dtype"] = "bfloat16"
    recipe["quantization"] = NF4 if config == "fsdp2_qlora" else None
    launched(write(recipe), tmp_path / "run", config, "--num-processes", "1")
    record = RunDirectory(tmp_path / "run").finished("dpo")
    assert record is not None
    assert record["proof"]["reference_vs_start"] <= 5e-2
    assert record["reloaded_vs_policy"] <= 5e-2
