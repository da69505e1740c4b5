"""The memory estimate against real trainings on this machine's CPU.

    python benchmarks/memory.py [--only NAME ...] [--out FOLDER] [--allocator fixed|default]

Each setting is a process of its own. It first trains a tiny model, so that every library is loaded and warm; what
counts is the peak of resident memory (`VmHWM`, reset through `/proc/self/clear_refs`) beyond that point, over the stage
and over the training loop alone. With `--allocator fixed`, blocks over 128 kB go back to the system when they are freed
(`MALLOC_MMAP_THRESHOLD_`), so that tensors are measured rather than what glibc keeps for later;
`default` is glibc's own.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import yaml
from workloads import LONG_PROMPTS, SHAPES, Lengths, make_model, make_rows

HERE = Path(__file__).parent
QUICKSTART = HERE.parent / "recipes" / "quickstart"
SHAPES["llama-134m"] = {"model_type": "llama", "hidden_size": 768, "intermediate_size": 2048, "num_hidden_layers": 12,
                        "num_attention_heads": 12, "num_key_value_heads": 4, "tie_word_embeddings": False}  # fmt: skip
SFT_ROWS = Lengths((100, 120), (110, 136))
STEPS = 2


@dataclass(frozen=True)
class Setting:
    """One training."""

    kind: str
    shape: str
    dtype: str
    batch: int
    checkpointing: bool
    bits: int | None = None
    sharing: bool = True

    def __str__(self) -> str:
        extra = (", checkpointing" if self.checkpointing else "") + ("" if self.sharing else ", plain TRL path")
        held = {4: "nf4", 8: "int8", None: self.dtype}[self.bits]
        return f"{self.kind} {self.shape} {held} batch {self.batch}{extra}"


SETTINGS = (
    Setting("sft", "llama-30m", "float32", 8, False),
    Setting("sft", "llama-30m", "float32", 8, True),
    Setting("sft", "llama-30m", "float32", 2, False),
    Setting("sft", "llama-30m", "bfloat16", 8, False),
    Setting("sft", "llama-30m", "bfloat16", 8, True),
    Setting("dpo", "llama-30m", "float32", 4, False),
    Setting("dpo", "llama-30m", "float32", 4, True),
    Setting("dpo", "llama-30m", "bfloat16", 4, False),
    Setting("dpo", "llama-30m", "float32", 4, False, sharing=False),
    Setting("sft", "llama-134m", "float32", 4, False),
    Setting("sft", "llama-134m", "bfloat16", 4, True),
    Setting("dpo", "llama-134m", "float32", 2, True),
    Setting("sft", "llama-134m", "bfloat16", 4, False, bits=4),
    Setting("sft", "llama-134m", "bfloat16", 4, True, bits=4),
    Setting("sft", "llama-134m", "bfloat16", 4, False, bits=8),
)


def recipe(setting: Setting, folder: Path) -> Path:
    """Write the setting's recipe, its model and its rows."""
    base = make_model(folder / "model", setting.shape, setting.dtype)
    lengths = SFT_ROWS if setting.kind == "sft" else LONG_PROMPTS
    make_rows(folder / "rows.jsonl", setting.kind, STEPS * setting.batch, lengths)
    content = _recipe(setting, base, folder / "rows.jsonl")
    if not setting.sharing:
        content["stages"][0] |= {"prefix_sharing": False, "reference": "online"}
    file = folder / "recipe.yaml"
    file.write_text(yaml.safe_dump(content), encoding="utf-8")
    return file


def _recipe(setting: Setting, base: Path, rows: Path) -> dict[str, Any]:
    trainer = {
        "per_device_train_batch_size": setting.batch,
        "gradient_checkpointing": setting.checkpointing,
        "save_strategy": "no",
    }
    content = {
        "model": {"name_or_path": str(base), "dtype": setting.dtype},
        "lora": {"r": 16, "lora_alpha": 32},
        "stages": [{"type": setting.kind, "data": str(rows), "trainer": trainer}],
    }
    return content | ({"quantization": {f"load_in_{setting.bits}bit": True}} if setting.bits else {})


# --- in a process of its own ---------------------------------------------------------------------------------------


