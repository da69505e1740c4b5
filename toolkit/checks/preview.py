"""`toolkit preview`: rows as the trainer will see them, supervised tokens marked."""

from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from toolkit.checks import preview_rows
from toolkit.errors import DataError, RunError
from toolkit.job import StageJob
from toolkit.recipe.sections import Recipe
from toolkit.records.rundir import RunDirectory, default_output
from toolkit.rows.chat import IGNORED
from toolkit.training.prepare import prepare
from toolkit.wording import visible

OPEN, CLOSE, BLANK = "\u27e6", "\u27e7", "\u2423"  # escaped where they stand in the data, so that they mean one thing
SUPERVISED, MASKED, SPECIAL = "green", "dim", "bold"
NARROW = 72  # columns below which chosen and rejected stand one after the other


def preview(recipe: Recipe, stage: str | None = None, n: int = 3, number: int | None = None) -> None:
    """Print rows of a recipe's stages to the terminal.

    Args:
        stage: this one only.
        n: how many rows of each stage, from the first.
        number: instead, the row with this number in its source, of every source that has it.

    Raises:
        ToolkitError: the recipe cannot be prepared; there is no such stage, or no source with such a row.
    """
    jobs = prepare(recipe, RunDirectory(default_output(recipe))).jobs
    names = [job.plan.name for job in jobs]
    if stage not in (None, *names):
        raise RunError(f"{stage}: no such stage; the recipe has {', '.join(names)}")
    jobs = [job for job in jobs if stage in (None, job.plan.name)]
    console = Console(highlight=False)
    rows, absent = {}, []
    for job in jobs:
        asked = preview_rows.Asked([], []) if number is None else preview_rows.rows_numbered(job, number)
        rows[job.plan.name] = list(range(min(n, job.data.steps_rows))) if number is None else asked.rows
        absent += asked.absent
    if number is not None and not any(rows.values()):
        raise DataError("\n".join(absent))
    marks = f"between {OPEN} and {CLOSE}"
    console.print(Text(f"supervised: {'green' if not _is_plain(console) else marks}; masked: {_masked(console)}\n"))
    for job in jobs:
        packs = bool(job.plan.trainer.get("packing"))
        (show_packed if packs else show)(job, console, rows[job.plan.name], **({"holding": number} if packs else {}))
    for reason in absent:
        console.print(Text(visible(reason)))


def show(job: StageJob, console: Console, rows: list[int]) -> None:
    """Print these rows of a stage that does not pack."""
    origins = preview_rows.origins(job) if rows else []
    for i in rows:
        row, name = job.data.train[i], _named(job, *origins[i])
        if job.plan.type == "dpo":
            _show_pair(job, console, name, row)
            continue
        ids, labels = preview_rows.supervised_row(job, row)
        trained = [label != IGNORED for label in labels]
        _say(console, f"{job.plan.name}: {name}: {len(ids):,} tokens, {sum(trained):,} supervised")
        _print(console, render(ids, trained, job.tokenizer, _is_plain(console)))


def show_packed(job: StageJob, console: Console, rows: list[int], holding: int | None = None) -> None:
    """Print packed rows, document by document.

    Args:
        rows: places in the packed rows; with `holding` places in the stage's rows, whose packed rows are shown.
        holding: the number in its source of the row that was asked for.
    """
    data, origins = preview_rows.packed_rows(job), preview_rows.origins(job)
    wanted = set(rows)
    shown = rows if holding is None else [i for i, row in enumerate(data[preview_rows.FROM]) if wanted & set(row)]
    for i in shown:
        row = data[i]
        parts = preview_rows.documents(row)
        ids, labels = preview_rows.supervised_row(job, row)
        trained = [label != IGNORED for label in labels]
        held = dict.fromkeys(_named(job, *origins[part.row]) for part in parts if part.row in wanted)
        which = f", which holds {', '.join(held)}" if holding is not None else ""
        documents = "1 document" if len(parts) == 1 else f"{len(parts)} documents"
        counted = f"{documents}, {len(ids):,} tokens, {sum(trained):,} supervised"
        _say(console, f"{job.plan.name}: packed row {i}{which}: {counted}")
        for part in parts:
            span = slice(part.start, part.end)
            counted = f"{part.end - part.start:,} tokens, {sum(trained[span]):,} supervised"
            _say(console, f"  {_named(job, *origins[part.row])}: {counted}")
            _print(console, render(ids[span], trained[span], job.tokenizer, _is_plain(console)))


