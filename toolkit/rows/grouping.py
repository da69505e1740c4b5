"""Pairs of like length in one batch: less padding, the same expectation for every optimizer step."""

from collections.abc import Iterable, Iterator

import torch
from datasets import Dataset
from torch.utils.data import Sampler

GROUP = 50  # batches that are sorted together: more gives less padding, and batches that are less random
RUN = 4  # batches of like total length, among which pairs are sorted again by their longer completion

Length = tuple[int, int]
"""Tokens of prompt + chosen + rejected, which the backbone runs, and of the longer completion, which the head runs."""


def pair_lengths(rows: Dataset) -> list[Length]:
    """The lengths of every pair, `(rows,)`."""
    prompt, chosen, rejected = (_tokens(rows, name) for name in ("prompt_ids", "chosen_ids", "rejected_ids"))
    totals, longer = prompt + chosen + rejected, torch.maximum(chosen, rejected)
    return list(zip(totals.tolist(), longer.tolist(), strict=True))


def alike(rows: Iterable[int], lengths: list[Length], batch_size: int) -> list[list[int]]:
    """The rows in batches of like total length and, as far as that leaves a choice, of like longer completion."""
    ordered = sorted(rows, key=lambda row: (lengths[row], row))
    runs = (ordered[first : first + RUN * batch_size] for first in range(0, len(ordered), RUN * batch_size))
    again = [row for run in runs for row in sorted(run, key=lambda row: (lengths[row][1], row))]
    return [again[first : first + batch_size] for first in range(0, len(again), batch_size)]


class LengthGrouped(Sampler[int]):
    """A random order of the rows in which each run of `batch_size` rows has like lengths.

    The rows are shuffled, cut into groups of 50 batches, put into batches of like length within a group, and the
    batches of the whole epoch are shuffled. So every row is equally likely to be in any full batch, and the rows of a
    batch do not depend on how it is dealt out to processes. transformers'
    `LengthGroupedSampler` leaves a group's batches in order, long ones first, and the longest at the start.

    Args:
        lengths: Of each row, as by `pair_lengths`.
        batch_size: Rows that one optimizer step sees.
        seed: Seed of the order; each epoch has its own.
    """

    def __init__(self, lengths: list[Length], batch_size: int, seed: int):
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
        groups = (order[first : first + step] for first in range(0, len(order), step))
        batches = [batch for group in groups for batch in alike(group, self.lengths, self.batch_size)]
        for i in torch.randperm(len(batches), generator=generator).tolist():
            yield from batches[i]
        yield from rest


def _tokens(rows: Dataset, name: str) -> torch.Tensor:
    column = rows.with_format("arrow")[name]
    chunks = column.chunks if hasattr(column, "chunks") else [column]
    return torch.cat([torch.from_numpy(c.value_lengths().to_numpy(zero_copy_only=False).copy()) for c in chunks])
