"""Held-out rows as evaluation sees them: prompts to answer, answers with labels, pairs to compare."""

from dataclasses import dataclass, replace
from typing import Any

from datasets import Dataset

from toolkit.errors import DataError, ModelError
from toolkit.recipe.plan import Hardware, StagePlan, digest, stage_plans
from toolkit.recipe.sections import Recipe, Source
from toolkit.rows import chat, data, loading
from toolkit.rows.formats import Row, for_template, prompt_of, to_preference

PROMPTS_OF_EVAL_DATA = 100  # at most so many are answered where the recipe names no prompts of its own
PROMPTS = ("prompt", "instruction", "messages", "conversations", "chosen")


@dataclass(frozen=True)
class HeldOut:
    """What base and stages are measured on."""

    rows: list[Row]
    """The rows that `prompts` stand in, with the columns that scores read."""
    prompts: list[list[int]]
    """Token ids, each `(seq,)`."""
    texts: list[str]
    """The prompts' last turns, to be shown."""
    answers: list[tuple[list[int], list[int]]]
    """`input_ids` and `labels`, each `(seq,)`, as SFT would see them."""
    pairs: list[Row]
    """`prompt_ids`, `chosen_ids`, `rejected_ids`, each `(seq,)`, as DPO would see them."""
    max_length: int | None
    """Tokens at which a pair is cut."""
    digest: str


@dataclass(frozen=True)
class _Part:
    source: Source
    where: str
    rows: Dataset


def read(recipe: Recipe, hardware: Hardware, tokenizer: Any, limit: int | None = None) -> HeldOut:
    """The rows of the recipe's `evaluate` section; what they do not hold is taken from the stages' `eval_data`.

    Args:
        limit: at most this many rows of each source, drawn by the recipe's seed.

    Raises:
        DataError: there are none, or they lack a column or a value that is asked for.
        ModelError: prompts are messages and there is no chat template.
    """
    assert recipe.evaluate is not None
    plans = stage_plans(recipe, hardware)
    own = _parts(recipe, ("evaluate", "data"), recipe.evaluate.data, limit)
    stages = [
        part
        for plan in reversed(plans)
        for part in _parts(recipe, ("stages", plan.index, "eval_data"), recipe.stages[plan.index].eval_data, limit)
    ]
    if not own and not stages:
        raise DataError(f"{recipe.where('evaluate')}: nothing is held out; give evaluate.data, or a stage eval_data")
    _check(recipe, own, tokenizer)
    asked = _prompts(own) or _prompts(stages)[:PROMPTS_OF_EVAL_DATA]
    if not asked:
        raise DataError(f"{recipe.where('evaluate')}: no held-out row has a prompt to answer; give evaluate.data")
    pairs_plan = next((p for p in reversed(plans) if p.type == "dpo"), replace(plans[-1], type="dpo"))
    sft_plan = next((p for p in reversed(plans) if p.type == "sft"), replace(plans[-1], type="sft"))
    answers = _tokenized(own, sft_plan, tokenizer) or _tokenized(stages, sft_plan, tokenizer)
    pairs = _tokenized(own, pairs_plan, tokenizer) or _tokenized(stages, pairs_plan, tokenizer)
    ids = [chat.tokenize_prompt(prompt, tokenizer, **chat.template_arguments(row)) for row, prompt in asked]
    held = HeldOut(
        rows=[row for row, _ in asked],
        prompts=ids,
        texts=[prompt if isinstance(prompt, str) else str(prompt[-1]["content"]) for _, prompt in asked],
        answers=[(row["input_ids"], row["labels"]) for row in answers],
        pairs=pairs,
        max_length=pairs_plan.max_length,
        digest="",
    )
    needed = [[row.get(s.needs) for s in recipe.evaluate.scores.values() if s.needs] for row in held.rows]
    return replace(held, digest=digest([ids, held.answers, pairs, held.max_length, needed]))


def _parts(recipe: Recipe, at: tuple[str | int, ...], sources: list[Source], limit: int | None) -> list[_Part]:
    parts = []
    for i, asked in enumerate(sources):
        where, source = recipe.where(*at, i, "path"), asked
        if limit is not None:
            source = asked.model_copy(update={"limit": min(limit, asked.limit or limit), "fraction": None})
        parts.append(_Part(source, where, loading.load_numbered(source, where, recipe.seed)[0]))
    return parts


def _check(recipe: Recipe, own: list[_Part], tokenizer: Any) -> None:
    assert recipe.evaluate is not None
    scores = recipe.evaluate.scores.values()
    for part in own:
        columns = part.rows.column_names
        needed = {score.needs for score in scores if score.needs}
        if not set(PROMPTS) & set(columns):
            needed.add("prompt")
        missing = sorted(needed - set(columns))
        if missing:
            raise DataError(f"{part.where}: no column {', '.join(missing)}; found columns {', '.join(columns)}")
        needed |= {"prompt"} & set(columns)
        for number, row in enumerate(part.rows):
            empty = [name for name in sorted(needed) if row[name] in (None, "", [])]
            if empty:
                text = f"{', '.join(empty)} is empty; fill it in, or remove the row"
                raise DataError(f"{part.where}: row {number}: {text}")
        if isinstance(_prompt(part.rows[0]), list) and not tokenizer.chat_template:
            text = "the prompts are messages and there is no chat template; set model.chat_template"
            raise ModelError(f"{part.where}: {text}")


def _prompts(parts: list[_Part]) -> list[tuple[Row, Any]]:
    """Rows and their prompts, text or messages."""
    asking = (part for part in parts if set(PROMPTS) & set(part.rows.column_names))
    found = [(dict(row), _prompt(row)) for part in asking for row in part.rows]
    return [(row | for_template(row), prompt) for row, prompt in found if prompt]


def _prompt(row: Row) -> Any:
    if row.get("chosen") and row.get("rejected"):
        pair = to_preference(row)
        return pair["prompt"] if pair else None
    prompt = prompt_of(row)
    if isinstance(prompt, list) and prompt and prompt[-1]["role"] == "assistant":
        return prompt[:-1]
    return prompt


def _tokenized(parts: list[_Part], plan: StagePlan, tokenizer: Any) -> list[Row]:
    holds = _holds_pair if plan.type == "dpo" else _holds_answer
    found: list[Row] = []
    for part in parts:
        if holds(set(part.rows.column_names)):
            found += list(data.tokenize(part.rows, part.source, plan, tokenizer, part.where))
    return found


def _holds_pair(columns: set[str]) -> bool:
    return {"chosen", "rejected"} <= columns


def _holds_answer(columns: set[str]) -> bool:
    whole = {"messages", "conversations", "text", "chosen"} & columns
    asked = {"prompt", "instruction"} & columns
    return bool(whole or ("output" in columns and asked) or {"prompt", "completion"} <= columns)
