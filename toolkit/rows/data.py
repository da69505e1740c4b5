"""Rows of data sources to token ids: recognise, convert, tokenize, count. Nothing is dropped silently."""

import hashlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import datasets
import pyarrow
from datasets import Dataset, concatenate_datasets
from jinja2 import TemplateError

from toolkit.errors import DataError, ModelError
from toolkit.models import packing
from toolkit.recipe.plan import StagePlan
from toolkit.recipe.sections import Recipe, Source
from toolkit.rows import chat, formats
from toolkit.rows.formats import Row, recognise, to_preference, to_sft
from toolkit.rows.loading import load_numbered, origin
from toolkit.wording import first_line

_TOKENS, _FACTS = datasets.List(datasets.Value("int64")), ("length", "supervised", "merged")
_TOLD = {"status": datasets.Value("string")} | dict.fromkeys(_FACTS, datasets.Value("int64"))
IDS = {
    "sft": datasets.Features(dict.fromkeys(("input_ids", "labels"), _TOKENS) | _TOLD),
    "dpo": datasets.Features(dict.fromkeys(("prompt_ids", "chosen_ids", "rejected_ids"), _TOKENS) | _TOLD),
}
IN_MEMORY = 2**30  # bytes of tokenized rows
KEPT, TRUNCATED = "kept", "truncated"
EMPTY, NO_ROOM, NO_ASSISTANT = "empty answer", "prompt fills max_length", "no assistant turn"


@dataclass(frozen=True)
class Counts:
    """What a data set holds, in rows and tokens; `supervised` tokens are those that the loss sees."""

    rows: int
    tokens: int
    supervised: int
    truncated: int
    dropped: dict[str, int]


@dataclass(frozen=True)
class SourceRows:
    """One source of a stage: its rows as loaded, and row for row what became of them."""

    where: str
    shape: str
    rows: Dataset
    """Renamed and drawn, in the source's own columns."""
    numbers: Sequence[int]
    """For each row its number in the source, counted from 0."""
    origin: dict[str, Any]
    """`{"rows", "local"}`, and the `commit` of a Hub data set."""
    tokens: Dataset
    """Token ids, with `status` (kept, truncated, or why the row is dropped), `length` and `supervised` (tokens before
    the row is cut; of a pair, `length` is its longer sequence's) and `merged` (prompt tokens that the answer changes).
    """

    def kept(self) -> list[int]:
        """The numbers, in the source, of the rows that are trained on, in order."""
        pairs = zip(self.numbers, self.tokens["status"], strict=True)
        return [number for number, status in pairs if status in (KEPT, TRUNCATED)]


@dataclass(frozen=True)
class StageData:
    """Tokenized rows of one stage.

    SFT rows hold `input_ids`, `labels`; DPO rows `prompt_ids`, `chosen_ids`, `rejected_ids`; each `(seq,)`.
    `steps_rows` is the number of rows the trainer draws from in an epoch: fewer than `rows` when packed.
    """

    train: Dataset
    eval: Dataset | None
    counts: Counts
    eval_counts: Counts | None
    steps_rows: int
    digest: str
    sources: list[SourceRows]
    eval_sources: list[SourceRows]


def prepare(recipe: Recipe, plan: StagePlan, tokenizer: Any) -> StageData:
    """Load and tokenize the data of one stage.

    Raises:
        DataError: a source that is missing, empty, or without the columns needed; with file, line and key.
        ModelError: rows with messages, and a tokenizer without a chat template.
    """
    stage = recipe.stages[plan.index]
    train, counts, sources = _tokenized(recipe, plan, stage.data, "data", tokenizer)
    eval_rows, eval_counts = None, None
    eval_sources: list[SourceRows] = []
    if stage.eval_data:
        eval_rows, eval_counts, eval_sources = _tokenized(recipe, plan, stage.eval_data, "eval_data", tokenizer)
    return StageData(
        train=train,
        eval=eval_rows,
        counts=counts,
        eval_counts=eval_counts,
        steps_rows=len(packing.pack(plan, train) if plan.trainer.get("packing") else train),
        digest=content_digest(train) + (content_digest(eval_rows) if eval_rows else ""),
        sources=sources,
        eval_sources=eval_sources,
    )


def tokenize(rows: Dataset, source: Source, plan: StagePlan, tokenizer: Any, where: str) -> Dataset:
    """Rows of one source as the token ids that the stage would train on; rows it would drop are left out.

    Raises:
        DataError, ModelError: as for `prepare`.
    """
    shape = recognise(source, rows.column_names, plan.type, where)
    ids = _map(rows, shape, plan, tokenizer, where, numbers=range(len(rows)))
    return ids.filter(lambda s: s in (KEPT, TRUNCATED), input_columns="status").remove_columns(list(_TOLD))


