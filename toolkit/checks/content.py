"""What the rows of a stage are like: lengths, losses, duplicates, overlaps, pairs that teach something else."""

import hashlib
import json
import random
import re
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from datasets import Dataset

from toolkit.findings import Finding, Level
from toolkit.job import StageJob
from toolkit.recipe.sections import Recipe
from toolkit.rows import chat, formats
from toolkit.rows.data import EMPTY, NO_ASSISTANT, NO_ROOM, SourceRows, talks
from toolkit.rows.loading import load_numbered

Numbers = np.ndarray[Any, Any]
READ_AT_MOST = 100_000  # rows whose text is read; tokens are counted in all rows
FEW_STEPS = 5
LOST_SHARE = 0.01

DROPPED = {
    EMPTY: ("empty-answer", "the answer is empty or blank; fill it in, or remove them"),
    NO_ROOM: ("no-room", "nothing of the answer is left within max_length; raise it, or shorten the prompts"),
    NO_ASSISTANT: ("no-assistant", "there is no assistant turn to train"),
}


@dataclass
class Text:
    """What reading the rows of one data set brought up. Rows are `(source, number in the source)`."""

    prompts: dict[bytes, list[tuple[int, int]]] = field(default_factory=lambda: defaultdict(list))
    rows: dict[bytes, list[tuple[int, int]]] = field(default_factory=lambda: defaultdict(list))
    found: dict[str, list[tuple[int, int]]] = field(default_factory=lambda: defaultdict(list))
    """Name of a defect -> the rows that have it."""
    read: int = 0
    total: int = 0


def check_lengths(job: StageJob) -> list[Finding]:
    """Rows, tokens, what is cut and dropped, and how full packed rows are; over all rows."""
    data, where = job.data, job.where("data")
    length = np.concatenate([values(source.tokens, "length") for source in data.sources])
    supervised = np.concatenate([values(source.tokens, "supervised") for source in data.sources])
    kept = supervised > 0
    text = f"{data.counts.rows:,} rows; tokens {_spread(length[kept])}, supervised {_spread(supervised[kept])}"
    text += f"; max_length {job.plan.max_length}"
    found = [Finding("note", "lengths", where, text)]
    for source in data.sources:
        found += _dropped(source)
    found += _truncated(job, int(supervised.sum()))
    if job.plan.trainer.get("packing") and job.plan.max_length:
        full = min(data.counts.tokens / (data.steps_rows * job.plan.max_length), 1)
        text = f"packed into {data.steps_rows:,} rows of up to {job.plan.max_length:,} tokens, {full:.0%} full"
        found.append(Finding("note", "packing", where, text))
    return found + _merged(job) + _double_begin(job)


def check_steps(job: StageJob) -> list[Finding]:
    """Whether the run is long enough for what it is asked to do."""
    found, plan, batch = [], job.plan, job.plan.batch_size(job.hardware)
    warmup = plan.trainer.get("warmup_steps", 0)
    if warmup >= 1 and warmup >= job.steps:
        text = f"warms up for {warmup:g} steps, and the run has {job.steps:,}: the learning rate is never reached"
        found.append(Finding("warning", "warm-up", job.where("trainer", "warmup_steps"), text))
    if batch > job.data.steps_rows:
        text = f"the effective batch is {batch:,} rows, and there are {job.data.steps_rows:,}; make the batch smaller"
        found.append(Finding("warning", "batch-size", job.where("trainer"), text))
    if job.steps < FEW_STEPS:
        text = f"{job.steps} optimizer steps are hardly any training; use more epochs, more rows or a smaller batch"
        found.append(Finding("warning", "few-steps", job.where("trainer"), text))
    return found


def read_text(sources: list[SourceRows], stage_type: str, tokenizer: Any, seed: int) -> Text:
    """Read the rows once, up to `READ_AT_MOST` of them."""
    text = Text(total=sum(len(source.rows) for source in sources))
    special = _special_tokens(tokenizer)
    for s, source in enumerate(sources):
        spoken = talks(source.rows, source.shape)
        for i, row in some_rows(source, text.total, seed):
            known = formats.to_preference(row) if stage_type == "dpo" else formats.to_sft(row, source.shape)
            text.read += 1
            if known is None:
                continue
            place = (s, source.numbers[i])
            text.prompts[prompt_key(known)].append(place)
            text.rows[row_key(known)].append(place)
            for defect in _defects(known, spoken, special):
                text.found[defect].append(place)
    return text


