"""TRL's fused language model head on CPUs, in tiles that are small enough to be kept by the allocator.

TRL 1.16 projects 4,096 tokens at a time. On GPUs a kernel folds such a tile in place. Without one, torch makes some
eight copies of it, each over malloc's largest threshold (32 MiB): the system hands out and clears their pages on every
step. That is half of the time of a small model's step, and most of its memory. Sums go over the vocabulary, token by
token, so the tokens of a tile change nothing but that.
"""

from collections.abc import Iterator
from contextlib import contextmanager

from trl.kernels import chunked_logprob

TILE = (4096, 32_768)
"""Tokens x vocabulary that TRL projects at a time, on every device."""
CPU_TOKENS = 128  # 16 MiB of float32; with 64 the product is slower, with 256 some tiles reach the threshold


@contextmanager
def small_tiles(device: str) -> Iterator[None]:
    """Within, TRL's head takes `CPU_TOKENS` tokens at a time where `device` is "cpu"; elsewhere its own number.

    The number is a constant of TRL's, with no setting. Remove when there is one, or when it goes by device.
    """
    own = chunked_logprob.TOKEN_CHUNK_SIZE
    if device == "cpu":
        chunked_logprob.TOKEN_CHUNK_SIZE = CPU_TOKENS
    try:
        yield
    finally:
        chunked_logprob.TOKEN_CHUNK_SIZE = own
