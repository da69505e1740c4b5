"""Prefix sharing under flex_attention: is it sdpa's result, and what do new lengths compile?

    python benchmarks/flex.py [--device cpu|cuda] [--batches 12]

A tiny Qwen2 with full and sliding layers runs batches of random lengths under both. Every line: the packed shape,
seconds, the largest difference of hidden states (and of gradients on CUDA; flex_attention has no backward on CPUs), and
how many graphs were compiled by then.
"""

import argparse
import time
from typing import Any

import torch
from torch._dynamo.utils import counters
from transformers import AutoConfig, AutoModelForCausalLM

from toolkit.models.prefix import IDS, LENGTHS, PairCollator, backbone_of, share_prefix

SHAPE = {"vocab_size": 128, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2,
         "num_attention_heads": 4, "num_key_value_heads": 2,
         "use_sliding_window": True, "sliding_window": 24, "max_window_layers": 1}  # fmt: skip


def model(attention: str, device: str) -> Any:
    torch.manual_seed(0)
    config = AutoConfig.for_model("qwen2", **SHAPE)
    built = AutoModelForCausalLM.from_config(config, attn_implementation=attention).to(device).eval()
    assert built.config._attn_implementation == attention
    share_prefix(built)
    return built


def batch(generator: torch.Generator, pairs: int, device: str) -> dict[str, torch.Tensor]:
    def ids(low: int, high: int) -> list[int]:
        n = int(torch.randint(low, high, (1,), generator=generator))
        return torch.randint(1, 128, (n,), generator=generator).tolist()

    rows = [{"prompt_ids": ids(60, 200), "chosen_ids": ids(40, 90), "rejected_ids": ids(40, 90)} for _ in range(pairs)]
    return {name: tensor.to(device) for name, tensor in PairCollator(0)(rows).items()}


def hidden_and_gradient(model: Any, rows: dict[str, torch.Tensor], backward: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Hidden states of the completions, `(tokens, hidden)`, and the gradient of the embeddings."""
    inputs = {name: rows[name] for name in ("input_ids", "attention_mask", "position_ids", IDS, LENGTHS)}
    model.zero_grad()
    with torch.set_grad_enabled(backward):
        hidden = backbone_of(model)(**inputs, use_cache=False).last_hidden_state[rows["completion_mask"].bool()]
    if backward:
        hidden.square().sum().backward()
    gradient = model.get_input_embeddings().weight.grad
    return hidden.detach(), torch.zeros(1) if gradient is None else gradient


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--batches", type=int, default=12)
    args = parser.parse_args()
    flex, sdpa = (model(attention, args.device) for attention in ("flex_attention", "sdpa"))
    generator = torch.Generator().manual_seed(0)
    print(f"{'packed':>12} {'seconds':>8} {'hidden':>8} {'gradient':>8} {'graphs':>7}")
    for i in range(args.batches):
        rows = batch(generator, 2 + (i % 3 > 0), args.device)
        began = time.perf_counter()
        ours = hidden_and_gradient(flex, rows, args.device == "cuda")
        seconds = time.perf_counter() - began
        theirs = hidden_and_gradient(sdpa, rows, args.device == "cuda")
        apart = [(a - b).abs().max().item() for a, b in zip(ours, theirs, strict=True)]
        shape = "x".join(map(str, rows[IDS].shape))
        graphs = counters["frames"]["ok"]
        print(f"{shape:>12} {seconds:>8.2f} {apart[0]:>8.0e} {apart[1]:>8.0e} {graphs:>7}", flush=True)


if __name__ == "__main__":
    main()
