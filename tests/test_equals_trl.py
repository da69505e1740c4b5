"""The toolkit's stages are TRL's trainers: the same rows, the same losses, as a plain TRL script."""

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import load_dataset
from peft import LoraConfig, PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

import toolkit
from tests.conftest import answers, messages, pairs, write_jsonl
from toolkit.training.progress import read_metrics

LORA = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM")


def settings(folder: Path) -> dict[str, Any]:
    return {
        "output_dir": str(folder / "trl"),
        "per_device_train_batch_size": 4,
        "gradient_checkpointing": False,
        "logging_steps": 1,
        "learning_rate": 1e-2,
        "save_strategy": "no",
        "num_train_epochs": 1,
        "lr_scheduler_type": "cosine",
        "bf16": False,
        "seed": 7,
        "report_to": "none",
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
    }


def losses(lines: list[dict[str, Any]], *names: str) -> torch.Tensor:
    return torch.tensor([[line[name] for name in names] for line in lines if "loss" in line])


@pytest.fixture
def plain(base: Path) -> tuple[Any, Any]:
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    return model, AutoTokenizer.from_pretrained(base)


def test_sft_has_the_losses_of_a_plain_trl_script(
    recipe: dict[str, Any], write: Any, plain: Any, tmp_path: Path
) -> None:
    result = toolkit.train(write(recipe), output=tmp_path / "run", stage="sft")
    model, tokenizer = plain
    rows = load_dataset("json", data_files=str(tmp_path / "sft.jsonl"), split="train")
    args = SFTConfig(**settings(tmp_path), warmup_steps=0.03, assistant_only_loss=True)
    trainer = SFTTrainer(model, args, train_dataset=rows, processing_class=tokenizer, peft_config=LORA)
    trainer.train()
    ours = losses(read_metrics(result.output / "sft" / "metrics.jsonl"), "loss", "grad_norm")
    torch.testing.assert_close(ours, losses(trainer.state.log_history, "loss", "grad_norm"), rtol=1e-6, atol=0)


