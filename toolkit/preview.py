"""`toolkit preview`: rows as the trainer's own collators hand them over, supervised tokens marked."""

import unicodedata
from typing import Any

from rich.columns import Columns
from rich.console import Console
from rich.text import Text
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from toolkit import packing
from toolkit.errors import DataError
from toolkit.job import StageJob
from toolkit.prefix import IDS, LENGTHS, PairCollator

OPEN, CLOSE = "\u27e6", "\u27e7"  # escaped where they stand in the data, so that they mean one thing
SUPERVISED, MASKED, SPECIAL = "green", "dim", "bold"
IGNORED = -100


def row_at(job: StageJob, number: int) -> int:
    """Where in the stage's rows the row with this number in its source stands; the first source that has it.

    Raises:
        DataError: no such row, or it is not trained on, and why.
    """
    before = 0
    for source in job.data.sources:
        status = list(source.tokens["status"])
        kept = [s in ("kept", "truncated") for s in status]
        if number in source.numbers:
            i = source.numbers.index(number)
            if not kept[i]:
                raise DataError(f"{source.where}: row {number} is dropped: {status[i]}")
            return before + sum(kept[:i])
        before += sum(kept)
    raise DataError(f"{job.where('data')}: no row {number} is drawn from any source")


def supervised_row(job: StageJob, row: dict[str, Any]) -> tuple[list[int], list[int]]:
    """Ids and labels of an SFT row, each `(seq,)`, as its collator makes them."""
    pad = job.tokenizer.pad_token_id
    collator = packing.RowsOfDocuments(pad) if job.plan.trainer.get("packing") else DataCollatorForLanguageModeling(pad)
    batch = collator([row])
    return batch["input_ids"][0].tolist(), batch["labels"][0].tolist()


def pair_parts(job: StageJob, row: dict[str, Any]) -> list[list[int]]:
    """Prompt, chosen and rejected ids of a pair, cut as its collator cuts them."""
    batch = PairCollator(job.tokenizer.pad_token_id, job.plan.max_length)([row])
    ids, (prompt, chosen, _) = batch[IDS][0].tolist(), batch[LENGTHS][0].tolist()
    return [ids[:prompt], ids[prompt : prompt + chosen], ids[prompt + chosen :]]


def show(job: StageJob, console: Console, rows: list[int]) -> None:
    """Print these rows of a stage (packed rows, where it packs)."""
    data = packing.pack(job.plan, job.data.train) if job.plan.trainer.get("packing") else job.data.train
    for i in rows:
        row = data[i]
        if job.plan.type == "sft":
            ids, labels = supervised_row(job, row)
            trained = [label != IGNORED for label in labels]
            console.print(f"{job.plan.name}: row {i}: {len(ids)} tokens, {sum(trained)} supervised", markup=False)
            console.print(render(ids, trained, job.tokenizer, console))
            continue
        prompt, chosen, rejected = pair_parts(job, row)
        console.print(f"{job.plan.name}: pair {i}: prompt {len(prompt)} tokens", markup=False)
        console.print(render(prompt, [False] * len(prompt), job.tokenizer, console))
        sides = [
            Text(f"{name}: {len(ids)} tokens, all supervised\n").append_text(
                render(ids, [True] * len(ids), job.tokenizer, console)
            )
            for name, ids in (("chosen", chosen), ("rejected", rejected))
        ]
        console.print(Columns(sides, width=max(console.width // 2 - 2, 20)))


def render(ids: list[int], trained: list[bool], tokenizer: Any, console: Console) -> Text:
    """Tokens as text; colour on a terminal, marks around supervised spans elsewhere."""
    plain, out = console.no_color or not console.is_terminal, Text()
    special, start = set(tokenizer.all_special_ids), 0
    while start < len(ids):
        end = start + 1
        while (
            end < len(ids)
            and trained[end] == trained[start]
            and (plain or (ids[end] in special) == (ids[start] in special))
        ):
            end += 1
        text = visible(tokenizer.decode(ids[start:end], skip_special_tokens=False))
        style = "" if plain else (SUPERVISED if trained[start] else MASKED)
        style += f" {SPECIAL}" if not plain and ids[start] in special else ""
        out.append(f"{OPEN}{text}{CLOSE}" if plain and trained[start] else text, style.strip())
        start = end
    return out


def visible(text: str) -> str:
    """Control, format and marking characters as escapes: no text of the data reaches the terminal as a command."""

    def plain(c: str) -> bool:
        return c == "\n" or (unicodedata.category(c)[0] != "C" and c not in (OPEN, CLOSE))

    return "".join(c if plain(c) else ascii(c)[1:-1] for c in text)
