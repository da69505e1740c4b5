"""How soon the command line answers: whole processes, beside a Python that does nothing.

    python benchmarks/startup.py

Runs are interleaved, so that a busy moment falls on all of them; the table holds medians.
"""

import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

REPEAT = 5
ROOT = Path(__file__).parent.parent
RECIPE = ROOT / "recipes" / "quickstart" / "sft_dpo_lora.yaml"


def seconds(arguments: list[str]) -> float:
    """Wall time of one process."""
    began = time.perf_counter()
    subprocess.run([sys.executable, *arguments], cwd=ROOT, capture_output=True, check=False)
    return time.perf_counter() - began


def main() -> None:
    """Print the table."""
    with tempfile.TemporaryDirectory() as folder:
        typo = Path(folder) / "typo.yaml"
        typo.write_text(RECIPE.read_text(encoding="utf-8").replace("beta:", "bta:"), encoding="utf-8")
        commands = {
            "python -c pass": ["-c", "pass"],
            "toolkit --help": ["-m", "toolkit", "--help"],
            "toolkit train, on a typo": ["-m", "toolkit", "train", str(typo)],
            "toolkit schema": ["-m", "toolkit", "schema"],
        }
        times: dict[str, list[float]] = {name: [] for name in commands}
        for _ in range(REPEAT):
            for name, arguments in commands.items():
                times[name].append(seconds(arguments))
    print(f"{'command':<28} {'median s':>8} {'slowest':>8}   of {REPEAT} interleaved runs")
    for name, found in times.items():
        print(f"{name:<28} {statistics.median(found):>8.2f} {max(found):>8.2f}")


if __name__ == "__main__":
    main()
