"""Names in a `lora` section that mean nothing in the model, and adapters of embeddings."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

import toolkit
from tests.test_prefix_families import SMALL
from toolkit.models.targets import check_targets


def check(family: str, lora: dict[str, Any], **settings: Any) -> int:
    with torch.device("meta"):
        empty = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **SMALL | settings))
    return check_targets(empty, SimpleNamespace(lora={"r": 4} | lora), lambda key: f"lora.{key}")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("lora", "expected"),
    [
        ({"target_modules": ["q_proj", "v_prj"]}, "lora.target_modules: 'v_prj' matches nothing in this model; did you mean 'v_proj'?"),
        ({"exclude_modules": ["experts"]}, "lora.exclude_modules: 'experts' matches nothing in this model; remove it"),
        ({"exclude_modules": ".*experts"}, "lora.exclude_modules: '.*experts' matches nothing in this model; remove it"),
        ({"modules_to_save": ["score"]}, "lora.modules_to_save: 'score' matches nothing in this model; remove it"),
        ({"rank_pattern": {"q_prj": 2}}, "lora.rank_pattern: 'q_prj' matches nothing in this model; did you mean 'q_proj'?"),
        ({"target_modules": ["q_proj"], "alpha_pattern": {"up_proj": 2}}, "lora.alpha_pattern: 'up_proj' matches nothing in this model"),
        ({"target_modules": ["q_proj"], "layers_to_transform": [0, 4]}, "lora.layers_to_transform: 4 matches nothing in this model; remove it"),
        ({"target_modules": ["q_proj"], "target_parameters": ["experts.up"]}, "lora.target_parameters: 'experts.up' matches nothing in this model"),
        ({"trainable_token_indices": [3, 320]}, "lora.trainable_token_indices: 320 is no row of the embedding, which has 320"),
    ],
    ids=str,
)  # fmt: skip
def test_a_name_that_matches_nothing_is_refused(lora: dict[str, Any], expected: str) -> None:
    with pytest.raises(toolkit.ModelError) as refused:
        check("llama", lora)
    assert expected in str(refused.value)


def test_all_of_them_are_named() -> None:
    with pytest.raises(toolkit.ModelError) as refused:
        check("llama", {"rank_pattern": {"a": 2, "b": 2}, "modules_to_save": ["c"]})
    assert [line.split(": ")[1][:3] for line in str(refused.value).splitlines()] == ["'c'", "'a'", "'b'"]


def test_tokens_that_the_head_shares_are_not_trained_alone() -> None:
    with pytest.raises(toolkit.ModelError, match="from the head's own weight, which is the embedding's in this model"):
        check("llama", {"trainable_token_indices": [3]}, tie_word_embeddings=True)


@pytest.mark.parametrize(
    ("family", "settings", "lora"),
    [
        ("llama", {}, {"target_modules": ["layers.0.mlp.up_proj"], "rank_pattern": {"layers.0.mlp.up_proj": 2}}),
        ("llama", {}, {"exclude_modules": ".*q_proj", "modules_to_save": ["norm"]}),
        ("llama", {}, {"target_modules": ["q_proj"], "layers_to_transform": 3, "layers_pattern": "layers"}),
        ("llama", {}, {"modules_to_save": ["_head"]}),
        ("llama", {}, {"trainable_token_indices": [3]}),
        ("mixtral", {"num_local_experts": 4}, {"target_modules": ["q_proj", "w1", "w2", "w3"], "rank_pattern": {"q_proj": 2}}),
        ("qwen3_moe", {"head_dim": 8, "num_experts": 4, "moe_intermediate_size": 16}, {"target_modules": ["gate_proj", "up_proj", "down_proj"]}),
        ("qwen3_moe", {"head_dim": 8, "num_experts": 4, "moe_intermediate_size": 16}, {"target_parameters": ["mlp.experts.gate_up_proj"]}),
    ],
    ids=str,
)  # fmt: skip
def test_a_name_that_means_something_is_not(family: str, settings: dict[str, Any], lora: dict[str, Any]) -> None:
    """Experts are parameters in transformers 5; PEFT finds them by the names that they had as modules."""
    assert check(family, lora, **settings) > 0


@pytest.mark.parametrize("adapter", ["new", "continue"])
def test_an_adapter_of_the_embedding_is_its_own_reference(
    recipe: dict[str, Any], write: Any, tmp_path: Path, adapter: str
) -> None:
    recipe["lora"]["target_modules"] = ["q_proj", "embed_tokens"]
    recipe["stages"][1]["adapter"] = adapter
    proof = toolkit.train(write(recipe), output=tmp_path / "run").stages["dpo"]["proof"]
    assert proof["policy_vs_reference"] == 0.0
    assert proof["reference_vs_start"] < 1e-5
