"""Reference log-probabilities in one pass before training: from the cache, or computed and cached."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from accelerate.utils import gather_object
from datasets import Dataset

from toolkit.job import StageJob
from toolkit.launching.processes import from_main
from toolkit.rows.grouping import alike, pair_lengths
from toolkit.training import cache
from toolkit.training.cache import NAMES, Entry
from toolkit.training.progress import say
from toolkit.training.proof import OTHER_PATH, rounding

WIDER = 2  # a pass without gradients takes so many times the rows of a training step
CHECKED_ROWS = 4


def with_reference(job: StageJob, built: Any, rows: Dataset, what: str) -> Dataset:
    """The rows with the columns `ref_chosen_logps`, `ref_rejected_logps`, in nats, which TRL's collator knows.

    Args:
        built: the stage's `DPOTrainer`, whose reference has been proven.
        what: name of the rows, for the line that is printed.
    """
    key = cache.key(job, rows)
    entry, unusable = _from_cache(job, built, rows, key)
    if unusable:
        say(f"  reference: {unusable}; computed again")
    if entry is not None:
        say(f"  reference: {len(rows):,} {what} pairs from the cache: same base, start adapter, dtype and token ids")
    else:
        entry = _compute(built, rows, what)
        not_kept = cache.write(key, entry) if built.accelerator.is_main_process else ""
        say(f"  reference: {len(rows):,} {what} pairs computed" + (f"; not kept: {not_kept}" if not_kept else ""))
    for name in NAMES:
        rows = rows.add_column(name, getattr(entry, name).tolist())
    return rows


def _from_cache(job: StageJob, built: Any, rows: Dataset, key: str) -> tuple[Entry | None, str]:
    """The main process reads for all, so that every rank trains on the same numbers."""
    entry, unusable = from_main(cache.read(key, len(rows)) if built.accelerator.is_main_process else None)
    if entry is None:
        return None, unusable
    first = list(range(min(CHECKED_ROWS, len(rows))))
    with _evaluating(built.model):
        live = _logps(built, rows, first)
    worst = max(
        abs(live[side][i] - float(getattr(entry, name)[i])) / max(len(rows[i][f"{name.split('_')[1]}_ids"]), 1)
        for side, name in enumerate(NAMES)
        for i in first
    )
    worst = from_main(worst)  # or one rank would compute while the others train
    if not worst <= OTHER_PATH[rounding(job)]:
        return None, f"the cache disagrees with the reference model by {worst:.2g} nats per token"
    return entry, ""


def _compute(built: Any, rows: Dataset, what: str) -> Entry:
    """Every process computes its share of the batches, like lengths together, the longest first."""
    state, size = built.accelerator, WIDER * built.args.per_device_train_batch_size
    batches = alike(range(len(rows)), pair_lengths(rows), size)[::-1]
    values: list[tuple[int, float, float]] = []
    with _evaluating(built.model):
        for batch in _tracked(batches[state.process_index :: state.num_processes], what):
            values += zip(batch, *_logps(built, rows, batch), strict=True)
    everyone = dict((i, pair) for i, *pair in gather_object(values))
    table = torch.tensor([everyone[i] for i in range(len(rows))], dtype=torch.float32)
    return Entry(table[:, 0].contiguous(), table[:, 1].contiguous())


@contextmanager
def _evaluating(model: Any) -> Iterator[None]:
    was_training = model.training
    model.eval()
    yield
    model.train(was_training)


def _logps(built: Any, rows: Dataset, indices: list[int]) -> tuple[list[float], list[float]]:
    """TRL's own computation, for the rows of these indices: chosen and rejected, in nats."""
    inputs = built._prepare_inputs(built.data_collator([rows[i] for i in indices]))
    chosen, rejected = built.compute_ref_log_probs(built.model, inputs)
    return chosen.float().tolist(), rejected.float().tolist()


def _tracked(batches: list[list[int]], what: str) -> Iterator[list[int]]:
    from rich.progress import track

    yield from track(batches, f"reference ({what})", disable=not sys.stdout.isatty(), transient=True)
