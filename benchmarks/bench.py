"""The toolkit against plain TRL of the installed version: same model, data, batch, precision.

    python benchmarks/bench.py [--device cpu|cuda] [--only NAME ...] [--repeat 3] [--out FOLDER]

Every run is a process of its own, and the two sides take turns. Reported are medians and ratios of the training loop
(the toolkit's reference pass counted in), the whole command, and the peak memory of the process; and whether the losses
are TRL's own when the rows come in TRL's order.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from workloads import (
    LONG_COMPLETIONS,
    LONG_PROMPTS,
    MIXED_ROWS,
    SHORT_PROMPTS,
    Lengths,
    make_model,
    make_rows,
    predicted,
    predicted_packed,
)

HERE = Path(__file__).parent
QUICKSTART = HERE.parent / "recipes" / "quickstart"
OFF = {"prefix_sharing": False, "reference": "online"}
PACKED = 512  # tokens to a row
IN_TRLS_ORDER = {"train_sampling_strategy": "random"}


@dataclass(frozen=True)
class Case:
    """One workload, and the variants of the toolkit that run on it beside TRL."""

    name: str
    kind: str
    lengths: Lengths
    rows: int
    variants: tuple[str, ...]
    epochs: int = 1
    trainer: dict[str, Any] = field(default_factory=dict)


CPU_CASES = (
    Case("dpo, long prompts, one epoch", "dpo", LONG_PROMPTS, 24, ("cold", "warm", "same order")),
    Case("dpo, long prompts, three epochs", "dpo", LONG_PROMPTS, 8, ("cold",), epochs=3),
    Case("dpo, short prompts, one epoch", "dpo", SHORT_PROMPTS, 240, ("cold", "warm", "same order", "features off")),
    Case("dpo, long completions, one epoch", "dpo", LONG_COMPLETIONS, 16, ("cold", "warm")),
    Case("sft, rows of 10 to 500 tokens", "sft", MIXED_ROWS, 32, ("packed", "features off")),
)
CUDA_CASES = (
    Case("dpo, long prompts, one epoch", "dpo", LONG_PROMPTS, 512, ("cold", "warm", "same order")),
    Case("dpo, short prompts, one epoch", "dpo", SHORT_PROMPTS, 1024, ("cold", "warm")),
    Case("sft, rows of 10 to 500 tokens", "sft", MIXED_ROWS, 512, ("packed",)),
)
LORA = {"r": 16, "lora_alpha": 32, "target_modules": "all-linear"}


@dataclass
class Bench:
    """A model, a folder to work in, and how to run one side of a case in it."""

    folder: Path
    model: Path
    dtype: str
    quantization: dict[str, Any] | None = None

    def trainer(self, case: Case) -> dict[str, Any]:
        return {
            "per_device_train_batch_size": 8,
            "num_train_epochs": case.epochs,
            "learning_rate": 1e-4,
            "lr_scheduler_type": "constant",
            "warmup_steps": 0,
            "max_length": 1024,
            "gradient_checkpointing": False,
            "bf16": self.dtype == "bfloat16",
            "logging_steps": 1,
            "save_strategy": "no",
            **case.trainer,
        }

    def trl(self, case: Case, data: Path) -> dict[str, Any]:
        own = {"bf16": self.dtype == "bfloat16", "seed": 42} | (
            {} if cuda() else {"dataloader_pin_memory": False, "use_cpu": True}
        )
        settings = {
            "kind": case.kind,
            "model": str(self.model),
            "data": str(data),
            "output": str(self.folder / "trl"),
            "dtype": self.dtype,
            "quantization": self.quantization,
            "attn_implementation": None,
            "lora": LORA,
            "trainer": self.trainer(case) | own,
        }
        file = self.folder / "trl.json"
        file.write_text(json.dumps(settings), encoding="utf-8")
        return timed([sys.executable, str(HERE / "plain_trl.py"), str(file)], "step 1 ")

    def toolkit(self, case: Case, data: Path, variant: str, start: Path | None = None) -> dict[str, Any]:
        trainer, stage = self.trainer(case), {"type": case.kind, "data": str(data)}
        if variant in ("same order", "features off") and case.kind == "dpo":
            trainer |= IN_TRLS_ORDER
        if variant == "features off" and case.kind == "dpo":
            stage |= OFF
        if variant == "packed":
            trainer |= {"packing": True, "max_length": PACKED}
        if variant == "warm":
            trainer["beta"] = 0.2
        if start is not None:
            stage["from"] = str(start)
        recipe = {
            "model": {"name_or_path": str(self.model), "dtype": self.dtype},
            "lora": LORA,
            "stages": [{**stage, "trainer": trainer}],
        }
        if self.quantization:
            recipe["quantization"] = self.quantization
        file, run = self.folder / "recipe.yaml", self.folder / "run"
        file.write_text(yaml.safe_dump(recipe), encoding="utf-8")
        shutil.rmtree(run, ignore_errors=True)
        if variant != "warm":
            shutil.rmtree(self.folder / "cache", ignore_errors=True)
        os.environ["TOOLKIT_CACHE"] = str(self.folder / "cache")
        return timed([sys.executable, str(HERE / "with_toolkit.py"), str(file), str(run)], f"{case.kind} 1/")


def cuda() -> bool:
    import torch

    return torch.cuda.is_available()


def timed(command: list[str], first_step: str) -> dict[str, Any]:
    """Run a command; its RESULT line, and seconds to its end and to its first step, and its peak memory in bytes."""
    began = time.monotonic()
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    result: dict[str, Any] = {}
    for line in process.stdout:
        if line.strip().startswith(first_step) and "first_step" not in result:
            result["first_step"] = time.monotonic() - began
        if line.startswith("RESULT "):
            result |= json.loads(line.removeprefix("RESULT "))
    errors = process.stderr.read() if process.stderr else ""
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        sys.exit(f"{' '.join(command)} failed:\n{errors[-3000:]}")
    seconds = {"whole": time.monotonic() - began, "user": usage.ru_utime, "system": usage.ru_stime}
    return result | seconds | {"peak": result.get("cuda_peak", usage.ru_maxrss * 1024)}


def run_case(bench: Bench, case: Case, shape: str, repeat: int) -> dict[str, Any]:
    """All variants of a case, taking turns with TRL; the medians, and each variant against TRL."""
    data = bench.folder / "rows.jsonl"
    tokens = make_rows(data, case.kind, case.rows, case.lengths)
    runs: dict[str, list[dict[str, Any]]] = {"trl": [], **{variant: [] for variant in case.variants}}
    for i in range(repeat):
        runs["trl"].append(bench.trl(case, data))
        for variant in case.variants:
            if variant != "same order" or i == 0:
                runs[variant].append(bench.toolkit(case, data, variant))
        print(f"  {case.name}: {i + 1} of {repeat}", file=sys.stderr, flush=True)
    medians = {
        name: {key: statistics.median(run[key] for run in taken) for key in ("loop", "whole", "peak", "first_step")}
        for name, taken in runs.items()
    }
    report: dict[str, Any] = {"tokens": sum(map(sum, tokens)), "medians": medians, "runs": runs}
    for variant in case.variants:
        report[variant] = {key: medians["trl"][key] / medians[variant][key] for key in ("loop", "whole")}
        report[variant]["peak"] = medians[variant]["peak"] / medians["trl"]["peak"]
        if case.kind == "dpo" and variant in ("cold", "warm"):
            report[variant]["predicted"] = predicted(shape, tokens, 8, case.epochs)[variant]
        if variant == "packed":
            report[variant]["predicted"] = predicted_packed(shape, tokens, 8, PACKED)
        if variant in ("same order", "features off"):
            pairs = zip(runs[variant][0]["losses"], runs["trl"][0]["losses"], strict=True)
            report[variant]["loss_difference"] = max(abs(a - b) / abs(b) for a, b in pairs)
    return report


def run_first_step(folder: Path, repeat: int) -> dict[str, Any]:
    """Seconds from the shell to the first step of an epoch, with the quickstart's model and pairs."""
    case = Case("first step", "dpo", SHORT_PROMPTS, 0, ("cold",), trainer={"max_length": 128})
    bench = Bench(folder, QUICKSTART / "base", "float32")
    data = QUICKSTART / "preferences.jsonl"
    turns = [(bench.trl(case, data), bench.toolkit(case, data, "cold")) for _ in range(repeat)]
    trl, ours = (statistics.median(turn[side]["first_step"] for turn in turns) for side in (0, 1))
    return {"trl": trl, "toolkit": ours, "ratio": trl / ours}


