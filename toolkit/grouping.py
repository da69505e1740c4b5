"""Pairs of like length in one batch: less padding, the same expectation for every optimizer step."""

from collections.abc import Iterator

import torch
from torch.utils.data import Sampler

GROUP = 50  # batches that are sorted together: more gives less padding, and batches that are less random


class LengthGrouped(Sampler[int]):
    """A random order of the rows in which each run of `batch_size` rows has like lengths.

    The rows are shuffled, cut into groups of 50 batches, sorted by length within a group, cut into batches, and the
    batches of the whole epoch are shuffled. So every row is equally likely to be in any full batch, and the rows of a
    batch do not depend on how it is dealt out to processes. transformers'
    `LengthGroupedSampler` leaves a group's batches in order, long ones first, and the longest at the start.

    Args:
        lengths: Tokens of each row.
        batch_size: Rows that one optimizer step sees.
        seed: Seed of the order; each epoch has its own.
    """

    def __init__(self, lengths: list[int], batch_size: int, seed: int):
        self.lengths, self.batch_size, self.seed = lengths, batch_size, seed
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Called by accelerate's data loader, on resuming as well."""
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.lengths)

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed + self.epoch)
        order = torch.randperm(len(self.lengths), generator=generator).tolist()
        full = len(order) - len(order) % self.batch_size
        order, rest = order[:full], order[full:]  # a short batch anywhere but at the end would shift all the others
        step = self.batch_size * GROUP
        grouped = [
            row
            for first in range(0, len(order), step)
            for row in sorted(order[first : first + step], key=lambda row: (self.lengths[row], row))
        ]
        batches = [grouped[first : first + self.batch_size] for first in range(0, len(grouped), self.batch_size)]
        for i in torch.randperm(len(batches), generator=generator).tolist():
            yield from batches[i]
        yield from rest
