"""Prefix sharing by model family: equal to plain TRL down to the LoRA gradients, or refused with a reason."""

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForSeq2SeqLM

from tests.test_prefix import assert_equal, pair, trainer
from toolkit.models.prefix import PairCollator
from toolkit.models.prefix_check import reason_against, self_check

SMALL = {
    "vocab_size": 320,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "eos_token_id": 1,
    "bos_token_id": 2,
}
GPT2 = {"n_embd": 32, "n_head": 4, "n_layer": 2, "n_positions": 64}
EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
DEEPSEEK = {
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_group": 2,
    "topk_group": 1,
    "moe_intermediate_size": 16,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
    "num_key_value_heads": 4,
    "first_k_dense_replace": 1,
}
WINDOW = {"sliding_window": 6}  # tokens; every row below is longer
MIXED = {**WINDOW, "layer_types": ["sliding_attention", "full_attention"] * 2}
LONGROPE = {"type": "longrope", "short_factor": [1.0] * 4, "long_factor": [4.0] * 4, "rope_theta": 10000.0}
ROWS = [pair(11, 4, 7, 1), pair(8, 9, 2, 2), pair(14, 3, 3, 3)]

EQUAL = {
    "llama": {},
    "mistral": WINDOW,
    "qwen2": {},
    "qwen2 with some windows": {**WINDOW, "use_sliding_window": True, "max_window_layers": 2},
    "qwen3": {"head_dim": 8},
    "qwen3_moe": {"head_dim": 8, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16},
    "mixtral": {**EXPERTS, **WINDOW},
    "gemma2": {**MIXED, "head_dim": 8, "attn_implementation": "eager"},
    "gemma3_text": {**MIXED, "head_dim": 8},
    "phi3": WINDOW,
    "phi3 with long rope": {"rope_parameters": {**LONGROPE, "original_max_position_embeddings": 24}},
    "olmo2": {},
    "olmo3": MIXED,
    "smollm3": {},
    "gpt2": GPT2,
    "gpt_oss": {**EXPERTS, **MIXED, "head_dim": 8, "attn_implementation": "eager"},
    "cohere2": MIXED,
    "granite": {},
    "deepseek_v3": DEEPSEEK,
    "opt": {"ffn_dim": 48, "word_embed_proj_dim": 32, "dropout": 0.0},  # TRL turns only modules off, not this
    "falcon": {"alibi": False},
    "llama with dynamic rope": {
        "rope_parameters": {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 10000.0},
        "max_position_embeddings": 16,
    },
}
MIXTURES = ("qwen3_moe", "mixtral", "gpt_oss")

REFUSED = {
    "falcon": ({"alibi": True}, "falcon uses ALiBi, which takes columns for positions"),
    "bloom": ({"n_head": 4, "n_layer": 2}, "bloom takes no position_ids"),
    "mpt": ({"d_model": 32, "n_heads": 4, "n_layers": 2, "max_seq_len": 64}, "mpt takes no position_ids"),
    "gpt_neo": (
        {"num_layers": 4, "num_heads": 4, "attention_types": [[["global", "local"], 2]], "window_size": 6},
        "gpt_neo windows its local attention by columns",
    ),
    "lfm2": (
        {"layer_types": ["conv", "full_attention"] * 2},
        "lfm2 has layers of another kind than attention over tokens: conv",
    ),
    "mamba": ({}, "mamba carries a state from token to token"),
    "jamba": ({}, "jamba carries a state from token to token"),
    "qwen3_next": (
        {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16},
        "qwen3_next carries a state from token to token",
    ),
    "deepseek_v32": (
        {**DEEPSEEK, "index_topk": 4, "index_n_heads": 2, "index_head_dim": 16},
        "deepseek_v32 has layers of another kind than attention over tokens: indexed_attention",
    ),
    "llama4_text": (
        {"head_dim": 8, "num_local_experts": 4, "intermediate_size_mlp": 48},
        "llama4_text has no backbone apart from its language model head",
    ),
    "t5": ({"d_model": 32, "d_ff": 48, "num_layers": 2, "num_heads": 4}, "t5 is an encoder-decoder"),
}


