"""A merged model is the policy, as plain transformers loads it."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import toolkit
from tests.finished import finished_run, pulled
from tests.test_adapter import IDS, load, random_adapter
from tests.tiny import make_base
from toolkit.cli import main
from toolkit.models.adapter import WEIGHTS, adapter_digest
from toolkit.publishing.merge import _check_disk, merge
from toolkit.publishing.saved_run import load_run

LINEAR = {"r": 4, "target_modules": "all-linear"}
GPT2 = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 512}
MIXTRAL = {"num_local_experts": 4, "num_experts_per_tok": 2, "tie_word_embeddings": False}


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    return model.eval()(IDS).logits.float()


def policy_logits(base: Path, run: Path) -> torch.Tensor:
    return logits(PeftModel.from_pretrained(load(base), str(run / "adapter")))


@pytest.mark.parametrize(
    ("settings", "untied"),
    [
        ({}, False),
        ({"lora_alpha": 3, "use_rslora": True}, False),
        ({"rank_pattern": {"q_proj": 7}, "alpha_pattern": {"v_proj": 20}}, False),
        ({"target_modules": ["q_proj"], "layers_to_transform": [1]}, False),
        ({"use_dora": True}, False),
        ({"target_modules": ["embed_tokens", "q_proj"]}, True),
        ({"target_modules": ["lm_head", "q_proj"]}, True),
        ({"target_modules": ["q_proj"], "modules_to_save": ["lm_head", "norm"]}, True),
    ],
)
def test_merged_logits_are_the_policys(base: Path, tmp_path: Path, settings: dict[str, Any], untied: bool) -> None:
    random_adapter(base, tmp_path / "adapter", 1, **(LINEAR | settings))
    out = merge(pulled(tmp_path, base), verify=False)
    expected = policy_logits(base, tmp_path)
    torch.testing.assert_close(logits(load(out)), expected, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(expected, logits(load(base)), atol=1e-2)
    assert json.loads((tmp_path / "merge.json").read_text())["untied"] is untied


@pytest.mark.parametrize(
    ("model_type", "config", "targets"),
    [
        ("gpt2", GPT2, {"target_modules": ["c_attn", "c_fc", "wte"], "fan_in_fan_out": True}),
        ("mixtral", MIXTRAL, {"target_modules": ["q_proj", "o_proj"]}),
        ("qwen3", {"head_dim": 8}, {"target_modules": "all-linear"}),
    ],
)
def test_other_architectures(tmp_path: Path, model_type: str, config: dict[str, Any], targets: dict[str, Any]) -> None:
    base = make_base(tmp_path / "base", model_type, **config)
    random_adapter(base, tmp_path / "adapter", 1, r=4, **targets)
    out = merge(pulled(tmp_path, base), verify=False)
    torch.testing.assert_close(logits(load(out)), policy_logits(base, tmp_path), rtol=1e-5, atol=1e-5)
    assert set(load_file(base / "model.safetensors")) <= set(load_file(out / "model.safetensors"))


def test_many_files_hold_what_one_does(base: Path, tmp_path: Path) -> None:
    random_adapter(base, tmp_path / "adapter", 1, **LINEAR)
    run = pulled(tmp_path, base)
    one, many = merge(run, output=tmp_path / "one", verify=False), merge(run, verify=False, shard=50_000)
    index = json.loads((many / "model.safetensors.index.json").read_text())
    whole = load_file(one / "model.safetensors")
    parts = {file: load_file(many / file) for file in sorted(set(index["weight_map"].values()))}
    assert list(parts) == [f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)]
    assert all(sum(t.nbytes for t in part.values()) <= 50_000 for part in parts.values())
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in whole.values())
    assert {n: file for file, part in parts.items() for n in part} == index["weight_map"]
    assert all(torch.equal(whole[name], part[name]) for part in parts.values() for name in part)
    again = tmp_path / "again"  # a base in several files, merged once more
    shutil.copytree(many, again / "base")
    shutil.copytree(tmp_path / "adapter", again / "adapter")
    out = merge(pulled(again, again / "base"), verify=False)
    torch.testing.assert_close(logits(load(out)), policy_logits(again / "base", again), rtol=1e-5, atol=1e-5)


def test_a_trained_run_to_serve_in_bfloat16(base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "run"
    shutil.copytree(finished_run(base), run)
    assert main(["merge", str(run), "--dtype", "bfloat16", "--output", str(tmp_path / "served")]) == 0
    assert "same most likely token at" in capsys.readouterr().out
    record = json.loads((run / "merge.json").read_text())
    assert record["stage"] == "dpo"
    assert record["adapter_digest"] == adapter_digest(run / "adapter")
    assert (record["dtype"], record["output"], record["quantized_policy"]) == ("bfloat16", "served", False)
    measured = record["agreement"]
    assert (measured["rows"], measured["rows_from"]) == (24, "training data")
    assert 0 < measured["kl"] < 1e-2
    assert measured["top1_agreement"] > 0.8
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "served")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "served")
    assert model.dtype == torch.bfloat16
    assert model.generation_config.eos_token_id == [3]
    assert tokenizer.chat_template == AutoTokenizer.from_pretrained(run / "adapter").chat_template
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run", "served"]


def test_a_stage_in_float32_agrees_to_rounding(base: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(finished_run(base), run)
    out = merge(run, stage="sft")
    assert out == run / "merged-sft"
    measured = json.loads((run / "merge.json").read_text())["agreement"]
    assert measured["logprob_difference"] < 1e-4
    assert abs(measured["kl"]) < 1e-7
    assert measured["top1_agreement"] == 1.0


def test_a_4_bit_policy_is_merged_into_the_unquantized_base(base: Path, tmp_path: Path) -> None:
    random_adapter(base, tmp_path / "adapter", 1, **LINEAR)
    out = merge(pulled(tmp_path, base, {"load_in_4bit": True}))
    torch.testing.assert_close(logits(load(out)), policy_logits(base, tmp_path), rtol=1e-5, atol=1e-5)
    assert "quantization_config" not in json.loads((out / "config.json").read_text())
    record = json.loads((tmp_path / "merge.json").read_text())
    assert record["quantized_policy"] is True
    assert record["agreement"]["kl"] > 1e-3  # what 4 bits lost, the merged model does not lose
    assert 0 < record["agreement"]["top1_agreement"] < 1


def test_what_is_not_folded_is_refused_by_name(base: Path, tmp_path: Path) -> None:
    cases = {
        "bias": ({"bias": "all"}, "bias: all"),
        "lora_bias": ({"lora_bias": True}, "lora_bias: a bias in lora_B"),
        "tokens": ({"trainable_token_indices": [1, 2]}, "trainable_token_indices: trained tokens"),
    }
    for name, (settings, text) in cases.items():
        (tmp_path / name).mkdir()
        random_adapter(base, tmp_path / name / "adapter", 1, **(LINEAR | settings))
        with pytest.raises(toolkit.ModelError, match=rf"cannot be merged \({text}\); serve the adapter as it is"):
            merge(pulled(tmp_path / name, base), verify=False)
        assert not (tmp_path / name / "merged").exists()


@pytest.mark.parametrize("change", ["lost", "extra"])
def test_no_matrix_is_left_out(base: Path, tmp_path: Path, change: str) -> None:
    file = random_adapter(base, tmp_path / "adapter", 1, **LINEAR) / WEIGHTS
    weights = load_file(file)
    key = "base_model.model.model.layers.0.mlp.down_proj.lora_A.weight"
    value = weights.pop(key)
    if change == "extra":
        weights |= {key: value, key.replace("layers.0", "layers.9"): value.clone()}
    save_file(weights, file)
    text = r"layers.0.*lora_A.weight is not in the file" if change == "lost" else r"layers.9.*has no place in the base"
    with pytest.raises(toolkit.ModelError, match=text):
        merge(pulled(tmp_path, base), verify=False)


def test_a_change_without_a_tensor_to_go_to_is_refused(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base")
    random_adapter(base, tmp_path / "adapter", 1, **LINEAR)
    weights = load_file(base / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, base / "model.safetensors", {"format": "pt"})
    text = r"model.layers.1.mlp.up_proj.weight \(1 such\) is changed by the adapter, and the base does not store it so"
    with pytest.raises(toolkit.ModelError, match=text):
        merge(pulled(tmp_path, base), verify=False)


def test_experts_that_loading_fuses_are_refused(tmp_path: Path) -> None:
    """Transformers holds the experts as one parameter, the checkpoint holds each."""
    base = make_base(tmp_path / "base", "mixtral", **MIXTRAL)
    settings = {"target_modules": ["q_proj"], "target_parameters": ["mlp.experts.gate_up_proj"]}
    random_adapter(base, tmp_path / "adapter", 1, r=4, **settings)
    with pytest.raises(toolkit.ModelError, match=r"target_parameters: adapters of bare parameters"):
        merge(pulled(tmp_path, base), verify=False)


def test_nothing_is_overwritten_and_nothing_half_written_stays(base: Path, tmp_path: Path) -> None:
    file = random_adapter(base, tmp_path / "adapter", 1, **LINEAR) / WEIGHTS
    run = pulled(tmp_path, base)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("keep")
    with pytest.raises(toolkit.RunError, match="already there; remove it, or choose another folder with --output"):
        merge(run, output=tmp_path / "mine")
    with pytest.raises(toolkit.RunError, match=r"GB are needed and .* GB are free"):
        _check_disk(tmp_path / "merged", 10**18)
    save_file({key: value * 1e4 for key, value in load_file(file).items()}, file)
    with pytest.raises(toolkit.ProofError, match=r"NaN or infinite as torch\.float16; choose --dtype float32"):
        merge(run, dtype="float16", verify=False)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "mine", "resolved.json", "rows.jsonl"]


def test_a_base_that_has_changed_is_refused(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base")
    random_adapter(base, tmp_path / "adapter", 1, **LINEAR)
    run = pulled(tmp_path, base)
    weights = load_file(base / "model.safetensors")
    save_file({key: value + 1 for key, value in weights.items()}, base / "model.safetensors", {"format": "pt"})
    with pytest.raises(toolkit.ModelError, match="the base has changed since"):
        merge(run, verify=False)


def test_a_pulled_adapter_has_its_stages_name_and_no_data(base: Path, tmp_path: Path) -> None:
    """As `toolkit pull` leaves it: the records of every stage, the adapter of one."""
    shutil.copytree(finished_run(base), run := tmp_path / "run")
    shutil.rmtree(run / "sft" / "adapter")
    assert list(load_run(run).adapters) == ["dpo"]
    random_adapter(base, tmp_path / "adapter", 1, **LINEAR)
    alone = pulled(tmp_path, base)
    assert list(load_run(alone).adapters) == ["adapter"]
    (tmp_path / "rows.jsonl").unlink()
    with pytest.raises(toolkit.DataError, match=r"no such file: .*rows.jsonl.*\n.*--no-verify merges without"):
        merge(alone)
    with pytest.raises(toolkit.RunError, match="no finished stage 'sft'; found dpo"):
        merge(run, stage="sft")
    (run / "dpo" / "stage.json").unlink()
    shutil.rmtree(run / "adapter")
    with pytest.raises(toolkit.RunError, match="no stage is finished; run toolkit train again to resume"):
        load_run(run)


def test_what_is_no_run_is_said_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["merge", str(tmp_path / "nothing")]) == 2
    assert main(["merge", str(tmp_path)]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert lines[0].endswith("nothing: no such folder; expected the output of toolkit train or toolkit pull")
    assert lines[1].endswith("no resolved.json in it; expected the output of toolkit train or toolkit pull")
