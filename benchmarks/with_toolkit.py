"""This side: `toolkit train RECIPE`, and its own record. `python benchmarks/with_toolkit.py RECIPE RUN`."""

import json
import sys
from pathlib import Path

from toolkit.cli import main

if __name__ == "__main__":
    recipe, run = sys.argv[1:]
    code = main(["train", recipe, "--output", run])
    if code:
        sys.exit(code)
    folder = next(path.parent for path in Path(run).glob("*/stage.json"))
    record = json.loads((folder / "stage.json").read_text(encoding="utf-8"))
    logged = [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    steps = [line for line in logged if "loss" in line]
    report = {
        "loop": record["metrics"]["train_runtime"] + record.get("reference_seconds", 0.0),
        "losses": [line["loss"] for line in steps],
        "tokens": steps[-1]["num_tokens"],
    }
    import torch

    if torch.cuda.is_available():
        report["cuda_peak"] = torch.cuda.max_memory_allocated()
    print("RESULT " + json.dumps(report), flush=True)
