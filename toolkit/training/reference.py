"""Reference log-probabilities in one pass before training: from the cache, or computed and cached."""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from datasets import Dataset

from toolkit.job import StageJob
from toolkit.launching.processes import from_all, from_main, own_share
from toolkit.rows.grouping import alike, pair_lengths
from toolkit.training import cache
from toolkit.training.cache import NAMES, Entry, Pairs
from toolkit.training.progress import say
from toolkit.training.proof import OTHER_PATH, rounding

WIDER = 2  # a pass without gradients takes so many times the rows of a training step
CHECKED_ROWS = 4
KEPT_EVERY = 30.0  # seconds of an unfinished pass that a SIGKILL may cost


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
        entry = _compute(job, built, rows, what, key)
        not_kept = from_main(cache.write(key, entry) if built.accelerator.is_main_process else "")
        if not not_kept:
            cache.remove_parts(key)
        say(f"  reference: {len(rows):,} {what} pairs computed" + (f"; not kept: {not_kept}" if not_kept else ""))
    for name in NAMES:
        rows = rows.add_column(name, getattr(entry, name).tolist())
    return rows


def _from_cache(job: StageJob, built: Any, rows: Dataset, key: str) -> tuple[Entry | None, str]:
    """The main process reads for all, so that every rank trains on the same numbers."""
    entry, unusable = from_main(cache.read(key, len(rows)) if built.accelerator.is_main_process else None)
    if entry is None:
        return None, unusable
    first = range(min(CHECKED_ROWS, len(rows)))
    disagrees = _disagrees(job, built, rows, {i: [float(getattr(entry, name)[i]) for name in NAMES] for i in first})
    return (None, f"the cache {disagrees}") if disagrees else (entry, "")


def _from_interrupted(job: StageJob, built: Any, rows: Dataset, what: str, key: str) -> Pairs:
    """What earlier passes had computed before they were interrupted, on every process."""
    known, damaged = from_main(cache.read_parts(key, len(rows)) if built.accelerator.is_main_process else None)
    for line in damaged:
        say(f"  reference: {line}; computed again")
    if not known:
        return {}
    disagrees = _disagrees(job, built, rows, {i: known[i] for i in sorted(known)[:CHECKED_ROWS]})
    if disagrees:
        say(f"  reference: what an interrupted pass left behind {disagrees}; computed again")
        return {}
    say(f"  reference: {len(known):,} of {len(rows):,} {what} pairs were computed before the interruption")
    return dict(known)


def _disagrees(job: StageJob, built: Any, rows: Dataset, stored: Pairs) -> str:
    """What to say of stored values that are not those of the reference model; nothing where they are."""
    order = list(stored)
    with _evaluating(built.model):
        live = _logps(built, rows, order)
    worst = max(
        abs(live[side][k] - stored[i][side]) / max(len(rows[i][f"{name.split('_')[1]}_ids"]), 1)
        for side, name in enumerate(NAMES)
        for k, i in enumerate(order)
    )
    worst = from_main(worst)  # or one rank would compute while the others train
    agrees = worst <= OTHER_PATH[rounding(job)]
    return "" if agrees else f"disagrees with the reference model by {worst:.2g} nats per token"


def _compute(job: StageJob, built: Any, rows: Dataset, what: str, key: str) -> Entry:
    """Every process computes its share of the batches, like lengths together, the longest first.

    Batches that an interrupted pass had computed are left out; the others are the same as without it.
    """
    state, size = built.accelerator, WIDER * built.args.per_device_train_batch_size
    known = _from_interrupted(job, built, rows, what, key)
    own: Pairs = {}
    batches = alike(range(len(rows)), pair_lengths(rows), size)[::-1]
    batches = [batch for batch in batches if not known.keys() >= {*batch}]
    with _evaluating(built.model), _kept(key, state.process_index, known, own) as keep:
        for batch in _tracked(own_share(batches), what):
            chosen, rejected = _logps(built, rows, batch)
            own |= {i: [c, r] for i, c, r in zip(batch, chosen, rejected, strict=True)}
            keep()
        everyone = known | from_all(own)
    table = torch.tensor([everyone[i] for i in range(len(rows))], dtype=torch.float32)
    return Entry(table[:, 0].contiguous(), table[:, 1].contiguous())


@contextmanager
def _kept(key: str, process: int, known: Pairs, own: Pairs) -> Iterator[Callable[[], None]]:
    """Within, what is called after each batch stores what is known now and then, and an error or a signal at once."""
    stored = time.monotonic()

    def keep() -> None:
        nonlocal stored
        if time.monotonic() - stored >= KEPT_EVERY:
            cache.write_part(key, process, known | own)
            stored = time.monotonic()

    try:
        yield keep
    except BaseException:
        if own:
            cache.write_part(key, process, known | own)
        raise


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