@pytest.mark.parametrize("rows", ["conversations", "text"])
def test_dpo_has_the_losses_of_a_plain_trl_script(
    recipe: dict[str, Any], write: Any, plain: Any, tmp_path: Path, rows: str
) -> None:
    if rows == "text":
        texts = [{"prompt": r["question"], "chosen": " " + r["good"], "rejected": " " + r["bad"]} for r in answers(12)]
        write_jsonl(tmp_path / "dpo.jsonl", texts)
    recipe["stages"] = recipe["stages"][1:]
    recipe["stages"][0]["trainer"]["train_sampling_strategy"] = "random"
    result = toolkit.train(write(recipe), output=tmp_path / "run")
    model, tokenizer = plain
    data = load_dataset("json", data_files=str(tmp_path / "dpo.jsonl"), split="train")
    args = DPOConfig(**settings(tmp_path), warmup_steps=0.1, beta=0.1)
    trainer = DPOTrainer(model, args=args, train_dataset=data, processing_class=tokenizer, peft_config=LORA)
    trainer.train()
    names = ("loss", "grad_norm", "rewards/margins", "logps/chosen", "logps/rejected")
    ours = losses(read_metrics(result.output / "dpo" / "metrics.jsonl"), *names)
    torch.testing.assert_close(ours, losses(trainer.state.log_history, *names), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "options",
    [{"ld_alpha": 0.5}, {"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, 0.5]}, {"use_weighting": True}],
    ids=str,
)
def test_dpo_has_trls_losses_of_other_kinds_too(
    recipe: dict[str, Any], write: Any, plain: Any, tmp_path: Path, options: dict[str, Any]
) -> None:
    """The reference computed before training, where TRL computes it on every step."""
    recipe["stages"] = recipe["stages"][1:]
    recipe["stages"][0]["trainer"] |= {"train_sampling_strategy": "random", **options}
    result = toolkit.train(write(recipe), output=tmp_path / "run")
    model, tokenizer = plain
    data = load_dataset("json", data_files=str(tmp_path / "dpo.jsonl"), split="train")
    args = DPOConfig(**settings(tmp_path), warmup_steps=0.1, beta=0.1, **options)
    trainer = DPOTrainer(model, args=args, train_dataset=data, processing_class=tokenizer, peft_config=LORA)
    trainer.train()
    names = ("loss", "grad_norm", "rewards/margins")
    ours = losses(read_metrics(result.output / "dpo" / "metrics.jsonl"), *names)
    torch.testing.assert_close(ours, losses(trainer.state.log_history, *names), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("adapter", ["new", "continue"])
def test_dpo_after_sft_equals_trl_with_the_merged_sft_model_as_reference(
    recipe: dict[str, Any], write: Any, plain: Any, tmp_path: Path, adapter: str
) -> None:
    recipe["stages"][1]["adapter"] = adapter
    recipe["stages"][1]["trainer"]["train_sampling_strategy"] = "random"
    result = toolkit.train(write(recipe), output=tmp_path / "run")
    model, tokenizer = plain
    policy = PeftModel.from_pretrained(model, result.output / "sft" / "adapter", is_trainable=adapter == "continue")
    policy, config = (policy.merge_and_unload(), LORA) if adapter == "new" else (policy, None)
    reference = AutoModelForCausalLM.from_pretrained(recipe["model"]["name_or_path"], dtype=torch.float32)
    reference = PeftModel.from_pretrained(reference, result.output / "sft" / "adapter").merge_and_unload()
    data = load_dataset("json", data_files=str(tmp_path / "dpo.jsonl"), split="train")
    args = DPOConfig(**settings(tmp_path), warmup_steps=0.1, beta=0.1)
    ours = read_metrics(result.output / "dpo" / "metrics.jsonl")
    trainer = DPOTrainer(policy, reference, args, train_dataset=data, processing_class=tokenizer, peft_config=config)
    trainer.train()
    names = ("loss", "grad_norm", "rewards/margins", "logps/chosen")
    torch.testing.assert_close(losses(ours, *names), losses(trainer.state.log_history, *names), rtol=1e-4, atol=1e-5)


def test_sft_tokens_are_trls(recipe: dict[str, Any], write: Any, plain: Any, tmp_path: Path) -> None:
    from toolkit.recipe.plan import Hardware, stage_plans
    from toolkit.rows.chat import load_tokenizer
    from toolkit.rows.data import prepare

    both = [{"prompt": m["messages"][:1], "completion": m["messages"][1:]} for m in messages(12)]
    write_jsonl(tmp_path / "sft.jsonl", both)
    recipe["stages"][0]["trainer"]["max_length"] = 25
    loaded = toolkit.load_recipe(write(recipe))
    ours = prepare(loaded, stage_plans(loaded, Hardware("cpu", False))[0], load_tokenizer(loaded)).train
    model, tokenizer = plain
    rows = load_dataset("json", data_files=str(tmp_path / "sft.jsonl"), split="train")
    args = SFTConfig(**settings(tmp_path), max_length=25)
    theirs = SFTTrainer(model, args, train_dataset=rows, processing_class=tokenizer, peft_config=LORA).train_dataset
    assert 0 < len(ours) < 12
    assert ours["input_ids"][:] == theirs["input_ids"][:]
    assert ours["labels"][:] == theirs["labels"][:]
    assert ours["labels"][0][:22] == [-100] * 22
    assert ours["labels"][0][22:] == ours["input_ids"][0][22:]


def test_dpo_tokens_are_trls(recipe: dict[str, Any], write: Any, plain: Any, tmp_path: Path) -> None:
    from toolkit.recipe.plan import Hardware, stage_plans
    from toolkit.rows.chat import load_tokenizer
    from toolkit.rows.data import prepare

    implicit = [{side: p["prompt"] + p[side] for side in ("chosen", "rejected")} for p in pairs(12)]
    write_jsonl(tmp_path / "dpo.jsonl", implicit)
    recipe["stages"][1]["trainer"]["max_length"] = 28
    loaded = toolkit.load_recipe(write(recipe))
    ours = prepare(loaded, stage_plans(loaded, Hardware("cpu", False))[1], load_tokenizer(loaded)).train
    model, tokenizer = plain
    rows = load_dataset("json", data_files=str(tmp_path / "dpo.jsonl"), split="train")
    args = DPOConfig(**settings(tmp_path), max_length=28)
    theirs = DPOTrainer(
        model, args=args, train_dataset=rows, processing_class=tokenizer, peft_config=LORA
    ).train_dataset
    assert 0 < len(ours) < 12
    for name in ("prompt_ids", "chosen_ids", "rejected_ids"):
        assert ours[name][:] == theirs[name][:]
