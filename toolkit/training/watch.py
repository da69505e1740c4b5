"""Guards at work: a callback that observes a DPO stage, says what passes its bounds, and ranks checkpoints.

At each evaluation a few held-out prompts are answered, greedily and sampled, with policy and reference, and the KL is
estimated on the sampled ones as `generate.kl_divergences` does; each process does its share. No random number of
training's is drawn, so that training goes on to the same bits. Without `eval_data`, only what TRL logs about training
pairs is watched.
"""

import json
from contextlib import AbstractContextManager
from typing import Any

import torch
from transformers import TrainerCallback
from trl.trainer.utils import use_adapter

from toolkit.evaluation import generate, measure
from toolkit.job import StageJob
from toolkit.launching.processes import from_main
from toolkit.models import sharding
from toolkit.recipe.sections import Guard
from toolkit.records.rundir import write_text
from toolkit.training import guards
from toolkit.training.guards import Said, Seen, Tripped
from toolkit.training.progress import read_metrics, say

FILE = "guards.jsonl"
KL, TOKENS, STOPPED, REPETITION = "eval_guard/kl", "eval_guard/tokens", "eval_guard/stopped", "eval_guard/repetition"
SELECTION = "eval_selection"


class Guards(TrainerCallback):
    """Watches `trainer`, a stage's `DPOTrainer`. What was said stands in `guards.jsonl` of the stage's folder."""

    def __init__(self, job: StageJob, trainer: Any):
        self.job, self.trainer = job, trainer
        self.guard = Guard(**(job.plan.guard or {}))
        self.said: list[dict[str, Any]] = []
        self.reference: Said | None = None
        self.prompts, self.chosen_tokens = _prompts(job, self.guard.prompts)

    @property
    def stopped(self) -> dict[str, Any] | None:
        """The warning that ended training, if one did."""
        return next((one for one in self.said if one["action"] == "stop"), None)

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Start the file, or on resuming keep what was said up to the checkpoint."""
        file = self.job.folder / FILE
        self.said = [one for one in read_metrics(file) if one["step"] <= state.global_step and state.global_step]
        if state.is_world_process_zero:
            write_text(file, "".join(json.dumps(one) + "\n" for one in self.said))

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self.job.plan.keep == "best" and state.global_step >= state.max_steps:
            control.should_evaluate = control.should_save = True  # the last weights are a candidate as well

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **_: Any) -> None:
        if logs and "loss" in logs:
            self._judge(self._seen(state, held_out=False), state, control, held_out=self.job.data.eval is not None)

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: dict[str, Any], **_: Any) -> None:
        answers, kl = self._observe()
        self.trainer.log(
            {KL: kl, TOKENS: answers.tokens, STOPPED: answers.stopped, REPETITION: answers.repetition}
        )  # after TRL's own log of this evaluation, so that there is nothing of TRL's left to be logged along
        accuracy, loss = metrics["eval_rewards/accuracies"], metrics["eval_loss"]
        metrics[SELECTION] = guards.selection(accuracy, loss, kl, self.guard.kl, len(self.trainer.eval_dataset))
        self._judge(self._seen(state, held_out=True, kl=kl, answers=answers), state, control)

    def kept(self, state: Any) -> dict[str, Any]:
        """Which checkpoint `keep: best` chose among which, and why, in one sentence."""
        by_step: dict[int, dict[str, Any]] = {}
        for line in state.log_history:
            names = {"eval_rewards/accuracies": "accuracy", "eval_loss": "loss", KL: "kl"}
            found = {name: line[key] for key, name in names.items() if key in line}
            if found:
                by_step[line["step"]] = by_step.get(line["step"], {}) | found
        candidates = [{"step": step, **found} for step, found in sorted(by_step.items())]
        chosen = next(one for one in candidates if one["step"] == state.best_global_step)
        within = [one for one in candidates if 0 < one["kl"] <= self.guard.kl]
        if within:
            why = (
                f"best held-out preference accuracy {chosen['accuracy']:.3g} (loss {chosen['loss']:.3g}) among the "
                f"{len(within)} of {len(candidates)} checkpoints within the KL bound of {self.guard.kl:g} nats per "
                f"token; its KL is {chosen['kl']:.3g}"
            )
        else:
            why = (
                f"none of {len(candidates)} checkpoints is within the KL bound of {self.guard.kl:g} nats per token; "
                f"this is the nearest, at {chosen['kl']:.3g}; lower the learning rate or evaluate more often"
            )
        return {"step": chosen["step"], "why": f"step {chosen['step']}: {why}", "candidates": candidates}

    def _seen(self, state: Any, held_out: bool, kl: float | None = None, answers: Said | None = None) -> Seen:
        prefix = "eval_" if held_out else ""
        plan = self.job.plan
        beta = float(plan.trainer["beta"])
        lines = [line for line in state.log_history if f"{prefix}rewards/margins" in line]
        from_ln2 = plan.trainer.get("loss_type", ["sigmoid"]) in (["sigmoid"], "sigmoid")
        return Seen(
            step=state.global_step,
            max_steps=state.max_steps,
            beta=beta,
            learning_rate=float(plan.trainer["learning_rate"]),
            chosen_tokens=self.chosen_tokens["eval" if held_out else "train"],
            chosen_logratio=lines[-1][f"{prefix}rewards/chosen"] / beta if lines else None,
            held_out=held_out,
            margins=[(li["step"], li[f"{prefix}rewards/accuracies"], li[f"{prefix}rewards/margins"]) for li in lines],
            losses=[(li["step"], li["loss"]) for li in state.log_history if "loss" in li] if from_ln2 else [],
            identical_pairs=self.chosen_tokens["identical"],
            kl=kl,
            answers=answers,
            reference=self.reference,
        )

    def _judge(self, seen: Seen, state: Any, control: Any, held_out: bool = False) -> None:
        """Say what is new; stop where the recipe asks for it. Where there are held-out pairs, they speak alone."""
        if self.guard.action == "off":
            return
        found = [one for one in guards.tripped(seen, self.guard) if not held_out or one.guard == "flat"]
        agreed: list[Tripped] = from_main(found)
        known = {one["guard"] for one in self.said}
        for one in agreed:
            if one.guard not in known:
                self._say(one, state)
        if self.guard.action == "stop" and agreed:
            control.should_training_stop = True

    def _say(self, one: Tripped, state: Any) -> None:
        self.said.append(one.as_dict())
        stops = "; training stops here" if one.action == "stop" else ""
        say(f"  guard: {self.job.plan.name}, step {one.step}: {one.text}{stops}")
        if state.is_world_process_zero:
            with (self.job.folder / FILE).open("a", encoding="utf-8") as stream:
                stream.write(json.dumps(one.as_dict()) + "\n")

    def _observe(self) -> tuple[Said, float]:
        """The policy's answers and its KL in nats per token, on every process."""
        model = self.trainer.accelerator.unwrap_model(self.trainer.model)
        was_training = model.training
        model.eval()
        with self.trainer.accelerator.autocast():
            if self.reference is None:
                with self._as_reference(model):
                    self.reference = _average(self._answers(model))
            answers = self._answers(model)
            sampled = [(p, a.continuation) for p, a in zip(self.prompts, answers[len(self.prompts) :], strict=True)]
            sums = generate.kl_divergences(
                model,
                lambda: self._as_reference(model),
                sampled,
                self._batch_size,
                self.job.tokenizer.pad_token_id,
                divided=self._divided,
            )
        model.train(was_training)
        found = _average(answers), sum(sums) / sum(len(said) for _, said in sampled), self.reference
        now, kl, self.reference = from_main(found)
        return now, kl

    def _answers(self, model: Any) -> list[measure.Answer]:
        """To every prompt a greedy answer, then to every prompt a sampled one."""
        seeds = [None] * len(self.prompts) + [self.job.recipe.seed * 1_000_003 + i for i in range(len(self.prompts))]
        limits = generate.Limits(self.guard.max_new_tokens, self._batch_size)
        return generate.answers(model, self.job.tokenizer, self.prompts * 2, limits, seeds, divided=self._divided)

    @property
    def _divided(self) -> bool:
        return not sharding.is_sharded()  # no process has the whole of a sharded base: there all compute the same

    @property
    def _batch_size(self) -> int:
        return 2 * int(self.trainer.args.per_device_eval_batch_size)

    def _as_reference(self, model: Any) -> AbstractContextManager[Any]:
        """As TRL takes the reference: a frozen copy named `ref`, or the stage's own adapter disabled."""
        return use_adapter(model, "ref" if "ref" in model.peft_config else None)


def _average(answers: list[measure.Answer]) -> Said:
    n = len(answers)
    return Said(
        tokens=sum(len(a.ids) for a in answers) / n,
        stopped=sum(a.stopped for a in answers) / n,
        repetition=sum(measure.repetition(a.ids) for a in answers) / n,
    )


def _prompts(job: StageJob, wanted: int) -> tuple[list[list[int]], dict[str, float]]:
    """Held-out prompts, evenly spaced; mean lengths of chosen answers, and the share of pairs with one answer twice."""
    about: dict[str, float] = {}
    for name, rows in (("train", job.data.train), ("eval", job.data.eval)):
        lengths = torch.tensor([len(ids) for ids in rows["chosen_ids"]]) if rows is not None else torch.ones(1)
        about[name] = float(lengths.float().mean())
    same = [a == b for a, b in zip(job.data.train["chosen_ids"], job.data.train["rejected_ids"], strict=True)]
    about["identical"] = sum(same) / len(same)
    if job.data.eval is None:
        return [], about
    count = min(wanted, len(job.data.eval))
    return [job.data.eval[i * len(job.data.eval) // count]["prompt_ids"] for i in range(count)], about
