"""Tokenizer, chat template, and rows to token ids: the one path that training, the plan and evaluation share.

Prompt and completion are split as TRL 1.16 splits them (the longest common token prefix of the prompt alone and of
prompt + completion); a test compares the result with TRL's own trainers, token for token.
"""

import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from toolkit.errors import ModelError
from toolkit.recipe.sections import Recipe
from toolkit.wording import first_line

IGNORED = -100
GENERATION_MARKER = "{% generation"

Row = dict[str, Any]


def load_tokenizer(recipe: Recipe) -> PreTrainedTokenizerBase:
    """The base model's tokenizer with the recipe's chat template; padding falls back to the end token, as in TRL.

    Raises:
        ModelError: no tokenizer there, none with an end token, or no template of that name.
    """
    model, where = recipe.model, recipe.where("model", "name_or_path")
    if Path(model.name_or_path).is_absolute() and not Path(model.name_or_path).is_dir():
        raise ModelError(f"{where}: no such folder: {model.name_or_path}")
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            model.name_or_path, revision=model.revision, trust_remote_code=model.trust_remote_code
        )
    except Exception as error:  # `tokenizers` raises plain exceptions on a damaged file, transformers a dozen types
        raise ModelError(f"{where}: no tokenizer in {model.name_or_path!r}: {first_line(error)}") from None
    if tokenizer.eos_token is None:
        way_out = "name one as eos_token in its tokenizer_config.json, or use another base"
        raise ModelError(f"{where}: the tokenizer has no end token, so that no answer could ever end; {way_out}")
    if model.chat_template is not None:
        tokenizer.chat_template = _template(model.chat_template, recipe)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def differs_from_base(recipe: Recipe, tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the tokenizer has another template or vocabulary than the one that comes with the base."""
    if recipe.model.chat_template is None:
        return False
    plain = recipe.model_copy(update={"model": recipe.model.model_copy(update={"chat_template": None})})
    own = load_tokenizer(plain)
    return bool(own.chat_template != tokenizer.chat_template or own.get_vocab() != tokenizer.get_vocab())


def assistant_template(tokenizer: PreTrainedTokenizerBase) -> str | None:
    """A template that marks the assistant's tokens: the tokenizer's own, TRL's training version of it, or `None`."""
    template = tokenizer.chat_template or ""
    if GENERATION_MARKER in template.replace("{%-", "{%"):
        return template
    from trl.chat_template_utils import get_training_chat_template

    try:
        return get_training_chat_template(tokenizer)
    except ValueError:
        return None


def tokenize_text(row: Row, tokenizer: PreTrainedTokenizerBase) -> Row:
    """`{"text"}` to `input_ids`, `labels`, each `(seq,)`; every token is supervised, the end token included."""
    ids = tokenizer(text=_ended(row["text"], tokenizer))["input_ids"]
    return {"input_ids": ids, "labels": list(ids)}


def tokenize_messages(row: Row, tokenizer: PreTrainedTokenizerBase, template: str) -> Row:
    """`{"messages"}` to `input_ids`, `labels`, each `(seq,)`; the assistant's tokens are supervised."""
    out = tokenizer.apply_chat_template(
        row["messages"],
        tokenize=True,
        return_dict=True,
        return_assistant_tokens_mask=True,
        chat_template=template,
        **template_arguments(row),
    )
    ids = out["input_ids"]
    return {"input_ids": ids, "labels": _masked(ids, out["assistant_masks"])}


def tokenize_prompt_completion(row: Row, tokenizer: PreTrainedTokenizerBase) -> Row:
    """`{"prompt", "completion"}`, both text or both messages, to `input_ids`, `labels`, each `(seq,)`.

    `merged` is the number of the prompt's last tokens that are others once the completion follows; they are trained.
    """
    prompt, (ids,) = _prompt_and_full(row, ["completion"], tokenizer)
    start = common_prefix(prompt, ids)
    return {"input_ids": ids, "labels": [IGNORED] * start + ids[start:], "merged": len(prompt) - start}


def tokenize_preference(row: Row, tokenizer: PreTrainedTokenizerBase) -> Row:
    """`{"prompt", "chosen", "rejected"}` to `prompt_ids`, `chosen_ids`, `rejected_ids`, each `(seq,)`, and `merged`."""
    prompt, (chosen, rejected) = _prompt_and_full(row, ["chosen", "rejected"], tokenizer)
    start = min(common_prefix(prompt, chosen), common_prefix(prompt, rejected))
    ids = {"prompt_ids": prompt[:start], "chosen_ids": chosen[start:], "rejected_ids": rejected[start:]}
    return ids | {"merged": len(prompt) - start}


def tokenize_prompt(prompt: str | list[Row], tokenizer: PreTrainedTokenizerBase, **arguments: Any) -> list[int]:
    """A prompt as generation sees it, `(seq,)`."""
    if isinstance(prompt, str):
        return list(tokenizer(text=prompt)["input_ids"])
    out = tokenizer.apply_chat_template(
        prompt, tokenize=True, return_dict=True, add_generation_prompt=True, **arguments
    )
    return list(out["input_ids"])


def template_arguments(row: Row) -> Row:
    """What a row gives its template besides messages, as in TRL: `tools` (a list, or JSON), `chat_template_kwargs`."""
    tools = row.get("tools")
    tools = json.loads(tools) if isinstance(tools, str) else tools
    return ({"tools": tools} if tools else {}) | (row.get("chat_template_kwargs") or {})


def stop_token_ids(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Tokens that end an answer: the end token, and what the template puts after an assistant's turn."""
    stops = [tokenizer.eos_token_id]
    if tokenizer.chat_template:
        turn = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
        ids = tokenizer.apply_chat_template(turn, tokenize=True, return_dict=True)["input_ids"]
        opened = len(tokenize_prompt(turn[:1], tokenizer))
        stops += [i for i in ids[opened:] if i in tokenizer.all_special_ids][:1]
    return sorted({s for s in stops if s is not None})


def common_prefix(a: list[int], b: list[int]) -> int:
    """Number of leading tokens that both have in common."""
    shared = 0
    for x, y in zip(a, b, strict=False):
        if x != y:
            break
        shared += 1
    return shared


def _prompt_and_full(row: Row, sides: list[str], tokenizer: Any) -> tuple[list[int], list[list[int]]]:
    prompt, arguments = row["prompt"], template_arguments(row)
    prompt_ids = tokenize_prompt(prompt, tokenizer, **arguments)
    if isinstance(prompt, str):
        return prompt_ids, [tokenizer(text=prompt + _ended(row[side], tokenizer))["input_ids"] for side in sides]
    return prompt_ids, [
        tokenizer.apply_chat_template(prompt + row[side], tokenize=True, return_dict=True, **arguments)["input_ids"]
        for side in sides
    ]


def _ended(text: str, tokenizer: PreTrainedTokenizerBase) -> str:
    return text if text.endswith(tokenizer.eos_token) else text + tokenizer.eos_token


def _masked(ids: list[int], mask: list[int]) -> list[int]:
    return [token if keep else IGNORED for token, keep in zip(ids, mask, strict=True)]


def _template(name: str, recipe: Recipe) -> str:
    if name.endswith((".jinja", ".j2")):
        try:
            return Path(name).read_text(encoding="utf-8")
        except OSError as error:
            raise ModelError(f"{recipe.where('model', 'chat_template')}: {error.strerror}: {name}") from None
    spec = find_spec("trl")
    assert spec is not None and spec.origin is not None
    folders = [Path(__file__).parent / "templates", Path(spec.origin).parent / "chat_templates"]
    for file in (folder / f"{name}{suffix}.jinja" for suffix in ("_training", "") for folder in folders):
        if file.is_file() and not file.stem.endswith(".html"):  # those are of the report
            return file.read_text(encoding="utf-8")
    files = [file for folder in folders for file in folder.glob("*.jinja") if not file.stem.endswith(".html")]
    known = sorted({file.stem.removesuffix("_training") for file in files})
    where = recipe.where("model", "chat_template")
    raise ModelError(f"{where}: no template is named {name!r}; expected a .jinja file or one of: {', '.join(known)}")