def content_digest(rows: Dataset) -> str:
    """SHA-256 over the token ids of every row, in order; independent of files, caches and machines."""
    sha = hashlib.sha256()
    for batch in rows.with_format("arrow").iter(10_000):
        for name in sorted(batch.column_names):
            column = batch.column(name).combine_chunks()
            sha.update(column.value_lengths().to_numpy(zero_copy_only=False).tobytes())
            sha.update(column.flatten().to_numpy(zero_copy_only=False).tobytes())
    return sha.hexdigest()


# --- tokenizing and counting -----------------------------------------------------------------------------------------


def _tokenized(
    recipe: Recipe, plan: StagePlan, sources: list[Source], key: str, tokenizer: Any
) -> tuple[Dataset, Counts, list[SourceRows]]:
    parts: list[Dataset] = []
    told: list[SourceRows] = []
    status: Counter[str] = Counter()
    for i, source in enumerate(sources):
        where = recipe.where("stages", plan.index, key, i, "path")
        rows, numbers = load_numbered(source, where, recipe.seed)
        shape = recognise(source, rows.column_names, plan.type, where)
        tokens = _map(rows, shape, plan, tokenizer, where, numbers=numbers)
        became = Counter(tokens["status"])
        status.update(became)
        kept = tokens
        if set(became) - {KEPT, TRUNCATED}:  # rows that are picked out are read more slowly ever after
            kept = tokens.filter(lambda s: s in (KEPT, TRUNCATED), input_columns="status")
        parts.append(kept.remove_columns(list(_TOLD)))
        told.append(SourceRows(where, shape, rows, numbers, origin(source, rows), tokens))
    train = _in_memory(concatenate_datasets(parts))
    dropped = {reason: n for reason, n in status.items() if reason not in (KEPT, TRUNCATED)}
    if len(train) == 0:
        reasons = ", ".join(f"{n} {reason}" for reason, n in dropped.items())
        raise DataError(f"{recipe.where('stages', plan.index, key)}: no row is left to train on ({reasons})")
    tokens, supervised = _count_tokens(train, plan.type)
    return train, Counts(len(train), tokens, supervised, status[TRUNCATED], dropped), told


def _in_memory(rows: Dataset) -> Dataset:
    """The same rows, read from the cache of `datasets` once and for all, unless they are very many.

    A mapped file that is cut off, or whose disk fails, kills the process that reads on, without a word.
    """
    if rows.data.nbytes > IN_MEMORY:
        return rows
    table, buffer = rows.with_format("arrow")[:], pyarrow.BufferOutputStream()
    with pyarrow.ipc.new_stream(buffer, table.schema) as stream:
        stream.write_table(table)
    return Dataset.from_buffer(buffer.getvalue(), info=rows.info)


def _map(rows: Dataset, shape: str, plan: StagePlan, tokenizer: Any, where: str, *, numbers: Sequence[int]) -> Dataset:
    settings = plan.trainer
    turns = shape in ("messages", "sharegpt")
    if talks(rows, shape) and not tokenizer.chat_template:
        raise ModelError(
            f"{where}: the rows are conversations, and the base's tokenizer has no chat template; "
            f"set model.chat_template, as in chat_template: chatml"
        )
    template = chat.assistant_template(tokenizer) if turns and plan.type == "sft" else None
    if settings.get("assistant_only_loss") and template is None:
        raise ModelError(f"{where}: assistant_only_loss needs messages, and a chat template with {{% generation %}}")
    whole_row = settings.get("completion_only_loss") is False or (
        turns and settings.get("assistant_only_loss") is False
    )
    return rows.map(
        _preference_ids if plan.type == "dpo" else _sft_ids,
        with_indices=True,
        fn_kwargs={
            "shape": shape,
            "tokenizer": tokenizer,
            "template": template,
            "where": where,
            "numbers": numbers,
            "whole_row": whole_row,
            "max_length": plan.max_length,
            "keep_end": settings.get("truncation_mode") == "keep_end",
            "packing": settings.get("packing", False),
            "code": _code(),
        },
        features=IDS[plan.type],
        remove_columns=rows.column_names,
        num_proc=settings.get("dataset_num_proc"),
        desc=f"Tokenizing {plan.name}",
    )


