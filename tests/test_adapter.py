"""Two adapters put together by rank are their sum, whatever their settings."""

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, PreTrainedModel

import toolkit
from tests.tiny import make_base
from toolkit.models import adapter

IDS = torch.arange(5, 30)[None]


def load(base: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()


def random_adapter(base: Path, folder: Path, seed: int, **settings: Any) -> Path:
    torch.manual_seed(seed)
    model = get_peft_model(load(base), LoraConfig(task_type="CAUSAL_LM", init_lora_weights=False, **settings))
    model.save_pretrained(str(folder), save_embedding_layers=False)
    return folder


@torch.no_grad()
def stacked_logits(base: Path, start: Path, trained: Path) -> torch.Tensor:
    model = PeftModel.from_pretrained(load(base), str(start), adapter_name="a")
    model.load_adapter(str(trained), adapter_name="b")
    model.base_model.set_adapter(["a", "b"])
    return model.eval()(IDS).logits


@torch.no_grad()
def logits(base: Path, folder: Path) -> torch.Tensor:
    return PeftModel.from_pretrained(load(base), str(folder)).eval()(IDS).logits


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ({"r": 4}, {"r": 4}),
        ({"r": 4, "lora_alpha": 16}, {"r": 3, "lora_alpha": 5}),
        ({"r": 4, "use_rslora": True}, {"r": 2, "use_rslora": True, "lora_alpha": 3}),
        ({"r": 4, "rank_pattern": {"q_proj": 7}}, {"r": 2, "alpha_pattern": {"v_proj": 20}}),
        ({"r": 4, "target_modules": ["q_proj"]}, {"r": 2, "target_modules": ["v_proj", "down_proj"]}),
        ({"r": 4, "layers_to_transform": [0], "target_modules": ["q_proj"]}, {"r": 2}),
        ({"r": 4, "target_modules": r".*layers\.1\.mlp.*proj"}, {"r": 2, "exclude_modules": ["q_proj"]}),
        ({"r": 4, "target_modules": ["embed_tokens", "q_proj"]}, {"r": 2, "target_modules": ["embed_tokens"]}),
    ],
)
def test_the_sum_of_two_llama_adapters(
    base: Path, tmp_path: Path, first: dict[str, Any], second: dict[str, Any]
) -> None:
    everything = {"target_modules": "all-linear"}
    start = random_adapter(base, tmp_path / "a", 1, **(everything | first))
    trained = random_adapter(base, tmp_path / "b", 2, **(everything | second))
    adapter.concatenate(start, trained, tmp_path / "sum")
    expected = stacked_logits(base, start, trained)
    torch.testing.assert_close(logits(base, tmp_path / "sum"), expected, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(expected, logits(base, start), atol=1e-2)


def test_the_sum_of_two_gpt2_adapters(tmp_path: Path) -> None:
    sizes = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 512}
    base = make_base(tmp_path / "base", "gpt2", **sizes)
    start = random_adapter(base, tmp_path / "a", 1, r=4, target_modules=["c_attn", "c_fc"], fan_in_fan_out=True)
    trained = random_adapter(base, tmp_path / "b", 2, r=2, target_modules=["c_attn"], fan_in_fan_out=True)
    adapter.concatenate(start, trained, tmp_path / "sum")
    expected = stacked_logits(base, start, trained)
    torch.testing.assert_close(logits(base, tmp_path / "sum"), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("setting", "value"),
    [("use_dora", True), ("modules_to_save", ["lm_head"]), ("bias", "all"), ("lora_bias", True), ("peft_type", "IA3")],
)
def test_what_has_no_sum_by_rank_is_refused(setting: str, value: Any) -> None:
    with pytest.raises(toolkit.ModelError, match=f"r.yaml:3: .*{setting}.*use adapter: continue"):
        adapter.check_stackable({setting: value}, "r.yaml:3")


