"""The other side: the same stage in a plain TRL script. `python benchmarks/plain_trl.py SETTINGS.json`."""

import json
import sys
from pathlib import Path
from typing import Any

import torch
from datasets import load_dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, TrainerCallback
from transformers.trainer_callback import PrinterCallback
from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer


class Steps(TrainerCallback):
    """One line per step, as the toolkit prints them."""

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        if logs and "loss" in logs:
            print(f"step {state.global_step} {logs['loss']}", flush=True)


def main(settings: dict[str, Any]) -> None:
    load: dict[str, Any] = {"dtype": getattr(torch, settings["dtype"])}
    if settings["quantization"]:
        load |= {
            "quantization_config": BitsAndBytesConfig(**settings["quantization"]),
            "device_map": {"": 0 if torch.cuda.is_available() else "cpu"},
        }
    if settings["attn_implementation"]:
        load["attn_implementation"] = settings["attn_implementation"]
    model = AutoModelForCausalLM.from_pretrained(settings["model"], **load)
    tokenizer = AutoTokenizer.from_pretrained(settings["model"])
    rows = load_dataset("json", data_files=settings["data"], split="train")
    config, trainer_class = (DPOConfig, DPOTrainer) if settings["kind"] == "dpo" else (SFTConfig, SFTTrainer)
    args = config(output_dir=settings["output"], disable_tqdm=True, report_to="none", **settings["trainer"])
    trainer = trainer_class(
        model,
        args=args,
        train_dataset=rows,
        processing_class=tokenizer,
        peft_config=LoraConfig(task_type="CAUSAL_LM", **settings["lora"]),
        callbacks=[Steps()],
    )
    trainer.remove_callback(PrinterCallback)
    result = trainer.train()
    logged = [line for line in trainer.state.log_history if "loss" in line]
    report = {"loop": result.metrics["train_runtime"], "losses": [line["loss"] for line in logged]}
    report["tokens"] = logged[-1]["num_tokens"]
    if torch.cuda.is_available():
        report["cuda_peak"] = torch.cuda.max_memory_allocated()
    print("RESULT " + json.dumps(report), flush=True)


if __name__ == "__main__":
    main(json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")))
