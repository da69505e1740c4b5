"""TRL's head on CPUs: smaller tiles, the same numbers, and TRL as it was afterwards."""

from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from trl.kernels import chunked_logprob

from toolkit.models.head import small_tiles

TOKENS, WIDTH, VOCABULARY = 300, 8, 50


class Tiles(TorchDispatchMode):
    """Notes the tokens of every tile of logits."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens: list[int] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.mm.out and args[1].shape[1] == VOCABULARY:
            self.tokens.append(args[0].shape[0])
        return func(*args, **(kwargs or {}))


def log_probs_and_gradient(device: str) -> tuple[torch.Tensor, torch.Tensor, list[int]]:
    torch.manual_seed(0)
    hidden = torch.randn(TOKENS, WIDTH, requires_grad=True)
    weight, targets = torch.randn(VOCABULARY, WIDTH), torch.randint(VOCABULARY, (TOKENS,))
    with small_tiles(device), Tiles() as tiles:
        outputs = ("entropy", "mean_logits", "is_top1")
        found = chunked_logprob.ChunkedLogProbFunction.apply(
            hidden, weight, None, targets, 1.0, 32_768, None, 1.0, outputs
        )
        found[0].sum().backward()
    assert hidden.grad is not None
    return found[0].detach(), hidden.grad, tiles.tokens


def test_tiles_are_smaller_and_the_numbers_the_same() -> None:
    logps, gradient, tiles = log_probs_and_gradient("cpu")
    own_logps, own_gradient, own_tiles = log_probs_and_gradient("cuda")
    assert (tiles, own_tiles) == ([128, 128, 44] * 2, [300] * 2)
    torch.testing.assert_close(logps, own_logps, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(gradient, own_gradient, rtol=1e-5, atol=1e-6)


def test_trl_is_as_it_was_afterwards() -> None:
    before = chunked_logprob.TOKEN_CHUNK_SIZE
    with pytest.raises(KeyError), small_tiles("cpu"):
        raise KeyError
    assert before == chunked_logprob.TOKEN_CHUNK_SIZE == 4096
