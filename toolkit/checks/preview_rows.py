"""A stage's rows as its collator hands them to the trainer, and where each is from."""

from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from datasets import Dataset, concatenate_datasets
from trl.trainer.dpo_trainer import DataCollatorForPreference
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from toolkit.job import StageJob
from toolkit.models import packing
from toolkit.models.prefix import IDS, LENGTHS, PairCollator
from toolkit.rows.chat import IGNORED
from toolkit.rows.data import KEPT, TRUNCATED
from toolkit.training import sft

FROM = "from_row"


@dataclass(frozen=True)
class Document:
    """Part of a packed row that is from one row of the data; `start` to `end` in the packed row."""

    row: int
    start: int
    end: int


@dataclass(frozen=True)
class Asked:
    """What a row's number in its source leads to."""

    rows: list[int]
    """Places in the stage's rows, one for each source that has the number."""
    absent: list[str]
    """Why a source does not have it, one sentence each."""


def rows_numbered(job: StageJob, number: int) -> Asked:
    """The rows of a stage that have this number in their source, and why others do not."""
    asked, before = Asked([], []), 0
    for s, source in enumerate(job.data.sources):
        status = list(source.tokens["status"])
        kept = [s in (KEPT, TRUNCATED) for s in status]
        if number not in source.numbers:
            asked.absent.append(f"{source_name(job, s)}: no row {number} {_among(source.numbers)}")
        else:
            i = source.numbers.index(number)
            if kept[i]:
                asked.rows.append(before + sum(kept[:i]))
            else:
                asked.absent.append(f"{source_name(job, s)}: row {number} is dropped: {status[i]}")
        before += sum(kept)
    return asked


def origins(job: StageJob) -> list[tuple[int, int]]:
    """For each row of the stage its source, counted from 0, and its number there."""
    return [
        (s, number)
        for s, source in enumerate(job.data.sources)
        for number, status in zip(source.numbers, source.tokens["status"], strict=True)
        if status in (KEPT, TRUNCATED)
    ]


def source_name(job: StageJob, s: int) -> str:
    """A source as the recipe counts and names it, without its place on this machine."""
    path = job.recipe.stages[job.plan.index].data[s].path
    return f"{job.plan.name}: data[{s}] ({Path(path).name if Path(path).is_absolute() else path})"


def packed_rows(job: StageJob) -> Dataset:
    """The rows of a packing stage as the trainer is given them; `FROM` says of each token which row it is from."""
    rows = job.data.train
    lengths = np.concatenate(_lengths(rows))
    tokens = pa.ListArray.from_arrays(
        np.append(0, np.cumsum(lengths)).astype(np.int32), np.repeat(np.arange(len(rows)), lengths)
    )
    numbered = concatenate_datasets([rows, Dataset(pa.table({FROM: tokens}))], axis=1)
    return sft.packed_rows(job, numbered)


def documents(row: dict[str, Any]) -> list[Document]:
    """What a packed row is made of, in order."""
    found, start = [], 0
    for number, tokens in groupby(row[FROM]):
        end = start + len(list(tokens))
        found.append(Document(number, start, end))
        start = end
    return found


def supervised_row(job: StageJob, row: dict[str, Any]) -> tuple[list[int], list[int]]:
    """Ids and labels of an SFT row, each `(seq,)`, as its collator makes them."""
    pad, trainer = job.tokenizer.pad_token_id, job.plan.trainer
    attention = job.recipe.model.attn_implementation
    if trainer.get("packing") and attention in (None, *packing.ROWS_KEPT_UNDER):
        batch = packing.RowsOfDocuments(pad)([row])
        ids, labels = batch["input_ids"][0], batch["input_ids"][0].new_full(batch["input_ids"][0].shape, IGNORED)
        labels[batch[packing.SCORED][0, :-1] + 1] = batch["labels"][0, 1:]
        return ids.tolist(), labels.tolist()
    free = bool(trainer.get("padding_free") or trainer.get("packing"))
    batch = DataCollatorForLanguageModeling(pad, padding_free=free)([row])
    return batch["input_ids"][0].tolist(), batch["labels"][0].tolist()


def pair_parts(job: StageJob, row: dict[str, Any]) -> list[list[int]]:
    """Prompt, chosen and rejected ids of a pair, cut as its collator cuts them."""
    pad, limit = job.tokenizer.pad_token_id, job.plan.max_length
    if job.no_sharing is None:
        shared = PairCollator(pad, limit)([row])
        ids, (prompt, chosen, _) = shared[IDS][0].tolist(), shared[LENGTHS][0].tolist()
        return [ids[:prompt], ids[prompt : prompt + chosen], ids[prompt + chosen :]]
    mode = job.plan.trainer.get("truncation_mode", "keep_start")
    batch = DataCollatorForPreference(pad, max_length=limit, truncation_mode=mode)([row])
    there, answer = batch["attention_mask"].bool(), batch["completion_mask"].bool()
    prompt = batch["input_ids"][0][there[0] & ~answer[0]].tolist()
    return [prompt, *(batch["input_ids"][side][answer[side]].tolist() for side in (0, 1))]


def _lengths(rows: Dataset) -> list[Any]:
    parts = rows.select_columns(["input_ids"]).with_format("arrow").iter(10_000)
    return [part.column("input_ids").combine_chunks().value_lengths().to_numpy(zero_copy_only=False) for part in parts]


def _among(numbers: Any) -> str:
    if isinstance(numbers, range):
        return f"among 0 to {len(numbers) - 1:,}"
    return f"among the {len(numbers):,} that are drawn"
