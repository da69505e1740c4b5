"""What preference pairs teach beside what they are meant to: length, contradictions, the wrong way round."""

import re
from collections import defaultdict
from typing import Any

import numpy as np

from toolkit.checks.content import prompt_key, row_key, row_lengths, some_rows
from toolkit.findings import Finding, Level
from toolkit.job import StageJob
from toolkit.rows import formats
from toolkit.rows.data import SourceRows

LENGTH_BIAS, ENOUGH_PAIRS = 0.65, 20
REFUSAL = re.compile(r"^\s*(I'm sorry|I am sorry|Sorry, but|I can(no|')t |I cannot|As an AI)", re.IGNORECASE)
BETTER = re.compile(r"(chosen|good|better|best|accepted|preferred|win)", re.IGNORECASE)
WORSE = re.compile(r"(reject|bad|worse|worst|lose|losing|dispreferred)", re.IGNORECASE)
SCORES = (("score_chosen", "score_rejected"), ("chosen_score", "rejected_score"), ("chosen-rating", "rejected-rating"),
          ("chosen_rating", "rejected_rating"), ("chosen_avg_rating", "rejected_avg_rating"))  # fmt: skip


def check_pairs(job: StageJob) -> list[Finding]:
    """The pairs of a DPO stage, as text and in tokens."""
    total = sum(len(source.rows) for source in job.data.sources)
    found: list[Finding] = []
    for i, source in enumerate(job.data.sources):
        found += _length_bias(source) + _crosswise(job, i, source) + _as_text(job, source, total)
    return found


def _length_bias(source: SourceRows) -> list[Finding]:
    """Whether the answer could be told by its length, in tokens before they are cut."""
    chosen, rejected = (row_lengths(source.tokens, name) for name in ("chosen_ids", "rejected_ids"))
    pairs = int(((chosen > 0) & (rejected > 0)).sum())
    if pairs < ENOUGH_PAIRS:
        return []
    for longer, other, word in ((chosen, rejected, "chosen"), (rejected, chosen, "rejected")):
        rows = tuple(source.numbers[i] for i in np.flatnonzero(longer > other).tolist())
        if len(rows) > LENGTH_BIAS * pairs:
            text = f"{word} is the longer one in {len(rows) / pairs:.0%} of {pairs:,} pairs (means: chosen "
            text += f"{chosen.sum() / pairs:.0f}, rejected {rejected.sum() / pairs:.0f} tokens): the model may learn "
            level: Level = "warning" if word == "chosen" else "note"
            return [Finding(level, "length-bias", source.where, f"{text}length instead", rows)]
    return []


def _crosswise(job: StageJob, i: int, source: SourceRows) -> list[Finding]:
    columns = job.recipe.stages[job.plan.index].data[i].columns
    chosen, rejected = columns.get("chosen", ""), columns.get("rejected", "")
    if not (WORSE.search(chosen) and BETTER.search(rejected) and not WORSE.search(rejected)):
        return []
    text = f"chosen is read from {chosen!r} and rejected from {rejected!r}: are they swapped?"
    return [Finding("warning", "swapped", source.where, text)]


def _as_text(job: StageJob, source: SourceRows, total: int) -> list[Finding]:
    seen: dict[bytes, set[tuple[bytes, bytes]]] = defaultdict(set)
    rows: dict[str, list[int]] = defaultdict(list)
    scores = next((names for names in SCORES if set(names) <= set(source.rows.column_names)), None)
    pairs = 0
    for i, row in some_rows(source, total, job.recipe.seed):
        pair = formats.to_preference(row)
        if pair is None:
            continue
        pairs += 1
        number, chosen, rejected = source.numbers[i], _said(pair["chosen"]), _said(pair["rejected"])
        prompt, sides = prompt_key(pair), (row_key(chosen), row_key(rejected))
        if chosen == rejected:
            rows["identical"].append(number)
        elif (sides[1], sides[0]) in seen[prompt]:
            rows["contradiction"].append(number)
        seen[prompt].add(sides)
        if scores and _lower(row[scores[0]], row[scores[1]]):
            rows["score"].append(number)
        for name, text in (("chosen", chosen), ("rejected", rejected)):
            if REFUSAL.match(text):
                rows[f"{name} refuses"].append(number)
            if isinstance(row.get("output"), str) and row["output"].strip() == text:
                rows[f"{name} is output"].append(number)
    return _told(source, rows, pairs, scores)


def _told(source: SourceRows, rows: dict[str, list[int]], pairs: int, scores: Any) -> list[Finding]:
    def finding(check: str, text: str, name: str, level: Any = "warning") -> Finding:
        return Finding(level, check, source.where, text, tuple(rows[name]))

    found, n = [], {name: len(numbers) for name, numbers in rows.items()}
    if same := n.get("identical", 0):
        level = "error" if same == pairs else "warning"
        text = f"chosen and rejected are the same in {same:,} of {pairs:,} pairs, which teach nothing; remove them"
        found.append(finding("identical-pair", text, "identical", level))
    if against := n.get("contradiction", 0):
        text = (
            f"{against:,} pairs prefer what another pair on the same prompt rejects, and the reverse; keep one of each"
        )
        found.append(finding("contradiction", text, "contradiction"))
    if scores and (lower := n.get("score", 0)):
        text = f"{scores[0]} is below {scores[1]} in {lower:,} of {pairs:,} pairs"
        found.append(
            finding("swapped", text + (": chosen and rejected are swapped" if lower > pairs / 2 else ""), "score")
        )
    chosen, rejected = n.get("chosen is output", 0), n.get("rejected is output", 0)
    if rejected > chosen:
        text = f"rejected is the row's own `output` in {rejected:,} pairs, chosen in {chosen:,}: are they swapped?"
        found.append(finding("swapped", text, "rejected is output"))
    refused, others = n.get("chosen refuses", 0), n.get("rejected refuses", 0)
    if pairs >= ENOUGH_PAIRS and refused >= pairs / 5 and refused > 4 * others:
        text = f"{refused:,} of {pairs:,} chosen answers begin as a refusal, of the rejected {others:,}: right where "
        found.append(finding("swapped", text + "refusing is the aim, else they are swapped", "chosen refuses"))
    return found


def _said(side: Any) -> str:
    text = side if isinstance(side, str) else "\n".join(str(turn.get("content")) for turn in side)
    return text.strip()


def _lower(chosen: Any, rejected: Any) -> bool:
    numbers = isinstance(chosen, int | float) and isinstance(rejected, int | float)
    return numbers and chosen < rejected
