"""Peak memory of `toolkit merge` against the size of the model, and against PEFT's `merge_and_unload`.

A random Llama in bfloat16, in several files, and a random adapter on all of its linear layers. Each merge runs in a
process of its own; memory is the process's largest resident set, less what it held after its imports.

    python benchmarks/merge.py [--hidden 1024] [--layers 12] [--shard-mb 64]
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

MB = 1024**2
START = """
import re, sys, torch, transformers, toolkit.publishing.merge
from pathlib import Path
from peft import PeftModel
def kilobytes(name):  # getrusage's figure would begin with that of the parent
    return int(re.search(name + r":\\s+(\\d+)", Path("/proc/self/status").read_text())[1])
before = kilobytes("VmRSS")
"""
END = """
print("peak", (kilobytes("VmHWM") - before) * 1024)
"""
TOOLKIT = """
toolkit.publishing.merge.merge(sys.argv[1], output=sys.argv[2], verify=False, shard=int(sys.argv[3]))
"""
PEFT = """
base = transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1] + "/base", dtype=torch.bfloat16)
model = PeftModel.from_pretrained(base, sys.argv[1] + "/adapter").merge_and_unload()
model.save_pretrained(sys.argv[2], max_shard_size=int(sys.argv[3]))
"""


def make(folder: Path, hidden: int, layers: int, shard: int) -> int:
    """Write base, adapter and record; returns the bytes of the base's weights."""
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaForCausalLM

    from tests.finished import pulled
    from tests.tiny import make_base

    base = make_base(folder / "tiny", hidden_size=hidden, intermediate_size=4 * hidden, num_hidden_layers=layers)
    model = LlamaForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
    model.save_pretrained(folder / "base", max_shard_size=shard)
    for file in base.glob("*token*"):
        file.rename(folder / "base" / file.name)
    settings = LoraConfig(r=16, target_modules="all-linear", init_lora_weights=False, task_type="CAUSAL_LM")
    get_peft_model(model, settings).save_pretrained(str(folder / "adapter"), save_embedding_layers=False)
    record = json.loads((pulled(folder, folder / "base") / "resolved.json").read_text())
    (folder / "resolved.json").write_text(json.dumps(record | {"dtype": "bfloat16"}))
    return sum(file.stat().st_size for file in (folder / "base").glob("*.safetensors"))


def run(code: str, folder: Path, name: str, shard: int) -> dict[str, Any]:
    began = time.monotonic()
    command = [sys.executable, "-c", START + code + END, str(folder), str(folder / name), str(shard)]
    said = subprocess.run(command, check=True, capture_output=True, text=True, env=os.environ).stdout
    return {"peak_mb": int(said.split("peak ")[1]) / MB, "seconds": time.monotonic() - began}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    for flag, default in (("--hidden", 1024), ("--layers", 12), ("--shard-mb", 64)):
        parser.add_argument(flag, type=int, default=default)
    args = parser.parse_args()
    shard = args.shard_mb * MB
    with tempfile.TemporaryDirectory() as where:
        folder = Path(where)
        size = make(folder, args.hidden, args.layers, shard)
        files = len(list((folder / "base").glob("*.safetensors")))
        found = {"toolkit": run(TOOLKIT, folder, "toolkit-out", shard), "peft": run(PEFT, folder, "peft-out", shard)}
    print(f"base: {size / MB:.0f} MB in {files} files of at most {args.shard_mb} MB")
    for name, result in found.items():
        share = result["peak_mb"] / (size / MB)
        print(f"{name:<8} peak {result['peak_mb']:.0f} MB ({share:.2f}x the model), {result['seconds']:.1f} s")


if __name__ == "__main__":
    main()
