"""One recipe in, one adapter out: what a run promises, held against plain transformers, PEFT and TRL."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import toolkit
from toolkit.training.progress import read_metrics


def logits(base: Path, adapter: Path | None = None, **load: Any) -> torch.Tensor:
    """Logits of base, or base + adapter, with nothing of the toolkit's, `(1, seq, vocab)`."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32, **load)
    if adapter is not None:
        model = PeftModel.from_pretrained(model, adapter)
    ids = AutoTokenizer.from_pretrained(base)("what is the sun and what is the moon", return_tensors="pt").input_ids
    with torch.no_grad():
        return model.eval()(ids).logits


@pytest.fixture
def run(recipe: dict[str, Any], write: Any, tmp_path: Path) -> Any:
    """Write the recipe and train it."""

    def _run(output: str = "run", **options: Any) -> toolkit.RunResult:
        return toolkit.train(write(recipe), output=tmp_path / output, **options)

    return _run


def test_a_run_leaves_one_plain_adapter_that_differs_from_base_and_sft(run: Any, base: Path) -> None:
    result = run()
    sft, dpo = result.output / "sft" / "adapter", result.output / "adapter"
    assert not torch.allclose(logits(base), logits(base, sft), atol=1e-3)
    assert not torch.allclose(logits(base, sft), logits(base, dpo), atol=1e-3)
    assert json.loads((dpo / "adapter_config.json").read_text())["r"] == 8
    assert sorted(p.name for p in dpo.iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
        "chat_template.jinja",
        "tokenizer.json",
        "tokenizer_config.json",
    ]


def test_the_base_is_bit_identical_after_training(run: Any, base: Path) -> None:
    before = load_file(base / "model.safetensors")
    run()
    after = load_file(base / "model.safetensors")
    assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize("adapter", ["new", "continue"])
@pytest.mark.parametrize(
    "quantization", [None, {"load_in_8bit": True}, {"load_in_4bit": True}], ids=["fp32", "int8", "nf4"]
)
def test_the_reference_is_the_sft_policy_and_not_the_base(
    recipe: dict[str, Any], run: Any, adapter: str, quantization: dict[str, Any] | None
) -> None:
    recipe["quantization"] = quantization
    recipe["stages"][1]["adapter"] = adapter
    proof = run().stages["dpo"]["proof"]
    assert proof["policy_vs_reference"] == 0.0
    assert proof["reference_vs_start"] < (1e-5 if quantization is None else 5e-2)
    assert proof["first_loss"] == pytest.approx(math.log(2), abs=1e-6)


def test_metrics_are_json_lines_with_trl_names_and_numbers(run: Any) -> None:
    lines = read_metrics(run().output / "dpo" / "metrics.jsonl")
    assert [line["step"] for line in lines] == [1, 2, 3, 3]
    assert lines[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)
    for name in ("rewards/margins", "rewards/accuracies", "logps/chosen", "logps/rejected", "grad_norm"):
        assert isinstance(lines[0][name], float)


def test_three_stages_stack_by_rank(recipe: dict[str, Any], run: Any) -> None:
    recipe["stages"].append({**recipe["stages"][1], "name": "again", "lora": {"r": 2, "use_rslora": True}})
    result = run()
    config = json.loads((result.output / "adapter" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["use_rslora"]) == (10, 10, False)
    assert result.stages["again"]["reference"] == "base + dpo adapter (the new adapter disabled)"
    assert result.stages["again"]["reloaded_vs_policy"] < 1e-5


def test_from_base_makes_the_base_the_reference(recipe: dict[str, Any], run: Any) -> None:
    recipe["stages"][1]["from"] = "base"
    result = run()
    assert result.stages["dpo"]["reference"] == "base (the stage's adapter disabled)"
    assert json.loads((result.output / "adapter" / "adapter_config.json").read_text())["r"] == 4