def tiny(family: str, settings: dict[str, Any], auto: Any = AutoModelForCausalLM) -> Any:
    """A random model in float32; weights wide enough that attention to a wrong token shows."""
    settings = dict(settings)
    kind = {"attn_implementation": settings.pop("attn_implementation", None)}
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = auto.from_config(AutoConfig.for_model(family, **SMALL | settings), dtype=torch.float32, **kind)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.15)
    return model


@pytest.mark.parametrize("name", EQUAL)
def test_equals_trl(name: str, tmp_path: Path) -> None:
    model = tiny(name.split(maxsplit=1)[0], EQUAL[name])
    assert reason_against(model) is None
    settings = {"router_aux_loss_coef": 0.5} if name in MIXTURES else {}
    built = trainer(tmp_path, model, ROWS, **settings)
    assert built.aux_loss_enabled == (name in MIXTURES)
    assert_equal(built, ROWS)
    assert self_check(built.model, ROWS[:1], PairCollator(0)).passed
    assert self_check(built.model, ROWS[:1], PairCollator(0), sharded=True).passed  # as FSDP calls it


@pytest.mark.parametrize("family", REFUSED)
def test_refused_with_a_reason(family: str) -> None:
    settings, reason = REFUSED[family]
    auto = AutoModelForSeq2SeqLM if family == "t5" else AutoModelForCausalLM
    assert reason_against(tiny(family, settings, auto)) == reason


def test_flash_attention_is_refused() -> None:
    model = tiny("llama", {})
    model.config._attn_implementation = "flash_attention_2"
    assert str(reason_against(model)).startswith("attention 'flash_attention_2' takes no mask of ours")


@pytest.mark.parametrize("family", ["gpt_neo", "mpt", "deepseek_v32"])
def test_the_check_catches_what_differs(family: str) -> None:
    check = self_check(tiny(family, REFUSED[family][0]), ROWS[:1], PairCollator(0))
    assert not check.passed
    assert check.difference > 0.04
    assert "more than the" in str(check)


@pytest.mark.parametrize("family", ["falcon", "bloom", "lfm2", "mamba", "jamba", "qwen3_next"])
def test_the_check_catches_what_does_not_run(family: str) -> None:
    check = self_check(tiny(family, REFUSED[family][0]), ROWS[:1], PairCollator(0))
    assert not check.passed
    assert str(check).startswith("the model does not run packed rows: ")


@pytest.mark.parametrize(("max_length", "longest"), [(None, 101 + 13), (64, 16 + 13)])
def test_the_check_runs_rows_longer_than_a_window_where_training_has_them(max_length: int | None, longest: int) -> None:
    model, seen = tiny("mistral", {"sliding_window": 100}), []
    model.get_input_embeddings().register_forward_pre_hook(lambda module, args: seen.append(args[0].shape[1]))
    assert self_check(model, ROWS, PairCollator(0, max_length)).passed
    assert longest in seen


@pytest.mark.parametrize(("max_length", "unreached"), [(None, 5000), (8192, 5000), (5000, None)])
def test_the_check_says_which_window_it_did_not_reach(max_length: int | None, unreached: int | None) -> None:
    check = self_check(tiny("mistral", {"sliding_window": 5000}), ROWS, PairCollator(0, max_length))
    assert check.passed
    assert check.unreached == unreached
    assert ("a window of 5000 tokens was not reached" in str(check)) == bool(unreached)


def test_chunked_attention_is_equal() -> None:
    """Llama 4's text model on its own: TRL cannot train it, and no other family has chunks."""
    settings = {"layer_types": ["chunked_attention", "full_attention"] * 2, "attention_chunk_size": 5}
    settings |= {"attn_temperature_tuning": False, "head_dim": 8, "num_local_experts": 4, "intermediate_size_mlp": 48}
    check = self_check(tiny("llama4_text", settings, AutoModel), ROWS, PairCollator(0))
    assert check.difference < 1e-6