def one(setting: Setting, folder: Path) -> dict[str, Any]:
    """Train, measure, and only then estimate."""
    import gc

    import torch

    from toolkit import load_recipe, run
    from toolkit.models import head, model
    from toolkit.records import rundir
    from toolkit.resources import estimate
    from toolkit.training import dpo, prepare, stage, trainer

    warm = _recipe(replace(setting, dtype="float32", batch=2), QUICKSTART / "base", folder / "warm.jsonl")
    make_rows(folder / "warm.jsonl", setting.kind, 4, Lengths((4, 6), (4, 6)))
    (folder / "warm.yaml").write_text(yaml.safe_dump(warm), encoding="utf-8")
    run.train(folder / "warm.yaml", output=folder / "warm")

    loaded = load_recipe(recipe(setting, folder))
    directory = rundir.RunDirectory(folder / "run")
    directory.claim(loaded)
    (job,) = prepare.prepare(loaded, directory).jobs
    job.folder.mkdir(parents=True)
    gc.collect()
    torch.empty(0)
    before = _status("VmRSS")
    _reset_peak()
    start = stage.start_logps(job) if setting.kind == "dpo" else None
    built = stage.build(job, model.load_base(loaded, job.hardware))
    with head.small_tiles("cpu"):
        if start is not None:
            dpo.share_prompts(job, built)
            dpo.prove(job, built, start)
            dpo.take_reference(job, built)
        prepared = _status("VmHWM") - before
        _reset_peak()
        trainer.fit(built, job)
    loop = _status("VmHWM") - before
    found = estimate.estimate(job, model.empty_base(loaded))
    return {
        "setting": asdict(setting),
        "measured": {"stage": max(prepared, loop), "training": loop},
        "estimated": {"stage": found.peak, "training": found.phases["training step"]},
        "items": found.items,
        "phases": found.phases,
        "batch": found.batch,
    }


def _status(name: str) -> int:
    """Bytes from `/proc/self/status`."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name + ":"))
    return int(line.split()[1]) * 1024


def _reset_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")


# --- the whole -------------------------------------------------------------------------------------------------------


def measured(index: int, allocator: str) -> dict[str, Any]:
    """Run one setting in its own process."""
    with tempfile.TemporaryDirectory() as scratch:
        environment = os.environ | {"TOOLKIT_CACHE": f"{scratch}/cache", "TOKENIZERS_PARALLELISM": "false"}
        if allocator == "fixed":
            environment |= {"MALLOC_MMAP_THRESHOLD_": "131072"}
        command = [sys.executable, str(Path(__file__)), "--one", str(index), scratch]
        done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    if done.returncode:
        sys.exit(f"{SETTINGS[index]} failed:\n{done.stderr[-3000:]}")
    line = next(line for line in done.stdout.splitlines() if line.startswith("RESULT "))
    return dict(json.loads(line.removeprefix("RESULT ")))


def error(result: dict[str, Any], what: str) -> float:
    """Estimate over measurement, less one."""
    return float(result["estimated"][what] / result["measured"][what] - 1)


def table(results: list[dict[str, Any]]) -> str:
    """Megabytes (1e6 bytes), and the error of each; then the worst."""
    lines = ["| setting | training: measured | estimated | error | stage: measured | estimated | error |"]
    lines.append("|---|---|---|---|---|---|---|")
    for result in results:
        cells = [str(Setting(**result["setting"]))]
        for what in ("training", "stage"):
            cells += [f"{result[side][what] / 1e6:,.0f}" for side in ("measured", "estimated")]
            cells.append(f"{error(result, what):+.0%}")
        lines.append(f"| {' | '.join(cells)} |")
    for what in ("training", "stage"):
        worst = max(results, key=lambda r: abs(error(r, what)))
        lines.append(f"\n{what}, worst: {error(worst, what):+.0%} ({Setting(**worst['setting'])})")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", help="parts of the settings' names")
    parser.add_argument("--out", type=Path, default=HERE / "results")
    parser.add_argument("--allocator", choices=("fixed", "default"), default="fixed")
    parser.add_argument("--one", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        print("RESULT " + json.dumps(one(SETTINGS[int(args.one[0])], Path(args.one[1]))), flush=True)
        return
    results = []
    for i, setting in enumerate(SETTINGS):
        if not args.only or any(part in str(setting) for part in args.only):
            results.append(measured(i, args.allocator))
            print(f"  {table(results[-1:]).splitlines()[2]}", file=sys.stderr, flush=True)
    args.out.mkdir(parents=True, exist_ok=True)
    file = args.out / f"memory-cpu-{args.allocator}.json"
    file.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    print(table(results))


if __name__ == "__main__":
    main()
