"""What tokenizer and chat template do to a conversation, seen on one that goes the way of the training rows."""

from typing import Any

from toolkit.findings import Finding, Level
from toolkit.recipe.plan import StagePlan
from toolkit.recipe.sections import Recipe
from toolkit.rows import chat
from toolkit.rows.chat import GENERATION_MARKER, IGNORED
from toolkit.rows.data import StageData, talks
from toolkit.wording import first_line

QUESTION, ANSWER = "alpha question", "beta answer"
USER, ASSISTANT = {"role": "user", "content": QUESTION}, {"role": "assistant", "content": ANSWER}
FIX = "; set model.chat_template to one that fits this tokenizer"


def check_tokenizer(recipe: Recipe, tokenizer: Any) -> list[Finding]:
    """The end and padding tokens."""
    where = recipe.where("model", "name_or_path")
    end, pad = tokenizer.eos_token, tokenizer.pad_token
    if tokenizer.pad_token_id == tokenizer.eos_token_id:
        text = (
            f"pads with its end token {end}; padding is masked by its place, so the end of an answer is still trained"
        )
    else:
        text = f"pads with {pad}, ends with {end}"
    return [Finding("note", "padding", where, f"the tokenizer {text}")]


def check_template(recipe: Recipe, plan: StagePlan, data: StageData, tokenizer: Any) -> list[Finding]:
    """How the template renders this stage's conversations; nothing where its rows are plain text."""
    spoken = [source for source in data.sources if talks(source.rows, source.shape)]
    if not spoken:
        return []
    where = recipe.where("model", "chat_template")
    turns = plan.type == "sft" and any(source.shape in ("messages", "sharegpt") for source in spoken)
    template = chat.assistant_template(tokenizer) if turns else None
    try:
        found = [*_stops(plan, tokenizer, template, where), *_first_token(tokenizer, where)]
        if template is not None:
            found += _earlier_turns(tokenizer, template, where)
    except Exception as error:  # a template is a program, and raises what it likes
        text = f"the template cannot render a question and its answer: {first_line(error)}"
        return [Finding("error", "template", where, text)]
    if turns and template is None:
        text = f"the template has no {GENERATION_MARKER} %}}, so of each conversation the last answer alone is trained"
        found.append(Finding("warning", "untrained-turns", where, text))
    return found


def _stops(plan: StagePlan, tokenizer: Any, template: str | None, where: str) -> list[Finding]:
    ends = [_end_of_answer(ids, labels, turn, tokenizer) for ids, labels, turn in _rendered(plan, tokenizer, template)]
    found = _openings(plan, tokenizer, template, where)
    if all(token is None for token, _ in ends):
        last = _text_after_answer(plan, tokenizer, template)
        seen = f"ends an answer with {last!r}, which is no single token of this tokenizer" if last else "ends no answer"
        text = f"the template {seen}: the model would learn no stop token and never stop{FIX}"
        return [*found, Finding("error", "no-stop-token", where, text)]
    untrained = sum(not trained for _, trained in ends)
    if untrained:
        level: Level = "error" if untrained == len(ends) else "warning"
        name = next(tokenizer.convert_ids_to_tokens(token) for token, _ in ends if token is not None)
        text = (
            f"the stop token {name} is masked after {untrained} of {len(ends)} answers, so the model would not learn "
        )
        return [
            *found,
            Finding(level, "stop-not-trained", where, f"{text}to stop; put it inside {GENERATION_MARKER} %}}"),
        ]
    token = ends[0][0]
    name = tokenizer.convert_ids_to_tokens(token)
    if token != tokenizer.eos_token_id:
        text = f"answers end with {name}, and the tokenizer's end token is {tokenizer.eos_token}; generate with "
        return [*found, Finding("note", "stop-token", where, f"{text}eos_token_id={token}, as `evaluate` does")]
    return [*found, Finding("note", "stop-token", where, f"the stop token {name} is trained after every answer")]


