"""One page that says what a run did: curves, answers side by side, data, warnings, recipe, provenance."""

import re
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml

from toolkit.pages import page, settings
from toolkit.pages.pictures import Bars, Drawn, Line, Picture, draw, histogram
from toolkit.records.history import PastStage, Run, drawable, number, read_run, series
from toolkit.records.rundir import storage, write_text
from toolkit.wording import amount

PAGE, PICTURES = "report.html", "report"
STEPS = "optimizer steps"
SAMPLES, FINDINGS = 40, 100  # shown at most
# name, title, unit, and what is drawn: label, TRL's name, colour, style
Panel = tuple[str, str, str, tuple[tuple[str, str, int, int], ...]]
PANELS: tuple[Panel, ...] = (
    ("loss", "Loss", "nats", (("training", "loss", 0, 0), ("held-out", "eval_loss", 1, 1))),
    (
        "margin",
        "Reward margin",
        "nats",
        (("training", "rewards/margins", 0, 0), ("held-out", "eval_rewards/margins", 1, 1)),
    ),
    (
        "accuracy",
        "Reward accuracy",
        "share of pairs",
        (("training", "rewards/accuracies", 0, 0), ("held-out", "eval_rewards/accuracies", 1, 1)),
    ),
    (
        "logps",
        "Log-probabilities of the answers",
        "nats",
        (
            ("chosen", "logps/chosen", 2, 0),
            ("rejected", "logps/rejected", 4, 0),
            ("chosen, held-out", "eval_logps/chosen", 2, 1),
            ("rejected, held-out", "eval_logps/rejected", 4, 1),
        ),
    ),
    (
        "token-accuracy",
        "Token accuracy",
        "share of tokens",
        (("training", "mean_token_accuracy", 0, 0), ("held-out", "eval_mean_token_accuracy", 1, 1)),
    ),
    ("learning-rate", "Learning rate", "", (("", "learning_rate", 3, 0),)),
)
SHARES = ("accuracy", "chosen_likelier", "stopped", "empty", "loops", "repetition")
TITLES = {
    "reference": "compared with",
    "perplexity": "perplexity of held-out answers",
    "chosen_likelier": "chosen answer likelier than rejected",
    "preference.accuracy": "preference accuracy",
    "preference.margin": "reward margin, nats",
    "preference.chosen": "reward of chosen, nats",
    "preference.rejected": "reward of rejected, nats",
    "kl": "KL to the model compared with, nats per token",
    "tokens": "length, tokens",
    "stopped": "ends by itself",
    "empty": "empty",
    "loops": "falls into a loop",
    "repetition": "repeated 4-grams",
}


def write(path: str | Path) -> Path:
    """Write `RUN/report.html`, and its pictures to `RUN/report/`.

    Returns:
        The page.

    Raises:
        RunError: it is no run directory, or cannot be written.
    """
    run = read_run(path)
    drawn = {stage.name: [draw(picture) for picture in pictures(stage)] for stage in run.stages}
    text = html(run, drawn)
    partial, target = run.path / f".{PICTURES}.partial", run.path / PICTURES
    with storage(run.path):
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir()
        for one in (one for several in drawn.values() for one in several):
            (partial / f"{one.picture.name}.png").write_bytes(one.png)
        shutil.rmtree(target, ignore_errors=True)
        partial.rename(target)
        write_text(run.path / PAGE, text)
    return run.path / PAGE


def html(run: Run, drawn: dict[str, list[Drawn]]) -> str:
    """The page, given its pictures by stage."""
    text = ""
    for samples in (SAMPLES, 8, 2, 0):  # answers in a script of many bytes a character may be too much for one page
        text = page.render("report", **_context(run, drawn, samples))
        if len(text.encode()) < page.MAX_BYTES:
            break
    return text


def panels(stages: Sequence[PastStage]) -> list[Panel]:
    """What may be drawn of stages that go by one name."""
    logged = {key for stage in stages for line in stage.lines for key in line}
    kl = tuple(
        ("held-out" if key.startswith("eval") else "training", key, i, i)
        for i, key in enumerate(sorted(key for key in logged if re.search(r"(^|[/_])kl$", key)))
    )
    of_two_answers = any(stage.type == "dpo" for stage in stages)  # where the accuracy of tokens says little
    return [
        panel
        for panel in (*PANELS, ("kl", "KL to the reference", "nats per token", kl))
        if not (of_two_answers and panel[0] == "token-accuracy")
    ]


def pictures(stage: PastStage) -> list[Picture]:
    """What can be drawn of a stage: a panel for everything that was logged, and histograms."""
    prefix = re.sub(r"[^\w.-]", lambda found: f"_{ord(found[0]):x}_", stage.name)
    found = []
    for name, title, unit, keys in panels([stage]):
        lines = [Line(label, series(stage.lines, key), colour, style) for label, key, colour, style in keys]
        lines = [line for line in lines if drawable(line.points)]
        if lines:
            found.append(Picture(f"{prefix}-{name}", f"{stage.name}: {title}", STEPS, unit, lines))
    return found + list(_histograms(stage, prefix))