def render(ids: list[int], trained: list[bool], tokenizer: Any, plain: bool, before: list[int] | None = None) -> Text:
    """Tokens as text, coloured; where `plain`, with marks around supervised spans instead.

    Args:
        ids: `(seq,)`.
        trained: `(seq,)`.
        before: tokens that come first and are not shown; a blank between two tokens may belong to either.
    """
    before, out = before or [], Text()
    special, start = set(tokenizer.all_special_ids), 0
    while start < len(ids):
        end = start + 1
        while (
            end < len(ids)
            and trained[end] == trained[start]
            and (plain or (ids[end] in special) == (ids[start] in special))
        ):
            end += 1
        text = visible(_decoded(before + ids[:end], len(before) + start, tokenizer), OPEN + CLOSE + BLANK)
        if plain:
            out.append(_marked(text) if trained[start] else text)
        else:
            bold = f" {SPECIAL}" if ids[start] in special else ""
            out.append(text, (SUPERVISED if trained[start] else MASKED) + bold)
        start = end
    return out


def _show_pair(job: StageJob, console: Console, name: str, row: dict[str, Any]) -> None:
    prompt, *sides = preview_rows.pair_parts(job, row)
    _say(console, f"{job.plan.name}: {name}: prompt {len(prompt):,} tokens")
    _print(console, render(prompt, [False] * len(prompt), job.tokenizer, _is_plain(console)))
    texts = []
    for side, ids in zip(("chosen", "rejected"), sides, strict=True):
        text = Text(f"{side}: {len(ids):,} tokens, all supervised\n" if ids else f"{side}: cut away by max_length\n")
        texts.append(text.append_text(render(ids, [True] * len(ids), job.tokenizer, _is_plain(console), prompt)))
    if console.width < NARROW:
        for text in texts:
            _print(console, text)
        return
    table, width = Table.grid(padding=(0, 2)), (console.width - 2) // 2
    table.add_column(width=width)
    table.add_column(width=width)
    table.add_row(*(_wrapped(text, console, width) for text in texts))
    console.print(table)
    console.print()


def _named(job: StageJob, s: int, number: int) -> str:
    several = len(job.data.sources) > 1
    return f"row {number}" + (f" of {preview_rows.source_name(job, s).partition(': ')[2]}" if several else "")


def _decoded(ids: list[int], start: int, tokenizer: Any) -> str:
    """The text of `ids[start:]` as a part of the whole: SentencePiece leaves out the blank that a text begins with."""

    def decode(part: list[int]) -> str:
        text: str = tokenizer.decode(part, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        return text

    before, whole = decode(ids[:start]), decode(ids)
    return whole[len(before) :] if whole.startswith(before) else decode(ids[start:])


def _marked(text: str) -> str:
    """In marks, which blanks and line ends at both ends would part from it."""
    body = text.strip(" \n")
    left, right = text[: len(text) - len(text.lstrip(" \n"))], text[len(text.rstrip(" \n")) :] if body else ""
    edges = (edge.replace("\n", "\\n").replace(" ", BLANK) for edge in (left, right))
    first, last = edges
    return f"{OPEN}{first}{body}{last}{CLOSE}" + "\n" * right.endswith("\n")


def _wrapped(text: Text, console: Console, width: int) -> Text:
    """In lines of `width` columns; a closing mark takes a character with it to its line."""
    lines = list(text.wrap(console, width, overflow="fold"))
    for i in range(1, len(lines)):
        if lines[i].plain.startswith(CLOSE) and lines[i - 1].plain:
            moved = lines[i - 1][-1]
            lines[i - 1].right_crop(1)
            lines[i] = moved.append_text(lines[i])
    return Text("\n").join(lines)


def _print(console: Console, text: Text) -> None:
    """Wrapped on a terminal; elsewhere lines are the data's own."""
    if console.is_terminal:
        console.print(_wrapped(text, console, console.width))
    else:
        console.print(text, soft_wrap=True)
    if not text.plain.endswith("\n"):
        console.print()


def _say(console: Console, text: str) -> None:
    console.print(Text(visible(text), "bold"), soft_wrap=True)


def _is_plain(console: Console) -> bool:
    return console.no_color or not console.is_terminal


def _masked(console: Console) -> str:
    return "unmarked" if _is_plain(console) else "dim"
