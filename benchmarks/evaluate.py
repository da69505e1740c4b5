"""What evaluation's generation costs: base, SFT and DPO by switching adapters, against three plain `generate` runs.

Run: `python benchmarks/evaluate.py runs/quickstart-sft_dpo_lora [--repeat 3]`, after `make quickstart`.
Both sides answer the run's held-out prompts greedily, in the same order and batches, for as many tokens as the recipe
says. Loading is timed on neither side; the sides take turns.
"""

import argparse
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, GenerationConfig

from toolkit.evaluation import generate, heldout
from toolkit.models import model
from toolkit.models.switched import Switched
from toolkit.records.rundir import RunDirectory
from toolkit.rows import chat


def main() -> None:
    """Print seconds of both sides, and their ratio."""
    parser = argparse.ArgumentParser()
    parser.add_argument("run", type=Path)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--batch-size", type=int, default=32)
    args = parser.parse_args()
    run = RunDirectory(args.run)
    recipe, hardware = run.recipe(), model.detect_hardware()
    tokenizer = chat.load_tokenizer(recipe)
    held = heldout.read(recipe, hardware, tokenizer)
    assert recipe.evaluate is not None
    limits = generate.Limits(recipe.evaluate.max_new_tokens, args.batch_size)
    adapters = [None, *(run.adapter(stage.name) for stage in recipe.stages)]
    switched = Switched(recipe, hardware, [path for path in adapters if path is not None])
    plain = [_plain(recipe.model.name_or_path, path) for path in adapters]
    order = sorted(held.prompts, key=lambda ids: -len(ids))
    ours, theirs, equal = [], [], True
    for _ in range(args.repeat):
        began = time.perf_counter()
        said = [_by_switching(switched, path, tokenizer, order, limits) for path in adapters]
        ours.append(time.perf_counter() - began)
        began = time.perf_counter()
        expected = [_by_generate(one, tokenizer, order, limits) for one in plain]
        theirs.append(time.perf_counter() - began)
        equal = equal and said == expected
    mine, plainly = statistics.median(ours), statistics.median(theirs)
    print(f"{len(order)} prompts, {limits.max_new_tokens} tokens at most, batch {limits.batch_size}")
    print(f"switching adapters {mine:.2f} s, plain generate {plainly:.2f} s (medians of {args.repeat})")
    print(f"ratio {mine / plainly:.2f}, answers equal: {equal}")


def _plain(name: str, adapter: Path | None) -> Any:
    base = AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32)
    return (PeftModel.from_pretrained(base, str(adapter)) if adapter else base).eval()


def _by_switching(switched: Switched, path: Path | None, tokenizer: Any, prompts: Any, limits: Any) -> list[str]:
    with switched.use(path) as loaded:
        return [answer.text for answer in generate.answers(loaded, tokenizer, prompts, limits)]


@torch.no_grad()
def _by_generate(plain: Any, tokenizer: Any, prompts: Any, limits: Any) -> list[str]:
    stops = chat.stop_token_ids(tokenizer)
    config = GenerationConfig(
        max_new_tokens=limits.max_new_tokens, eos_token_id=stops, pad_token_id=tokenizer.pad_token_id
    )
    texts: list[str] = []
    for first in range(0, len(prompts), limits.batch_size):
        chunk = {"input_ids": prompts[first : first + limits.batch_size]}
        batch = tokenizer.pad(chunk, padding_side="left", return_tensors="pt")
        out = plain.generate(**batch, generation_config=config)
        texts += tokenizer.batch_decode(out[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)
    return texts


if __name__ == "__main__":
    main()
