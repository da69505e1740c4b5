"""Kill a run at random moments, run it again, compare the adapter with an uninterrupted run's, bit by bit.

    python tests/stress.py [--kills 30] [--seed 0] [--minutes 9]

Each run is a forked child of one process that has imported everything, so that the moments fall into the work.
"""

import argparse
import contextlib
import os
import random
import signal
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))
os.environ.setdefault("OMP_NUM_THREADS", "1")

from tests import conftest  # sets the caches up before datasets is imported
from tests.tiny import make_base


def main() -> int:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--kills", type=int, default=30)
    options.add_argument("--seed", type=int, default=0)
    options.add_argument("--minutes", type=float, default=9)
    args = options.parse_args()
    began, folder, draw = time.monotonic(), Path(tempfile.mkdtemp(prefix="stress-")), random.Random(args.seed)
    recipe = write(folder)
    import toolkit.run  # noqa: F401 - everything heavy, once

    run(recipe, folder / "warm")  # fills the caches of imports and data
    whole = run(recipe, folder / "whole")
    expected, differing, done = adapter(folder / "whole"), 0, 0
    print(f"an uninterrupted run takes {whole:.1f} s\n\n{'killed at':>9}  {'in':<34}  {'then':<28}  same bits")
    for i in range(args.kills):
        if time.monotonic() - began > args.minutes * 60:
            break
        output, after = folder / f"run-{i}", draw.uniform(0, whole)
        run(recipe, output, after)
        killed_in = last_line(output)
        run(recipe, output)
        same = adapter(output) == expected
        differing, done = differing + (not same), done + 1
        print(f"{after:7.2f} s  {killed_in:<34}  {resumed(output):<28}  {'yes' if same else 'NO'}", flush=True)
    print(f"\n{done} of {args.kills} kills in {time.monotonic() - began:.0f} s, {differing} with other bits")
    return int(differing > 0 or done < args.kills)


def write(folder: Path) -> Path:
    rows = {"sft": conftest.messages(24), "dpo": conftest.pairs(24)}
    stages = ""
    for name, content in rows.items():
        data = conftest.write_jsonl(folder / f"{name}.jsonl", content)
        stages += f"  - type: {name}\n    data: {data}\n    trainer: {{per_device_train_batch_size: 4, save_steps: 2, "
        stages += "num_train_epochs: 2, logging_steps: 1, learning_rate: 1.0e-2, gradient_checkpointing: false}\n"
    base, file = make_base(folder / "base"), folder / "recipe.yaml"
    head = f"model: {{name_or_path: {base}, dtype: float32}}\nlora: {{r: 4, lora_dropout: 0.1}}\nseed: 7\nstages:\n"
    file.write_text(head + stages)
    return file


def run(recipe: Path, output: Path, kill_after: float | None = None) -> float:
    """One `toolkit train`, killed after so many seconds; how long it took."""
    began, child = time.monotonic(), os.fork()
    if child == 0:
        log = os.open(f"{output}.log", os.O_CREAT | os.O_WRONLY | os.O_TRUNC)
        os.dup2(log, 1)
        os.dup2(log, 2)
        from toolkit.cli import main as command

        os.environ["TOOLKIT_CACHE"] = f"{output}.cache"
        code = 1
        with contextlib.suppress(BaseException):
            code = command(["train", str(recipe), "--output", str(output)])
        sys.stdout.flush()
        os._exit(code)
    if kill_after is not None:
        time.sleep(kill_after)
        os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    if kill_after is None and status != 0:
        sys.exit(f"{output}.log: the run failed with status {status}")
    return time.monotonic() - began


def last_line(output: Path) -> str:
    lines = Path(f"{output}.log").read_text().strip().splitlines()
    return (lines[-1].strip() if lines else "start")[:34]


def resumed(output: Path) -> str:
    lines = [line.strip() for line in Path(f"{output}.log").read_text().splitlines()]
    kept = [line.split()[0] for line in lines if "finished: reused" in line]
    words = [line for line in lines if line.startswith("resumes from checkpoint")]
    return ", ".join([*(f"{name} reused" for name in kept), *words])[:40] or "from the beginning"


def adapter(output: Path) -> bytes:
    return (output / "adapter" / "adapter_model.safetensors").read_bytes()


if __name__ == "__main__":
    sys.exit(main())