def check_text(job: StageJob, text: Text) -> list[Finding]:
    """Duplicates, empty and open turns, template tokens in the text, train rows that are held out too."""
    sources = job.data.sources
    found = []
    if text.read < text.total:
        drawn = f"texts were read in {text.read:,} of {text.total:,} rows, drawn by seed {job.recipe.seed}"
        found.append(Finding("note", "sampled", job.where("data"), f"{drawn}; tokens were counted in all"))
    again = [places[1:] for places in text.rows.values() if len(places) > 1]
    found += _in_sources(sources, "duplicate-rows", "{n} rows stand there before, word for word; remove them", again)
    again = [places[1:] for places in text.prompts.values() if len(places) > 1]
    if job.data.sources[0].shape != "text":
        counted = "{n} rows have a prompt that an earlier row has"
        found += _in_sources(sources, "duplicate-prompts", counted, again, "note")
    sentences = {
        "special-tokens": "{n} rows hold special tokens of the tokenizer as text, which end or open turns; remove them",
        "empty-turn": "{n} rows have an empty assistant turn before the last; it is trained as an answer",
        "last-turn": "{n} rows do not end with the assistant's turn; what follows its last answer is wasted",
    }
    for check, sentence in sentences.items():
        found += _in_sources(sources, check, sentence, [text.found[check]])
    return found


def check_overlap(job: StageJob, text: Text, tokenizer: Any) -> list[Finding]:
    """Held-out prompts and rows that are trained on: of the stage's `eval_data`, and of the recipe's `evaluate`."""
    found = []
    if job.data.eval_sources:
        held_out = read_text(job.data.eval_sources, job.plan.type, tokenizer, job.recipe.seed)
        same_rows = [places for key, places in held_out.rows.items() if key in text.rows]
        same = [places for key, places in held_out.prompts.items() if key in text.prompts]
        rows = sum(map(len, same_rows))
        sentence = "{n} held-out rows have a prompt that is trained on" + (
            f", {rows:,} are the very rows" if rows else ""
        )
        found += _in_sources(job.data.eval_sources, "overlap", sentence, same)
    for where, prompts in held_out_prompts(job.recipe):
        same_numbers = tuple(number for number, key in prompts if key in text.prompts)
        if same_numbers:
            sentence = f"{len(same_numbers):,} prompts of evaluate are trained on in {job.plan.name}"
            found.append(Finding("warning", "overlap", where, sentence, same_numbers))
    return found


def held_out_prompts(recipe: Recipe) -> Iterator[tuple[str, list[tuple[int, bytes]]]]:
    """For each source of the `evaluate` section: where it is, and number and key of each prompt."""
    for i, source in enumerate(recipe.evaluate.data if recipe.evaluate else []):
        where = recipe.where("evaluate", "data", i, "path")
        rows, numbers = load_numbered(source, where, recipe.seed)
        yield where, [(n, prompt_key({"prompt": formats.prompt_of(row)})) for n, row in zip(numbers, rows, strict=True)]


def prompt_key(known: dict[str, Any]) -> bytes:
    """The same for the same prompt, as text or as messages, whatever its blanks at both ends."""
    prompt = known.get("prompt", known.get("text"))
    if "messages" in known:
        prompt = known["messages"]
        answers = [i for i, turn in enumerate(prompt) if turn["role"] == "assistant"]
        prompt = prompt[: answers[-1]] if answers else prompt
    turns = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt or []
    return row_key([[turn["role"], str(turn.get("content") or "").strip()] for turn in turns])


# --- tokens ----------------------------------------------------------------------------------------------------------


def _spread(values: Any) -> str:
    middle, high = np.percentile(values, [50, 95])
    return f"p50 {middle:,.0f}, p95 {high:,.0f}, max {values.max():,}"


def _dropped(source: SourceRows) -> list[Finding]:
    status = values(source.tokens, "status")
    found = []
    for reason, (check, text) in DROPPED.items():
        rows = tuple(source.numbers[i] for i in np.flatnonzero(status == reason).tolist())
        if rows:
            found.append(Finding("warning", check, source.where, f"{len(rows):,} rows are dropped: {text}", rows))
    return found


def _truncated(job: StageJob, whole: int) -> list[Finding]:
    kept, found = _kept_supervised(job), []
    lost = 1 - kept / max(whole, 1)
    for source in job.data.sources:
        cut = values(source.tokens, "length") > (job.plan.max_length or np.inf)
        rows = tuple(source.numbers[i] for i in np.flatnonzero(cut).tolist())
        if rows:
            text = (
                f"{len(rows):,} rows are longer than max_length {job.plan.max_length}; the stage loses {lost:.1%} of "
            )
            level: Level = "warning" if lost > LOST_SHARE else "note"
            found.append(Finding(level, "truncated", source.where, f"{text}its supervised tokens", rows))
    return found


def _kept_supervised(job: StageJob) -> int:
    """Supervised tokens that the trainer will see."""
    limit, trainer = job.plan.max_length, job.plan.trainer
    if limit is None:
        return job.data.counts.supervised
    if job.plan.type == "sft":
        if not trainer.get("packing") or trainer.get("packing_strategy", "bfd") != "bfd":
            return job.data.counts.supervised
        seen = 0
        for source in job.data.sources:
            for lengths, labels in token_lists(source.tokens, "labels"):
                place = np.arange(len(labels)) - np.repeat(np.cumsum(lengths) - lengths, lengths)
                seen += int(((labels != chat.IGNORED) & (place < limit)).sum())
        return seen
    seen = 0
    for source in job.data.sources:  # a row that is dropped has no tokens
        prompt, *answers = (row_lengths(source.tokens, name) for name in ("prompt_ids", "chosen_ids", "rejected_ids"))
        seen += sum(int(np.minimum(answer, limit - prompt).sum()) for answer in answers)
    return seen


