"""What came out: base and stages measured on held-out rows, from one loaded base with adapters switched.

`RUN/base/evaluation.json` and `RUN/STAGE/evaluation.json` hold one model each: `key` (a digest of all that the numbers
depend on: what has it still is not measured again), `summary` as below, `answers` (`greedy` and `sampled` texts to
every prompt, in order), `rewards` (`chosen` and `rejected` of every pair). `RUN/evaluation.json` puts them together:

    seed, prompts, max_new_tokens           the seed; how many prompts were answered; in how many tokens at most
    held_out   {prompts, answers, pairs}    rows of each kind
    scores     {title: {model: share}}      of the greedy answers
    samples    [{prompt, answers: {model: text}, sampled: {model: text}}]
    models     {model: summary}             base first, then the stages in order

A summary holds, each measured one as `{value, low, high, n}` with a 95 % bootstrap interval over `n` rows:

    reference             what the model is compared with: the model its stage started from; `null` for the base
    perplexity            of the held-out answers, per token
    chosen_likelier       share of pairs whose chosen answer has the larger log-probability
    preference            {beta, accuracy, margin, chosen, rejected, quantiles: {chosen, rejected, margin: {"5%": ...}}}
                          rewards are beta times (log-probability - the reference's), in nats; beta is 1 for SFT
    kl                    KL(model || reference) on the model's own samples, in nats per token; see `kl_divergences`
    greedy, sampled       {tokens, stopped, empty, loops, repetition, distinct_1, distinct_2, distinct_3}
    scores                {title: share}
    lm_eval               {task: {metric: number}}, as the harness names them

What cannot be measured (no pairs, no reference) is `null`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from accelerate import PartialState

from toolkit.evaluation import generate, harness, heldout, measure
from toolkit.evaluation.heldout import HeldOut
from toolkit.launching import processes
from toolkit.models import adapter, model, sharding
from toolkit.models.switched import Switched
from toolkit.recipe.plan import Hardware, digest, model_dtype, quantization
from toolkit.recipe.sections import Evaluate, Recipe
from toolkit.records.rundir import EVALUATION, RunDirectory, read_json, storage, write_json

BASE, VERSION = "base", 1
GREEDY, SAMPLED = "greedy", "sampled"


@dataclass(frozen=True)
class Contender:
    """A model to be measured: the base with an adapter, or without one."""

    name: str
    adapter: Path | None
    start: Path | None
    """The adapter of its reference, the model that its stage started from; `None` for the base."""
    reference: str | None
    """The reference's name; the base itself has none."""
    beta: float


def evaluate(
    recipe: Recipe,
    hardware: Hardware,
    tokenizer: Any,
    run: RunDirectory,
    contenders: Sequence[Contender],
    *,
    limit: int | None = None,
) -> dict[str, Any]:
    """Measure the contenders, those excepted whose stored results still hold, and put the results together.

    Every process does its share; of a base that is too large for each of them, the main process measures alone.

    Args:
        limit: at most this many rows of each held-out source.

    Returns:
        What stands in `evaluation.json`, on every process.

    Raises:
        DataError, ModelError: as `heldout.read` and `harness.check`.
    """
    assert recipe.evaluate is not None
    harness.check(recipe)
    held = heldout.read(recipe, hardware, tokenizer, limit)
    main = PartialState().is_main_process
    # one decision for all, whatever a shared disk shows to each
    keys, records = processes.from_main(_stored(recipe, hardware, run, held, contenders) if main else None)
    missing = [c for c in contenders if records[c.name].get("key") != keys[c.name]]
    if missing and (main or not sharding.is_sharded()):
        adapters = [path for c in missing for path in (c.start, c.adapter) if path is not None]
        meter = _Meter(recipe, tokenizer, held, Switched(recipe, hardware, adapters))
        for contender in missing:
            records[contender.name] = {"key": keys[contender.name], **meter.record(contender)}
            if main:
                _store(run, contender, records[contender.name])
    return _together(recipe, held, processes.from_main(records))


def contenders_of(recipe: Recipe, run: RunDirectory, starts: dict[str, Path | None]) -> list[Contender]:
    """The base, and the stages named in `starts`, each with the adapter that it started from."""
    found = [Contender(BASE, None, None, None, 1.0)]
    for stage, path in starts.items():
        index = next(i for i, s in enumerate(recipe.stages) if s.name == stage)
        settings = recipe.stages[index]
        before = recipe.stages[index - 1].name if index else BASE
        beta = float(settings.trainer.get("beta", 0.1)) if settings.type == "dpo" else 1.0
        found.append(Contender(stage, run.adapter(stage), path, settings.from_ or before, beta))
    return found


def check(recipe: Recipe, hardware: Hardware, tokenizer: Any) -> None:
    """Read the held-out rows and look for tasks, so that what is wrong with them is said before anything is trained."""
    heldout.read(recipe, hardware, tokenizer)
    harness.check(recipe)