def _histograms(stage: PastStage, prefix: str) -> Iterator[Picture]:
    lengths = stage.plan.get("token_lengths") or {}
    edges, counts = lengths.get("edges") or [], lengths.get("counts") or {}
    bars = [Bars(title, edges, n, i) for i, (title, n) in enumerate(counts.items()) if len(n) + 1 == len(edges)]
    if bars:
        yield Picture(f"{prefix}-lengths", f"{stage.name}: Length of the training rows", "tokens", "rows", bars)
    rewards = {side: [v for v in map(number, values) if v is not None] for side, values in stage.rewards.items()}
    together = [value for values in rewards.values() for value in values]
    if together:
        low, high = min(together), max(together)
        step = (high - low) / 24 or 1.0
        edges = [low + i * step for i in range(25)]
        bars = [histogram(side, values, edges, 2 + 2 * i) for i, (side, values) in enumerate(rewards.items())]
        yield Picture(f"{prefix}-rewards", f"{stage.name}: Rewards of held-out pairs", "nats", "pairs", bars)


def _context(run: Run, drawn: dict[str, list[Drawn]], samples: int) -> dict[str, Any]:
    models, rows = measures(run.evaluation)
    return {
        "title": run.name,
        "run": run,
        "subtitle": f"{page.short(run.base)}, {', then '.join(stage.name for stage in run.stages) or 'no stage'}",
        "stages": [_stage(stage, drawn.get(stage.name, [])) for stage in run.stages],
        "models": models,
        "measures": rows,
        "samples": _samples(run.evaluation, samples),
        "findings": [_finding(one) for one in run.findings[:FINDINGS]],
        "more_findings": max(len(run.findings) - FINDINGS, 0),
        "recipe": yaml.safe_dump(page.short(settings.nested(run.resolved)), sort_keys=False, allow_unicode=True),
        "provenance": _provenance(run),
    }


def _stage(stage: PastStage, drawn: list[Drawn]) -> dict[str, Any]:
    plan, record = page.short(stage.plan), page.short(stage.record)
    kept, stopped = record.get("kept") or {}, record.get("stopped") or {}
    warnings = [page.short(f"step {one.get('step', '?')}: {one.get('text', one)}") for one in stage.guards]
    if stopped:
        warnings.append(f"training was stopped at step {stopped.get('step', '?')}")
    if kept.get("why"):
        warnings.append(f"kept: {kept['why']}")
    stale = bool(record) and "digest" in plan and record.get("digest") != plan["digest"]
    return {
        "name": stage.name,
        "type": stage.type.upper(),
        "state": "finished with other settings than the recipe has now" if stale else stage.state,
        "policy": plan.get("policy", "unknown"),
        "reference": plan.get("reference"),
        "proof": _proof(record.get("proof") or {}),
        "facts": _facts(stage, plan),
        "cost": _cost(stage),
        "warnings": warnings,
        "pictures": [(one.picture.name, page.element(one)) for one in drawn],
    }


def _proof(proof: dict[str, Any]) -> str:
    found = {name: number(proof.get(name)) for name in ("policy_vs_reference", "reference_vs_start", "first_loss")}
    texts = {
        "policy_vs_reference": "policy equals reference to {:.1e}",
        "reference_vs_start": "reference equals the start model, loaded on its own, to {:.1e} nats per token",
        "first_loss": "first loss {:.6f}",
    }
    return "; ".join(texts[name].format(value) for name, value in found.items() if value is not None)


def _facts(stage: PastStage, plan: dict[str, Any]) -> list[tuple[str, str]]:
    trainer, lora, rows = plan.get("trainer") or {}, plan.get("lora") or {}, plan.get("rows") or {}
    facts = [
        ("rows", rows.get("rows")),
        ("tokens", rows.get("tokens")),
        ("supervised tokens", rows.get("supervised")),
        ("rows truncated", rows.get("truncated") or None),
        *((f"rows dropped: {why}", n) for why, n in (rows.get("dropped") or {}).items()),
        ("held-out rows", (plan.get("eval_rows") or {}).get("rows")),
        ("longest, tokens", max((plan.get("token_lengths") or {}).get("longest", {}).values(), default=None)),
        (STEPS, plan.get("steps")),
        ("learning rate", trainer.get("learning_rate")),
        ("epochs", trainer.get("num_train_epochs")),
        ("beta", trainer.get("beta") if stage.type == "dpo" else None),
        ("LoRA r", lora.get("r")),
        ("LoRA alpha", lora.get("lora_alpha")),
        ("trainable parameters", plan.get("trainable_parameters")),
    ]
    return [(name, page.figure(value)) for name, value in facts if number(value) is not None]