def _merged(job: StageJob) -> list[Finding]:
    found = []
    for source in job.data.sources:
        merged = np.flatnonzero(values(source.tokens, "merged") > 0).tolist()
        if merged:
            share, rows = len(merged) / len(source.rows), tuple(source.numbers[i] for i in merged)
            text = (
                f"in {share:.0%} of the rows the prompt's last tokens change when the answer follows; they are trained "
            )
            text += "with the answer. Begin the answer with a blank, or look at it with `toolkit preview`"
            found.append(Finding("warning", "prompt-boundary", source.where, text, rows))
    return found


def _double_begin(job: StageJob) -> list[Finding]:
    begin, found = job.tokenizer.bos_token_id, []
    column = "input_ids" if job.plan.type == "sft" else "prompt_ids"
    for source in job.data.sources if begin is not None else []:
        twice = []
        for lengths, ids in token_lists(source.tokens, column):
            first = np.cumsum(lengths) - lengths
            pairs = np.append(ids, [-1, -1])  # so that every row has a second token to look at
            twice.append((lengths > 1) & (pairs[first] == begin) & (pairs[first + 1] == begin))
        rows = tuple(source.numbers[i] for i in np.flatnonzero(np.concatenate(twice)).tolist())
        if rows:
            text = f"{len(rows):,} rows begin with {job.tokenizer.bos_token} twice; remove the one in the text"
            found.append(Finding("warning", "double-bos", source.where, text, rows))
    return found


def token_lists(rows: Dataset, column: str) -> Iterator[tuple[Numbers, Numbers]]:
    """A column of lists, part by part: the length of each list, and all of their values end to end."""
    for part in rows.select_columns([column]).with_format("arrow").iter(10_000):
        lists = part.column(column).combine_chunks()
        lengths, values = lists.value_lengths(), lists.flatten()
        yield lengths.to_numpy(zero_copy_only=False).astype(np.int64), values.to_numpy(zero_copy_only=False)


def values(rows: Dataset, column: str) -> Numbers:
    """A column of single values, `(rows,)`."""
    parts = rows.select_columns([column]).with_format("arrow").iter(10_000)
    return np.concatenate([part.column(column).to_numpy() for part in parts])


def row_lengths(rows: Dataset, column: str) -> Numbers:
    """Tokens of each row of a column, `(rows,)`."""
    return np.concatenate([lengths for lengths, _ in token_lists(rows, column)])


# --- text ------------------------------------------------------------------------------------------------------------


def some_rows(source: SourceRows, total: int, seed: int) -> Iterator[tuple[int, dict[str, Any]]]:
    """The rows of a source, or its share of a sample."""
    rows, chosen = source.rows, list(range(len(source.rows)))
    if total > READ_AT_MOST:
        chosen = sorted(random.Random(seed).sample(chosen, max(len(chosen) * READ_AT_MOST // total, 1)))
        rows = rows.select(chosen)
    return zip(chosen, _in_batches(rows), strict=True)


def _in_batches(rows: Dataset) -> Iterator[dict[str, Any]]:
    """Row by row, as iterating does, in a third of the time."""
    for batch in rows.iter(1000):
        for values_of_row in zip(*batch.values(), strict=True):
            yield dict(zip(batch, values_of_row, strict=True))


def _defects(known: dict[str, Any], spoken: bool, special: re.Pattern[str] | None) -> Iterator[str]:
    turns = known.get("messages", [])
    sides = [
        known[name] for name in ("prompt", "completion", "chosen", "rejected") if isinstance(known.get(name), list)
    ]
    if spoken and special and any(special.search(str(t.get("content"))) for side in [turns, *sides] for t in side):
        yield "special-tokens"
    if any(
        t["role"] == "assistant" and not t.get("tool_calls") and not str(t.get("content") or "").strip() for t in turns
    ):
        yield "empty-turn"
    answers = [known[name] for name in ("completion", "chosen", "rejected") if isinstance(known.get(name), list)]
    if any(side and side[-1]["role"] != "assistant" for side in [turns, *answers]):
        yield "last-turn"


def _special_tokens(tokenizer: Any) -> re.Pattern[str] | None:
    special = {str(token) for token in tokenizer.added_tokens_decoder.values() if token.special}
    return re.compile("|".join(map(re.escape, sorted(special)))) if special else None


def row_key(value: Any) -> bytes:
    return hashlib.blake2b(json.dumps(value, sort_keys=True, default=str).encode(), digest_size=12).digest()


def _in_sources(
    sources: list[SourceRows], check: str, text: str, groups: list[list[tuple[int, int]]], level: Level = "warning"
) -> list[Finding]:
    """One finding for each source that has such rows, with their numbers."""
    rows: dict[int, list[int]] = defaultdict(list)
    for group in groups:
        for source, number in group:
            rows[source].append(number)
    return [
        Finding(level, check, sources[s].where, text.format(n=f"{len(rows[s]):,}"), tuple(sorted(rows[s])))
        for s in sorted(rows)
    ]
