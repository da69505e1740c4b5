"""Rows of every known format as messages, prompt + completion, prompt + chosen + rejected, or text."""

from typing import Any

from toolkit.errors import DataError
from toolkit.recipe.sections import Source

Row = dict[str, Any]

NEEDED = {
    "messages": ("messages",),
    "sharegpt": ("conversations",),
    "alpaca": ("instruction", "output"),
    "prompt_completion": ("prompt", "completion"),
    "preference": ("chosen", "rejected"),
    "text": ("text",),
}
ROLES = {"human": "user", "gpt": "assistant", "function_call": "assistant", "observation": "tool"}


def recognise(source: Source, columns: list[str], stage_type: str, where: str) -> str:
    """The format of a source: the one it names, or the one its columns show.

    Raises:
        DataError: columns are missing, or nothing is recognised; with the columns found, and the way out.
    """
    found = f"found columns {', '.join(columns)}"
    way_out = "rename with columns: {ours: theirs}"
    if stage_type == "dpo" or source.format is not None:
        shape = "preference" if stage_type == "dpo" else str(source.format)
        if source.format not in (None, shape):
            raise DataError(f"{where}: format: {source.format} has no pairs; a dpo stage needs preference rows")
        needed = ("chosen",) if shape == "preference" and stage_type == "sft" else NEEDED[shape]
        missing = [name for name in needed if name not in columns]
        if missing:
            raise DataError(f"{where}: no column {', '.join(missing)}; {found}; {way_out}")
        return shape
    rules = (
        ("messages", "messages" in columns),
        ("alpaca", "output" in columns and ("instruction" in columns or "prompt" in columns)),
        ("prompt_completion", "prompt" in columns and "completion" in columns),
        ("preference", "chosen" in columns),
        ("sharegpt", "conversations" in columns),
        ("text", "text" in columns),
    )
    for shape, matches in rules:
        if matches:
            return shape
    expected = "; ".join(f"{shape}: {' + '.join(names)}" for shape, names in NEEDED.items())
    raise DataError(f"{where}: the format is not recognised; {found}; expected one of ({expected}), or {way_out}")


def prompt_of(row: Row) -> Any:
    """The prompt of a row that asks for an answer: text, or messages."""
    if row.get("instruction") is not None:
        text = row["instruction"] + (f"\n\n{row['input']}" if row.get("input") else "")
        return [*_system(row), {"role": "user", "content": text}]
    prompt = row["prompt"] if row.get("prompt") is not None else row.get("messages", row.get("conversations"))
    return _messages(prompt) if isinstance(prompt, list) else prompt


def for_template(row: Row) -> Row:
    """The columns that go to the chat template beside the messages."""
    return {name: row[name] for name in ("tools", "chat_template_kwargs") if row.get(name)}


def to_sft(row: Row, shape: str) -> Row | None:
    """A row of a known shape as `messages`, `prompt` + `completion` or `text`; `None` where the answer is empty."""
    if shape == "text":
        return {"text": row["text"]} if _said(row["text"]) else None
    if shape in ("messages", "sharegpt"):
        messages = _messages(row["messages" if shape == "messages" else "conversations"])
        if messages and messages[0]["role"] != "system":
            messages = [*_system(row), *messages]
        return {"messages": messages} if messages and _said(messages[-1].get("content")) else None
    if shape == "preference":
        pair = to_preference({**row, "rejected": row.get("rejected", row["chosen"])})
        return {"prompt": pair["prompt"], "completion": pair["chosen"]} if pair else None
    prompt, answer = prompt_of(row), row["output" if shape == "alpaca" else "completion"]
    if not _said(prompt) or not _said(answer):
        return None
    return dict(zip(("prompt", "completion"), _same_form(prompt, answer), strict=True))


def to_preference(row: Row) -> Row | None:
    """A pair as `prompt`, `chosen`, `rejected`, all text or all messages; `None` where an answer is empty."""
    chosen, rejected = _turns(row["chosen"]), _turns(row["rejected"])
    if not _said(chosen) or not _said(rejected):
        return None
    whole_conversation = isinstance(chosen, list) and chosen[0]["role"] != "assistant"
    prompt = None if whole_conversation else prompt_of(row)
    if prompt is None:
        return _without_common_start(chosen, rejected)
    prompt, chosen, rejected = _same_form(prompt, chosen, rejected)
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected}


def _without_common_start(chosen: Any, rejected: Any) -> Row:
    if chosen == rejected and isinstance(chosen, list):
        return {"prompt": chosen[:-1], "chosen": chosen[-1:], "rejected": rejected[-1:]}
    from trl.data_utils import extract_prompt

    return dict(extract_prompt({"chosen": chosen, "rejected": rejected}))


def _turns(value: Any) -> Any:
    return _messages([value]) if isinstance(value, dict) else _messages(value) if isinstance(value, list) else value


def _messages(turns: list[Row]) -> list[Row]:
    """Messages with `role` and `content`; ShareGPT's `from` and `value` mean the same."""
    renamed = [{"role": t["from"], "content": t["value"]} if t.get("from") is not None else t for t in turns]
    return [
        {k: v for k, v in turn.items() if v is not None} | {"role": ROLES.get(turn["role"], turn["role"])}
        for turn in renamed
    ]


def _same_form(prompt: Any, *answers: Any) -> tuple[Any, ...]:
    """All text where all are text, else all messages."""
    if isinstance(prompt, str) and all(isinstance(answer, str) for answer in answers):
        return (prompt, *answers)
    as_messages = [[{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt]
    as_messages += [[{"role": "assistant", "content": a}] if isinstance(a, str) else _turns(a) for a in answers]
    return tuple(as_messages)


def _system(row: Row) -> list[Row]:
    return [{"role": "system", "content": row["system"]}] if row.get("system") else []


def _said(value: Any) -> bool:
    if isinstance(value, list):
        return bool(value) and _said(value[-1].get("content"))
    if not isinstance(value, str | None):
        raise TypeError(f"expected text or messages, found {value!r}")
    return bool(value and value.strip())