def test_an_adapter_with_whole_layers_in_it_is_refused_before_training(
    recipe: dict[str, Any], write: Any, base: Path, tmp_path: Path
) -> None:
    model = get_peft_model(load(base), LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM"))
    model.save_pretrained(str(tmp_path / "mine"), save_embedding_layers=True)
    recipe["stages"] = [{**recipe["stages"][1], "from": str(tmp_path / "mine")}]
    with pytest.raises(toolkit.ModelError, match=r"lm_head.weight: not a plain LoRA matrix.*adapter: continue"):
        toolkit.train(write(recipe), output=tmp_path / "run")
    assert not (tmp_path / "run" / "dpo").exists()


def test_the_stack_trains_only_the_new_adapter_and_saves_only_it(base: Path, tmp_path: Path) -> None:
    start = random_adapter(base, tmp_path / "a", 1, r=4, target_modules="all-linear")
    model = adapter.StackedModel(load(base), LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM"), start)
    trainable = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert trainable
    assert all(".default." in name for name in trainable)
    with torch.no_grad(), model.disable_adapter():
        off = model(IDS).logits
    assert [name for name, p in model.named_parameters() if p.requires_grad] == trainable
    torch.testing.assert_close(off, logits(base, start), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(model(IDS).logits, off, rtol=0, atol=0)
    model.save_pretrained(str(tmp_path / "saved"))
    assert adapter.read_config(tmp_path / "saved")["r"] == 2
    assert not [p for p in (tmp_path / "saved").iterdir() if p.is_dir()]


def test_an_adapter_on_disk_is_a_start(recipe: dict[str, Any], write: Any, base: Path, tmp_path: Path) -> None:
    start = random_adapter(base, tmp_path / "mine", 1, r=4, target_modules="all-linear")
    recipe["stages"] = [{**recipe["stages"][1], "from": str(start)}]
    result = toolkit.train(write(recipe), output=tmp_path / "run")
    assert result.stages["dpo"]["reference"] == f"base + {start} adapter (the new adapter disabled)"
    assert result.stages["dpo"]["proof"]["reference_vs_start"] < 1e-5
    assert adapter.read_config(tmp_path / "run" / "adapter")["r"] == 8


def test_a_continued_dora_adapter_cannot_be_stacked_either(recipe: dict[str, Any], write: Any, tmp_path: Path) -> None:
    sft, dpo = recipe["stages"]
    sft["lora"] = {"use_dora": True}
    recipe["stages"] = [sft, {**sft, "name": "more", "adapter": "continue"}, dpo]
    del recipe["stages"][1]["lora"]
    with pytest.raises(toolkit.RecipeError, match=r"cannot be stacked here \(use_dora"):
        toolkit.train(write(recipe), output=tmp_path / "run")


def test_continue_trains_an_adapter_that_cannot_be_stacked(recipe: dict[str, Any], write: Any, tmp_path: Path) -> None:
    recipe["lora"]["use_dora"] = True
    recipe["stages"][1]["adapter"] = "continue"
    result = toolkit.train(write(recipe), output=tmp_path / "run")
    assert adapter.read_config(result.output / "adapter")["use_dora"] is True
    assert result.stages["dpo"]["proof"]["policy_vs_reference"] == 0.0


def test_whole_modules_are_trained_where_nothing_is_stacked(recipe: dict[str, Any], write: Any, tmp_path: Path) -> None:
    recipe["stages"] = recipe["stages"][1:]
    recipe["lora"]["modules_to_save"] = ["lm_head"]
    result = toolkit.train(write(recipe), output=tmp_path / "run")
    trained = load_file(result.output / "adapter" / "adapter_model.safetensors")["base_model.model.lm_head.weight"]
    tied = load_file(Path(recipe["model"]["name_or_path"]) / "model.safetensors")["model.embed_tokens.weight"]
    assert trained.shape == tied.shape
    assert not torch.equal(trained, tied)