@cache
def _code() -> str:
    """What turns rows into ids, for the cache of `datasets`, which knows functions by their names alone."""
    sha = hashlib.sha256()
    for module in (chat, formats):
        sha.update(Path(str(module.__file__)).read_bytes())
    sha.update(Path(__file__).read_bytes())
    return sha.hexdigest() + version("transformers") + version("trl") + version("tokenizers")


def talks(rows: Dataset, shape: str) -> bool:
    """Whether the rows of this shape become messages, for which a chat template is needed."""
    columns = rows.column_names
    if shape in ("messages", "sharegpt") or "instruction" in columns:
        return True
    return any(isinstance(rows[0].get(name), list | dict) for name in ("prompt", "completion", "output", "chosen"))


def _sft_ids(
    row: Row, index: int, *, shape: str, tokenizer: Any, template: str | None, where: str, **settings: Any
) -> Row:
    nothing: Row = {"input_ids": [], "labels": []} | dict.fromkeys(_FACTS, 0)
    try:
        known = to_sft(row, shape)
        if known is None:
            return nothing | {"status": EMPTY}
        known |= formats.for_template(row)
        if "text" in known:
            ids = chat.tokenize_text(known, tokenizer)
        elif "messages" in known and template is not None:
            ids = chat.tokenize_messages(known, tokenizer, template)
        else:
            if "messages" in known:
                *prompt, last = known["messages"]
                if last["role"] != "assistant":
                    return nothing | {"status": NO_ASSISTANT}
                known |= {"prompt": prompt, "completion": [last]}
            ids = chat.tokenize_prompt_completion(known, tokenizer)
    except Exception as error:
        raise _row_error(where, settings["numbers"][index], error) from error
    if settings["whole_row"]:
        ids["labels"] = list(ids["input_ids"])
    facts = {"length": len(ids["input_ids"]), "supervised": _supervised(ids), "merged": ids.pop("merged", 0)}
    if not facts["supervised"]:
        return nothing | {"status": NO_ASSISTANT}
    limit = settings["max_length"]
    if limit is None or facts["length"] <= limit:
        return ids | facts | {"status": KEPT}
    if settings["packing"]:
        return ids | facts | {"status": TRUNCATED}  # packing cuts or splits the row itself
    kept = slice(-limit, None) if settings["keep_end"] else slice(limit)
    ids = {name: values[kept] for name, values in ids.items()}
    return ids | facts | {"status": TRUNCATED} if _supervised(ids) else nothing | facts | {"status": NO_ROOM}


def _supervised(ids: Row) -> int:
    return sum(label != chat.IGNORED for label in ids["labels"])


def _preference_ids(
    row: Row, index: int, *, tokenizer: Any, where: str, numbers: Sequence[int], max_length: int | None, **_: Any
) -> Row:
    nothing: Row = {"prompt_ids": [], "chosen_ids": [], "rejected_ids": []} | dict.fromkeys(_FACTS, 0)
    try:
        known = to_preference(row)
        if known is None:
            return nothing | {"status": EMPTY}
        ids = chat.tokenize_preference(known | formats.for_template(row), tokenizer)
    except Exception as error:
        raise _row_error(where, numbers[index], error) from error
    prompt, chosen, rejected = (len(ids[name]) for name in ("prompt_ids", "chosen_ids", "rejected_ids"))
    facts = {"length": prompt + max(chosen, rejected), "supervised": chosen + rejected, "merged": ids.pop("merged")}
    if max_length is not None and prompt >= max_length:
        return nothing | facts | {"status": NO_ROOM}
    cut = max_length is not None and facts["length"] > max_length
    return ids | facts | {"status": TRUNCATED if cut else KEPT}


def _row_error(where: str, index: int, error: Exception) -> DataError:
    if isinstance(error, TemplateError):
        return DataError(f"{where}: row {index}: the chat template cannot render it: {first_line(error)}")
    text = f"no key {error}" if isinstance(error, KeyError) else first_line(error)
    return DataError(f"{where}: row {index}: cannot be read as this format: {text}")


def _count_tokens(rows: Dataset, stage_type: str) -> tuple[int, int]:
    tokens = supervised = 0
    for batch in rows.with_format("arrow").iter(10_000):
        length = {name: batch.column(name).combine_chunks().flatten() for name in batch.column_names}
        if stage_type == "sft":
            tokens += len(length["input_ids"])
            labels = length["labels"].to_numpy(zero_copy_only=False)
            supervised += int((labels != chat.IGNORED).sum())
        else:
            completions = len(length["chosen_ids"]) + len(length["rejected_ids"])
            tokens += 2 * len(length["prompt_ids"]) + completions
            supervised += completions
    return tokens, supervised