def _cost(stage: PastStage) -> list[tuple[str, str]]:
    """Time, speed and memory, as far as they are known."""
    whole, pass_ = number(stage.record.get("seconds")), number(stage.record.get("reference_seconds"))
    speed, memory = stage.tokens_per_second, stage.peak_memory
    found = [
        ("whole stage", whole and page.duration(whole)),
        ("training loop", stage.seconds and page.duration(stage.seconds)),
        ("reference pass", pass_ and page.duration(pass_)),
        ("tokens per second", speed and f"{speed:,.0f}"),
        ("peak memory", memory and amount(memory)),
    ]
    return [(name, text) for name, text in found if text]


def measures(evaluation: dict[str, Any]) -> tuple[list[str], list[tuple[str, list[str]]]]:
    """The before/after table: models in order, and for each measure its title and a cell for each model."""
    flat = {name: leaves(summary) for name, summary in summaries(evaluation).items()}
    keys = dict.fromkeys(key for found in reversed(flat.values()) for key in found)  # of the last, most is measured
    return list(flat), [(_title(key), [_cell(key, found.get(key)) for found in flat.values()]) for key in keys]


def summaries(evaluation: dict[str, Any]) -> dict[str, Any]:
    """Model -> what was measured of it; only scores in runs of an older version."""
    models = evaluation.get("models")
    if isinstance(models, dict):
        return models
    scores = {title: shares for title, shares in (evaluation.get("scores") or {}).items() if isinstance(shares, dict)}
    names = dict.fromkeys(name for shares in scores.values() for name in shares)
    return {name: {"scores": {title: shares.get(name) for title, shares in scores.items()}} for name in names}


def leaves(summary: Any, at: str = "") -> dict[str, Any]:
    """Measured values by their dotted names: numbers, texts, and intervals `{value, low, high}`."""
    if not isinstance(summary, dict) or "value" in summary:
        return {} if summary is None or isinstance(summary, bool | list) else {at: summary}
    found: dict[str, Any] = {}
    for key, value in summary.items():
        if key not in ("quantiles", "beta", "n"):
            found |= leaves(value, f"{at}.{key}" if at else str(key))
    return found


def _title(key: str) -> str:
    first, _, rest = key.partition(".")
    if first in ("greedy", "sampled"):
        return f"{first} answers: {TITLES.get(rest, rest.replace('_', '-'))}"
    return rest if first == "scores" else TITLES.get(key, key.replace("lm_eval.", ""))


def _cell(key: str, found: Any) -> str:
    if found is None or isinstance(found, str):
        return page.short(found or "")
    interval = found if isinstance(found, dict) else {"value": found}
    share = key.rsplit(".", 1)[-1] in SHARES or key.startswith("scores.")
    value, low, high = (number(interval.get(name)) for name in ("value", "low", "high"))
    if value is None:
        return ""
    form = "{:.1%}" if share else "{:.3g}"
    text = form.format(value)
    return f"{text} ({form.format(low)} to {form.format(high)})" if low is not None and high is not None else text


def _samples(evaluation: dict[str, Any], most: int) -> list[dict[str, Any]]:
    """Prompts with the answers of every model, differences to the model before it marked."""
    found = []
    samples = [sample for sample in evaluation.get("samples") or [] if isinstance(sample, dict)]
    for sample in samples[:most]:
        kinds = []
        for key, title in (("answers", "greedy"), ("sampled", "sampled")):
            said = {str(name): str(text) for name, text in (sample.get(key) or {}).items()}
            befores = [None, *said.values()]
            answers = [(name, page.marked(b, text)) for b, (name, text) in zip(befores, said.items(), strict=False)]
            if answers:
                kinds.append((title, answers))
        found.append({"prompt": str(sample.get("prompt", ""))[: page.LONGEST], "kinds": kinds})
    return found


def _finding(one: dict[str, Any]) -> tuple[str, str]:
    where, text = page.short(str(one.get("where", ""))), page.short(str(one.get("text", "")))
    return str(one.get("level", "note")), f"{where}: {text}" if where else text


def _provenance(run: Run) -> list[tuple[str, str]]:
    resolved = page.short(run.resolved)
    identity = resolved.get("identity") or {}
    found = {"run": run.name, "recipe": identity.get("recipe"), "base": page.short(run.base)}
    found |= {f"base {key}": value for key, value in (resolved.get("base") or {}).items()}
    found |= {"dtype": resolved.get("dtype"), "seed": run.recipe.get("seed")}
    for key in ("quantization", "hardware", "machine", "versions"):
        found |= settings.flat(resolved.get(key) or {}, key if key in ("quantization", "hardware") else "")
    for stage in run.stages:
        trained = page.short(stage.record.get("provenance") or {})
        for key in ("git", "command"):
            found |= settings.flat(trained.get(key), f"{stage.name}: {key}")
        found[f"{stage.name}: settings and data"] = stage.plan.get("digest")
        found[f"{stage.name}: adapter"] = stage.record.get("adapter_digest")
    return [(name, str(value)) for name, value in found.items() if value is not None and value != {}]