def run_stacked(bench: Bench, repeat: int) -> dict[str, Any]:
    """What the frozen adapter of a stacked stage costs in the training loop."""
    case = Case("stacked", "dpo", SHORT_PROMPTS, 80, ("cold",))
    data, start = bench.folder / "rows.jsonl", bench.folder / "start"
    make_rows(data, "dpo", case.rows, case.lengths)
    bench.toolkit(case, data, "cold")
    shutil.rmtree(start, ignore_errors=True)
    shutil.copytree(bench.folder / "run" / "adapter", start)
    turns = [(bench.toolkit(case, data, "cold"), bench.toolkit(case, data, "cold", start)) for _ in range(repeat)]
    single, stacked = (statistics.median(turn[side]["loop"] for turn in turns) for side in (0, 1))
    return {"single": single, "stacked": stacked, "ratio": stacked / single}


def table(report: dict[str, Any]) -> str:
    """The report as a Markdown table."""
    lines = ["| work | loop, times faster | predicted | whole command | peak memory |", "|---|---|---|---|---|"]
    for name, case in report["cases"].items():
        for variant in ("cold", "warm", "packed", "features off"):
            if variant in case:
                r = case[variant]
                guess = f"{r['predicted']:.1f}x" if "predicted" in r else ""
                cells = f"{r['loop']:.2f}x | {guess} | {r['whole']:.2f}x | {r['peak']:.2f}x"
                lines.append(f"| {name}, {variant} | {cells} |")
    for name, case in report["cases"].items():
        for variant in ("same order", "features off"):
            if variant in case:
                lines.append(f"\n{name}, {variant}: losses differ by {case[variant]['loss_difference']:.0e}, relative")
    if "first_step" in report:
        f = report["first_step"]
        lines.append(f"\nfirst step after {f['toolkit']:.1f} s, TRL's script {f['trl']:.1f} s ({f['ratio']:.2f}x)")
    if "stacked" in report:
        lines.append(f"\na stacked adapter costs {report['stacked']['ratio']:.2f}x a single one in the loop")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--only", nargs="*", help="parts of case names, and: first step, stacked")
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    settings = [("llama-30m", "float32", None)]
    if args.device == "cuda":
        nf4 = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": "bfloat16"}
        settings = [(shape, "bfloat16", q) for shape in ("qwen2.5-0.5b", "qwen2.5-7b") for q in (None, nf4)]
    for shape, dtype, quantization in settings:
        name = f"{args.device}-{shape}" + ("-nf4" if quantization else "")
        with tempfile.TemporaryDirectory() as scratch:
            folder = Path(scratch)
            bench = Bench(folder, make_model(folder / "model", shape, dtype), dtype, quantization)
            report = run_all(bench, shape, args, args.out / f"{name}.json")
        print(f"\n{name}\n\n{table(report)}", flush=True)


def run_all(bench: Bench, shape: str, args: argparse.Namespace, file: Path) -> dict[str, Any]:
    """Every case that is asked for; the file holds those that are done."""

    def asked(name: str) -> bool:
        return not args.only or any(part in name for part in args.only)

    cases = CPU_CASES if args.device == "cpu" else CUDA_CASES
    report: dict[str, Any] = {"shape": shape, "threads": os.environ.get("OMP_NUM_THREADS"), "cases": {}}

    def keep() -> None:
        file.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")

    for case in cases:
        if asked(case.name):
            report["cases"][case.name] = run_case(bench, case, shape, args.repeat)
            keep()
    if args.device == "cpu" and asked("first step"):
        report["first_step"] = run_first_step(bench.folder, args.repeat)
    if args.device == "cpu" and asked("stacked"):
        report["stacked"] = run_stacked(bench, args.repeat)
    keep()
    return report


if __name__ == "__main__":
    main()