def table(evaluation: dict[str, Any]) -> str:
    """The closing table, and the samples with the answers below each other."""
    models, samples = evaluation["models"], evaluation["samples"]
    columns = _columns(evaluation)
    width = max(len(name) for name in models)
    held = evaluation["held_out"]
    lines = [
        f"{held['prompts']} held-out prompts, greedy answers; {held['answers']} answers, {held['pairs']} pairs; "
        f"95% intervals",
        "",
        " " * width + "".join(f"  {title:>{_wide(title, cells)}}" for title, cells in columns.items()),
    ]
    for i, name in enumerate(models):
        lines.append(f"{name:<{width}}" + "".join(f"  {c[i]:>{_wide(t, c)}}" for t, c in columns.items()))
    for sample in samples:
        lines += ["", f"> {sample['prompt']}"]
        lines += [f"  {name:<{width}}  {' '.join(sample['answers'][name].split())}" for name in models]
    return "\n".join(lines)


class _Meter:
    """The held-out rows, and the models to hold against them; log-probabilities of pairs are computed once a model."""

    def __init__(self, recipe: Recipe, tokenizer: Any, held: HeldOut, models: Switched):
        assert recipe.evaluate is not None
        self.settings: Evaluate = recipe.evaluate
        self.seed, self.tokenizer, self.held, self.models = recipe.seed, tokenizer, held, models
        self.known: dict[Path | None, tuple[list[float], list[float]]] = {}
        self.divided = not sharding.is_sharded()

    def record(self, contender: Contender) -> dict[str, Any]:
        """`summary`, `answers` and `rewards` of one model."""
        with self.models.use(contender.adapter) as loaded:
            greedy = self._answers(loaded, None)
            sampled = self._answers(loaded, self.seed)
            texts = {GREEDY: [a.text for a in greedy], SAMPLED: [a.text for a in sampled]}
            preference, rewards = self._preference(contender)
            summary = {
                "reference": contender.reference,
                "perplexity": self._perplexity(loaded),
                "chosen_likelier": self._chosen_likelier(contender),
                "preference": preference,
                "kl": self._kl(loaded, contender, sampled),
                GREEDY: measure.degeneration(greedy, self.seed),
                SAMPLED: measure.degeneration(sampled, self.seed),
                "scores": self._scores(texts[GREEDY]),
                "lm_eval": self._lm_eval(loaded),
            }
        return {"summary": summary, "answers": texts, "rewards": rewards}

    def _answers(self, loaded: Any, seed: int | None) -> list[measure.Answer]:
        limits = generate.Limits(self.settings.max_new_tokens, self.settings.batch_size)
        seeds = None if seed is None else [seed * 1_000_003 + i for i in range(len(self.held.prompts))]
        return generate.answers(loaded, self.tokenizer, self.held.prompts, limits, seeds, divided=self.divided)

    def _lm_eval(self, loaded: Any) -> dict[str, dict[str, float]] | None:
        """By the main process alone: the harness divides nothing of a model that it is given."""
        main = PartialState().is_main_process
        return harness.results(self.settings, loaded, self.tokenizer, self.seed) if main else None

    def _scores(self, texts: list[str]) -> dict[str, Any]:
        counted = {}
        for title, score in self.settings.scores.items():
            how, what = score.rule
            counted[title] = measure.mean(measure.hits(self.held.rows, texts, how=how, what=what), self.seed)
        return counted

    def _perplexity(self, loaded: Any) -> measure.Interval | None:
        answers = self.held.answers
        if not answers:
            return None
        sums = self._logps(loaded, answers)
        tokens = [sum(label != -100 for label in labels[1:]) for _, labels in answers]
        return measure.perplexity([-s for s in sums], tokens, self.seed)

    def _chosen_likelier(self, contender: Contender) -> measure.Interval | None:
        if not self.held.pairs:
            return None
        chosen, rejected = self._pair_logps(contender.adapter)
        return measure.mean([float(a > b) for a, b in zip(chosen, rejected, strict=True)], self.seed)

    def _preference(self, contender: Contender) -> tuple[dict[str, Any] | None, dict[str, list[float]] | None]:
        if contender.reference is None or not self.held.pairs:
            return None, None
        policy, against = self._pair_logps(contender.adapter), self._pair_logps(contender.start)
        chosen, rejected = (
            [contender.beta * (a - b) for a, b in zip(*side, strict=True)] for side in zip(policy, against, strict=True)
        )
        margin = [a - b for a, b in zip(chosen, rejected, strict=True)]
        values = {"chosen": chosen, "rejected": rejected, "margin": margin}
        summary = {"beta": contender.beta, "accuracy": measure.mean([float(m > 0) for m in margin], self.seed)}
        summary |= {name: measure.mean(value, self.seed) for name, value in values.items()}
        summary["quantiles"] = {name: measure.quantiles(value) for name, value in values.items()}
        return summary, {"chosen": chosen, "rejected": rejected}

    def _pair_logps(self, path: Path | None) -> tuple[list[float], list[float]]:
        if path not in self.known:
            rows = []
            for side in ("chosen_ids", "rejected_ids"):
                for pair in self.held.pairs:
                    labels = [-100] * len(pair["prompt_ids"]) + pair[side]
                    cut = self.held.max_length
                    rows.append(((pair["prompt_ids"] + pair[side])[:cut], labels[:cut]))
            with self.models.use(path) as loaded:
                sums = self._logps(loaded, rows)
            self.known[path] = sums[: len(sums) // 2], sums[len(sums) // 2 :]
        return self.known[path]

    def _logps(self, loaded: Any, rows: list[tuple[list[int], list[int]]]) -> list[float]:
        pad = self.tokenizer.pad_token_id
        return generate.logps(loaded, rows, self.settings.batch_size, pad, divided=self.divided)

    def _kl(self, loaded: Any, contender: Contender, sampled: list[measure.Answer]) -> measure.Interval | None:
        if contender.reference is None or not sampled:
            return None
        said = [(prompt, a.continuation) for prompt, a in zip(self.held.prompts, sampled, strict=True)]
        sums = generate.kl_divergences(
            loaded,
            lambda: self.models.use(contender.start),
            said,
            self.settings.batch_size,
            self.tokenizer.pad_token_id,
            divided=self.divided,
        )
        return measure.ratio(sums, [len(continuation) for _, continuation in said], self.seed)


def _stored(
    recipe: Recipe, hardware: Hardware, run: RunDirectory, held: HeldOut, contenders: Sequence[Contender]
) -> tuple[dict[str, str], dict[str, Any]]:
    """By name: the key that results would have, and the results that are there; `{}` where there are none."""
    base = model.base_identity(recipe)
    keys = {c.name: _key(recipe, hardware, base, held, c) for c in contenders}
    return keys, {name: read_json(run.folder(name) / EVALUATION) or {} for name in keys}


def _store(run: RunDirectory, contender: Contender, record: dict[str, Any]) -> None:
    with storage(run.path):
        run.folder(contender.name).mkdir(exist_ok=True)
        write_json(run.folder(contender.name) / EVALUATION, record)


def _key(recipe: Recipe, hardware: Hardware, base: dict[str, str], held: HeldOut, contender: Contender) -> str:
    assert recipe.evaluate is not None
    return digest(
        {
            "version": [VERSION, version("torch"), version("transformers"), version("peft")],
            "base": base,
            "dtype": model_dtype(recipe, hardware),
            "quantization": quantization(recipe),
            "attn_implementation": recipe.model.attn_implementation,
            "adapters": [path and adapter.adapter_digest(path) for path in (contender.adapter, contender.start)],
            "reference": contender.reference,
            "beta": contender.beta,
            "held_out": held.digest,
            "settings": recipe.evaluate.model_dump(exclude={"data", "samples", "batch_size", "include_path"}),
            "seed": recipe.seed,
        }
        | harness.identity(recipe.evaluate)
    )


def _together(recipe: Recipe, held: HeldOut, records: dict[str, Any]) -> dict[str, Any]:
    assert recipe.evaluate is not None
    shown = range(min(recipe.evaluate.samples, len(held.prompts)))
    summaries = {name: record["summary"] for name, record in records.items()}
    said = {name: record["answers"] for name, record in records.items()}
    return {
        "seed": recipe.seed,
        "prompts": len(held.prompts),
        "max_new_tokens": recipe.evaluate.max_new_tokens,
        "held_out": {"prompts": len(held.prompts), "answers": len(held.answers), "pairs": len(held.pairs)},
        "scores": {
            title: {name: summary["scores"][title]["value"] for name, summary in summaries.items()}
            for title in recipe.evaluate.scores
        },
        "samples": [
            {
                "prompt": held.texts[i],
                "answers": {name: texts[GREEDY][i] for name, texts in said.items()},
                "sampled": {name: texts[SAMPLED][i] for name, texts in said.items()},
            }
            for i in shown
        ],
        "models": summaries,
    }


def _columns(evaluation: dict[str, Any]) -> dict[str, list[str]]:
    """Title -> a cell for each model; columns in which nothing was measured are left out."""
    summaries = list(evaluation["models"].values())
    columns = {title: [_share(s["scores"][title]) for s in summaries] for title in evaluation["scores"]}
    columns["perplexity"] = [_number(s["perplexity"]) for s in summaries]
    columns["prefers chosen"] = [_share((s["preference"] or {}).get("accuracy")) for s in summaries]
    columns["KL/token"] = [_number(s["kl"]) for s in summaries]
    columns["tokens"] = [_number(s[GREEDY]["tokens"]) for s in summaries]
    columns["ends"] = [f"{s[GREEDY]['stopped']['value']:.0%}" for s in summaries]
    columns["loops"] = [f"{s[GREEDY]['loops']['value']:.0%}" for s in summaries]
    return {title: cells for title, cells in columns.items() if set(cells) != {""}}


def _share(found: Any) -> str:
    return f"{found['value']:.1%} ({found['low']:.0%}-{found['high']:.0%})".replace("%-", "-") if found else ""


def _number(found: Any) -> str:
    return f"{found['value']:.3g}" if found else ""


def _wide(title: str, cells: list[str]) -> int:
    return max(map(len, (title, *cells)))