def _rendered(plan: StagePlan, tokenizer: Any, template: str | None) -> list[tuple[list[int], list[int], int]]:
    """Ids and labels, each `(seq,)`, of a conversation as this stage trains it, for each of its answers."""
    if template is not None:
        row = chat.tokenize_messages({"messages": [USER, ASSISTANT, USER, ASSISTANT]}, tokenizer, template)
        if plan.trainer.get("assistant_only_loss") is False:
            row["labels"] = row["input_ids"]
        return [(row["input_ids"], row["labels"], turn) for turn in (0, 1)]
    if plan.type == "sft":
        row = chat.tokenize_prompt_completion({"prompt": [USER], "completion": [ASSISTANT]}, tokenizer)
        return [(row["input_ids"], row["labels"], 0)]
    pair = chat.tokenize_preference({"prompt": [USER], "chosen": [ASSISTANT], "rejected": [ASSISTANT]}, tokenizer)
    masked = [IGNORED] * len(pair["prompt_ids"])
    sides = [pair["chosen_ids"], pair["rejected_ids"]]
    return [(pair["prompt_ids"] + side, masked + side, 0) for side in sides]


def _end_of_answer(ids: list[int], labels: list[int], turn: int, tokenizer: Any) -> tuple[int | None, bool]:
    """The special token that follows an answer before the next question begins, and whether it is trained."""
    start = _tokens_until(ids, ANSWER, turn + 1, tokenizer)
    special = {tokenizer.eos_token_id, *tokenizer.all_special_ids, *tokenizer.get_added_vocab().values()}
    for i in range(start, len(ids)):
        if ids[i] in special:
            return ids[i], labels[i] != IGNORED
    return None, False


def _tokens_until(ids: list[int], text: str, times: int, tokenizer: Any) -> int:
    """How many tokens it takes to have said `text` so many times."""
    return next((n for n in range(1, len(ids) + 1) if _decoded(ids[:n], tokenizer).count(text) >= times), len(ids))


def _text_after_answer(plan: StagePlan, tokenizer: Any, template: str | None) -> str:
    ids = _rendered(plan, tokenizer, template)[-1][0]
    return _decoded(ids, tokenizer).rpartition(ANSWER)[2].strip()


def _openings(plan: StagePlan, tokenizer: Any, template: str | None, where: str) -> list[Finding]:
    """What stands in the supervised part before the answer: the turn's header, where a template opens no turn."""
    ids, labels, _ = _rendered(plan, tokenizer, template)[0]
    if template is not None or IGNORED not in labels:
        return []
    header = _decoded([i for i, label in zip(ids, labels, strict=True) if label != IGNORED], tokenizer).split(ANSWER)[0]
    if not header.strip() or "think>" in header:
        return []
    text = f"the template ignores add_generation_prompt: {header.strip()!r} is trained as a part of every answer"
    return [Finding("warning", "no-generation-prompt", where, text)]


def _first_token(tokenizer: Any, where: str) -> list[Finding]:
    """A beginning token twice, or one that plain text gets and conversations do not."""
    begin = tokenizer.bos_token_id
    if begin is None:
        return []
    spoken = chat.tokenize_prompt([USER], tokenizer)
    if spoken[:2] == [begin, begin]:
        text = f"the template begins with {tokenizer.bos_token} twice; remove one from it"
        return [Finding("warning", "double-bos", where, text)]
    if spoken[:1] != [begin] and tokenizer(text="a")["input_ids"][:1] == [begin]:
        text = (
            f"the tokenizer begins a text with {tokenizer.bos_token}, and the template begins a conversation without it"
        )
        return [Finding("warning", "no-bos", where, text)]
    return []


def _earlier_turns(tokenizer: Any, template: str, where: str) -> list[Finding]:
    """An answer must read the same once another question follows: else it is trained in a form never generated."""
    thought = {"role": "assistant", "content": f"<think>\ngamma\n</think>\n\n{ANSWER}"}
    for answer, what in ((ASSISTANT, "an answer"), (thought, "an answer's <think> part")):
        first = chat.tokenize_messages({"messages": [USER, answer]}, tokenizer, template)["input_ids"]
        both = chat.tokenize_messages({"messages": [USER, answer, USER, answer]}, tokenizer, template)["input_ids"]
        end = _tokens_until(first, ANSWER, 1, tokenizer)
        if both[:end] != first[:end]:
            text = f"the template rewrites {what} once another question follows; earlier answers are trained so"
            level: Level = "warning" if answer is ASSISTANT else "note"
            return [Finding(level, "rewritten-turns", where, text)]
    return []


def _decoded(ids: list[int], tokenizer: Any) -> str:
    return str(tokenizer.decode(ids, skip_special_tokens=False))
