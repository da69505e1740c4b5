"""What a stage writes while it trains: `metrics.jsonl`, and live progress or plain lines."""

import json
import math
import sys
import time
from pathlib import Path
from typing import Any

from accelerate import PartialState
from transformers import TrainerCallback

from toolkit.records.history import read_metrics
from toolkit.records.rundir import write_text

CLOSING = "train_runtime"  # in the last line that a trainer logs, also when a signal ends it
SHOWN = {
    "loss": "loss",
    "eval_loss": "eval loss",
    "rewards/margins": "margin",
    "rewards/accuracies": "accuracy",
    "eval_rewards/margins": "eval margin",
    "eval_rewards/accuracies": "eval accuracy",
    "eval_guard/kl": "KL",
    "mean_token_accuracy": "token accuracy",
}


class Metrics(TrainerCallback):
    """One JSON object per log, under TRL's own names; numbers as numbers, a value that is not finite as `null`."""

    def __init__(self, file: Path):
        self.file = file

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Start the file, or on resuming keep the lines up to the checkpoint: later ones are trained again."""
        if not state.is_world_process_zero:
            return
        lines = read_metrics(self.file) if state.global_step else []
        kept = [line for line in lines if line["step"] <= state.global_step and CLOSING not in line]
        write_text(self.file, "".join(json.dumps(line) + "\n" for line in kept))

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **_: Any) -> None:
        if not state.is_world_process_zero or not logs:
            return
        line = {"step": state.global_step} | {key: _number(value) for key, value in logs.items()}
        with self.file.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(line, allow_nan=False) + "\n")


class Progress(TrainerCallback):
    """Loss, margin, accuracy, tokens/s and remaining time: a live bar on a terminal, a line per log elsewhere."""

    def __init__(self, stage: str):
        self.stage = stage
        self.bar: Any = None
        self.task: Any = None
        self.shown: dict[str, str] = {}
        self.started = (0, 0.0)
        self.tokens = (0.0, 0.0)

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.started = (state.global_step, time.monotonic())
        self.tokens = (0.0, time.monotonic())
        if state.is_world_process_zero and sys.stdout.isatty():
            from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
            from rich.progress import Progress as Bar

            columns = (TextColumn("{task.description}"), BarColumn(24), MofNCompleteColumn(), TimeRemainingColumn())
            self.bar = Bar(*columns, TextColumn("{task.fields[shown]}"))
            self.task = self.bar.add_task(self.stage, total=state.max_steps, completed=state.global_step, shown="")
            self.bar.start()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self.bar is not None:
            self.bar.update(self.task, completed=state.global_step)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **_: Any) -> None:
        if not state.is_world_process_zero or not logs or CLOSING in logs:
            return
        shown = {name: f"{logs[key]:.4g}" for key, name in SHOWN.items() if isinstance(logs.get(key), float)}
        if "num_tokens" in logs and "loss" in logs:
            now = time.monotonic()
            rate = (logs["num_tokens"] - self.tokens[0]) / max(now - self.tokens[1], 1e-9)
            shown["tokens/s"] = f"{rate:,.0f}"
            self.tokens = (logs["num_tokens"], now)
        self.shown |= shown
        if self.bar is not None:
            self.bar.update(self.task, shown="  ".join(f"{name} {value}" for name, value in self.shown.items()))
        else:
            texts = "  ".join(f"{name} {value}" for name, value in shown.items())
            print(f"  {self.stage} {state.global_step}/{state.max_steps}  {texts}{self._remaining(state)}", flush=True)

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.close()

    def close(self) -> None:
        """Leave the terminal as it was, also when training raised."""
        if self.bar is not None:
            self.bar.stop()
            self.bar = None

    def _remaining(self, state: Any) -> str:
        step, since = self.started
        done = state.global_step - step
        if not done or state.global_step >= state.max_steps:
            return ""
        seconds = (time.monotonic() - since) / done * (state.max_steps - state.global_step)
        return f"  {seconds // 60:.0f}:{seconds % 60:02.0f} left"


def say(text: str) -> None:
    """Print a line, from the main process only."""
    if PartialState().is_main_process:
        print(text, flush=True)


def _number(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value
