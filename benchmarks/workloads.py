"""Models with random weights and data of known lengths, for both sides of the benchmark."""

import json
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

WORDS = 32_000
SHAPES: dict[str, dict[str, Any]] = {
    "llama-30m": {"model_type": "llama", "hidden_size": 384, "intermediate_size": 1024, "num_hidden_layers": 10,
                  "num_attention_heads": 6, "num_key_value_heads": 6, "tie_word_embeddings": True},
    "qwen2.5-0.5b": {"model_type": "qwen2", "hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24,
                     "num_attention_heads": 14, "num_key_value_heads": 2, "tie_word_embeddings": True,
                     "vocab_size": 151_936},
    "qwen2.5-7b": {"model_type": "qwen2", "hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28,
                   "num_attention_heads": 28, "num_key_value_heads": 4, "tie_word_embeddings": False,
                   "vocab_size": 152_064},
}  # fmt: skip


@dataclass(frozen=True)
class Lengths:
    """Tokens of a prompt and of a completion, each drawn evenly between two bounds."""

    prompt: tuple[int, int]
    completion: tuple[int, int]


LONG_PROMPTS = Lengths((180, 260), (12, 36))
SHORT_PROMPTS = Lengths((8, 52), (8, 42))
LONG_COMPLETIONS = Lengths((40, 80), (120, 280))
MIXED_ROWS = Lengths((4, 250), (6, 250))


def make_model(folder: Path, shape: str, dtype: str = "float32") -> Path:
    """Random weights, and a tokenizer of whole words `w0 w1 ...`, so that lengths are exact."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

    vocabulary = {"<pad>": 0, "<eos>": 1} | {f"w{i}": i + 2 for i in range(WORDS - 2)}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="<eos>").save_pretrained(folder)
    torch.manual_seed(0)
    settings = {"vocab_size": WORDS, "max_position_embeddings": 4096, "pad_token_id": 0, "eos_token_id": 1}
    config = AutoConfig.for_model(**(settings | SHAPES[shape]))
    config.bos_token_id = None
    torch.set_default_dtype(getattr(torch, dtype))
    model = AutoModelForCausalLM.from_config(config)
    torch.set_default_dtype(torch.float32)
    model.save_pretrained(folder)
    return folder


def make_rows(file: Path, kind: str, rows: int, lengths: Lengths) -> list[tuple[int, ...]]:
    """Write `rows` rows of random words for `dpo` or `sft`; returns the tokens of prompt and completions of each."""
    draw = random.Random(0)
    sides = ("chosen", "rejected") if kind == "dpo" else ("completion",)
    tokens = []
    with file.open("w", encoding="utf-8") as stream:
        for _ in range(rows):
            parts = (draw.randint(*lengths.prompt), *(draw.randint(*lengths.completion) for _ in sides))
            row = {"prompt": _text(draw, parts[0])}
            row |= {side: f" {_text(draw, n - 1)} <eos>" for side, n in zip(sides, parts[1:], strict=True)}
            stream.write(json.dumps(row) + "\n")
            tokens.append(parts)
    return tokens


def predicted(shape: str, pairs: list[tuple[int, ...]], batch: int, epochs: int = 1) -> dict[str, float]:
    """How many times faster DPO should be on CPU, where TRL's head scores every position, padding counted.

    Frozen weights cost one unit forward and one backward. TRL: policy forward and backward, reference forward, over
    whole rows, in every epoch. Cold: the same passes over pairs that share their prompt, in batches of like length, the
    reference once. Warm: without the reference.
    """
    backbone, head = _per_token(shape)
    trl = shared = 0
    alike = sorted(pairs, key=sum)
    for first in range(0, len(pairs), batch):
        as_drawn, grouped = pairs[first : first + batch], alike[first : first + batch]
        trl += 2 * len(as_drawn) * max(p + max(c, r) for p, c, r in as_drawn) * (backbone + head)
        shared += len(grouped) * max(map(sum, grouped)) * backbone
        shared += 2 * len(grouped) * max(1 + max(c, r) for _, c, r in grouped) * head
    return {"cold": 3 * epochs / (2 * epochs + 1) * trl / shared, "warm": 1.5 * trl / shared}


def predicted_packed(shape: str, rows: list[tuple[int, ...]], batch: int, length: int) -> float:
    """The same for SFT rows packed to `length` tokens, whose head scores completions only, against padded ones."""
    backbone, head = _per_token(shape)
    batches = [rows[first : first + batch] for first in range(0, len(rows), batch)]
    padded = sum(len(rows) * max(map(sum, rows)) for rows in batches)
    packed = -(-sum(map(sum, rows)) // length) * length
    return padded * (backbone + head) / (packed * backbone + sum(c for _, c in rows) * head)


def _per_token(shape: str) -> tuple[int, int]:
    """Weights that a token passes in the backbone, and in the head."""
    s = SHAPES[shape]
    width = s["hidden_size"] // s["num_attention_heads"]
    attention = s["hidden_size"] * width * (2 * s["num_attention_heads"] + 2 * s["num_key_value_heads"])
    backbone = s["num_hidden_layers"] * (attention + 3 * s["hidden_size"] * s["intermediate_size"])
    return backbone, s["hidden_size"] * s.get("vocab_size", WORDS)


def _text(draw: random.Random, words: int) -> str:
    return " ".join(f"w{draw.randrange(WORDS - 2)}" for _ in range(words))
