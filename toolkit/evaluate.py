"""Greedy answers of base and every stage to held-out prompts, from one loaded base with adapters switched."""

import re
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import GenerationConfig

from toolkit import chat, model
from toolkit.data import load_source
from toolkit.errors import DataError, ModelError
from toolkit.formats import prompt_of
from toolkit.plan import Hardware
from toolkit.recipe import Evaluate, Recipe, Score

BASE = "base"


def evaluate(recipe: Recipe, hardware: Hardware, tokenizer: Any, adapters: dict[str, Path]) -> dict[str, Any]:
    """Answer the recipe's held-out prompts with the base and with each adapter, and count the scores.

    Args:
        adapters: stage name -> plain PEFT adapter on the base, in order.

    Returns:
        `{"prompts": n, "scores": {title: {model: share}}, "samples": [{"prompt", "answers": {model: text}}]}`.

    Raises:
        DataError: the data is missing, or lacks a column that is asked for.
    """
    assert recipe.evaluate is not None
    settings = recipe.evaluate
    rows = held_out_rows(recipe, tokenizer)
    prompts = [prompt_of(row) for row in rows]
    answers = _answers(recipe, hardware, tokenizer, adapters, prompts)
    scores = {
        title: {name: _share(score, rows, texts) for name, texts in answers.items()}
        for title, score in settings.scores.items()
    }
    samples = [
        {"prompt": _last_turn(prompts[i]), "answers": {name: texts[i] for name, texts in answers.items()}}
        for i in range(min(settings.samples, len(rows)))
    ]
    return {"prompts": len(rows), "max_new_tokens": settings.max_new_tokens, "scores": scores, "samples": samples}


def held_out_rows(recipe: Recipe, tokenizer: Any) -> list[dict[str, Any]]:
    """The rows of the recipe's `evaluate` section, checked for what answering and scoring them needs.

    Raises:
        DataError: a column is missing.
        ModelError: prompts are messages, and there is no chat template.
    """
    assert recipe.evaluate is not None
    rows: list[dict[str, Any]] = []
    for i, source in enumerate(recipe.evaluate.data):
        where = recipe.where("evaluate", "data", i, "path")
        loaded = load_source(source, where, recipe.seed)
        needed = {score.column for score in recipe.evaluate.scores.values() if score.column}
        if "instruction" not in loaded.column_names:
            needed.add("prompt")
        missing = sorted(needed - set(loaded.column_names))
        if missing:
            found = ", ".join(loaded.column_names)
            raise DataError(f"{where}: no column {', '.join(missing)}; found columns {found}")
        if isinstance(prompt_of(loaded[0]), list) and not tokenizer.chat_template:
            raise ModelError(
                f"{where}: the prompts are messages and there is no chat template; set model.chat_template"
            )
        for number, row in enumerate(loaded):
            empty = [name for name in sorted(needed & set(row)) if row[name] in (None, "", [])]
            if empty:
                raise DataError(f"{where}: row {number}: {', '.join(empty)} is empty; fill it in, or remove the row")
        rows += list(loaded)
    return rows


def table(evaluation: dict[str, Any]) -> str:
    """The closing table, and the samples with the answers below each other."""
    scores, samples = evaluation["scores"], evaluation["samples"]
    models = list(next(iter(scores.values()), None) or (samples[0]["answers"] if samples else {}))
    width = max((len(name) for name in models), default=4)
    lines = []
    if scores:
        lines += [f"{evaluation['prompts']} held-out prompts, greedy answers", ""]
        lines.append(" " * width + "".join(f"  {title:>12}" for title in scores))
        lines += [
            f"{name:<{width}}" + "".join(f"  {score[name]:>12.1%}" for score in scores.values()) for name in models
        ]
    for sample in samples:
        lines += ["", f"> {sample['prompt']}"]
        lines += [f"  {name:<{width}}  {' '.join(sample['answers'][name].split())}" for name in models]
    return "\n".join(lines)


def _answers(
    recipe: Recipe, hardware: Hardware, tokenizer: Any, adapters: dict[str, Path], prompts: list[Any]
) -> dict[str, list[str]]:
    assert recipe.evaluate is not None
    base: Any = model.load_base(recipe, hardware)
    loaded_as = {name: f"stage{i}" for i, name in enumerate(adapters)}  # PEFT takes no name with a dot in it
    for name, folder in adapters.items():
        if isinstance(base, PeftModel):
            base.load_adapter(str(folder), adapter_name=loaded_as[name])
        else:
            base = PeftModel.from_pretrained(base, str(folder), adapter_name=loaded_as[name])
    base.eval()
    with base.disable_adapter():
        answers = {BASE: _generate(base, tokenizer, prompts, recipe.evaluate)}
    for name in adapters:
        base.set_adapter(loaded_as[name], inference_mode=True)
        answers[name] = _generate(base, tokenizer, prompts, recipe.evaluate)
    return answers


@torch.no_grad()
def _generate(generator: Any, tokenizer: Any, prompts: list[Any], settings: Evaluate) -> list[str]:
    stops = chat.stop_token_ids(tokenizer)
    greedy = GenerationConfig(
        max_new_tokens=settings.max_new_tokens, do_sample=False, eos_token_id=stops, pad_token_id=tokenizer.pad_token_id
    )
    texts: list[str] = []
    for first in range(0, len(prompts), settings.batch_size):
        ids = [chat.tokenize_prompt(prompt, tokenizer) for prompt in prompts[first : first + settings.batch_size]]
        batch = tokenizer.pad({"input_ids": ids}, padding_side="left", return_tensors="pt").to(generator.device)
        out = generator.generate(**batch, generation_config=greedy)
        texts += tokenizer.batch_decode(out[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)
    return texts


def _share(score: Score, rows: list[dict[str, Any]], texts: list[str]) -> float:
    if score.regex is not None:
        hits = [re.search(score.regex, text.strip()) is not None for text in texts]
    else:
        hits = [str(row[score.column or ""]) in text for row, text in zip(rows, texts, strict=True)]
    return sum(hits) / len(hits)


def _last_turn(prompt: Any) -> str:
    return prompt if isinstance(prompt, str) else str(prompt[-1]["content"])
