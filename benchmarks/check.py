"""Seconds of each part of `toolkit check` on many pairs: `python benchmarks/check.py [PAIRS]`.

Tokenizing, which training does too and keeps in its cache, is told apart from check's own part.
"""

import json
import os
import random
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
QUICKSTART = Path(__file__).parent.parent / "recipes" / "quickstart"
TEXT = "the sun is red and a moon was blue but all stars are white or green at night in our sky"


def make_pairs(file: Path, n: int) -> None:
    """Pairs of a prompt of 10 to 40 words and answers of 5 to 60."""
    draw = random.Random(0)

    def words(low: int, high: int) -> str:
        return " ".join(draw.choices(TEXT.split(), k=draw.randint(low, high)))

    with file.open("w", encoding="utf-8") as stream:
        for _ in range(n):
            row = {
                "prompt": [{"role": "user", "content": words(10, 40)}],
                "chosen": [{"role": "assistant", "content": words(5, 60)}],
                "rejected": [{"role": "assistant", "content": words(5, 60)}],
            }
            stream.write(json.dumps(row) + "\n")


def timed(name: str, run: Callable[[], Any]) -> Any:
    began = time.perf_counter()
    result = run()
    print(f"{name:<20} {time.perf_counter() - began:7.2f} s", flush=True)
    return result


def main(n: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        os.environ["HF_DATASETS_CACHE"] = folder
        from toolkit import load_recipe
        from toolkit.checks import content as check_data
        from toolkit.checks import needs as check_resources
        from toolkit.checks import pairs as check_pairs
        from toolkit.checks import template as check_template
        from toolkit.records.rundir import RunDirectory
        from toolkit.training.prepare import prepare

        rows = Path(folder) / "pairs.jsonl"
        make_pairs(rows, n)
        recipe_file = Path(folder) / "recipe.yaml"
        stage = f"{{type: dpo, data: {rows}, trainer: {{max_length: 128}}}}"
        base = (QUICKSTART / "base").absolute()
        recipe_file.write_text(f"model: {{name_or_path: {base}, dtype: float32}}\nstages: [{stage}]\n")
        recipe = load_recipe(recipe_file)
        run = RunDirectory(Path(folder) / "run")
        print(f"{n:,} pairs")
        timed("load and tokenize", lambda: prepare(recipe, run))
        (job,) = timed("the same, cached", lambda: prepare(recipe, run)).jobs
        began = time.perf_counter()
        sources = job.data.sources
        timed("template", lambda: check_template.check_template(recipe, job.plan, job.data, job.tokenizer))
        timed("lengths", lambda: check_data.check_lengths(job) + check_data.check_steps(job))
        text = timed("read texts", lambda: check_data.read_text(sources, "dpo", job.tokenizer, recipe.seed))
        timed("duplicates, overlap", lambda: check_data.check_text(job, text))
        timed("pairs", lambda: check_pairs.check_pairs(job))
        timed("resources", lambda: check_resources.check_resources([job], run.path))
        print(f"{'check on its own':<20} {time.perf_counter() - began:7.2f} s")


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 100_000)
