"""What is measured is what plain transformers and PEFT say, and what a closed form says."""

import math
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

import toolkit
from tests.conftest import WORDS, answers, messages, pairs, write_jsonl
from tests.tiny import make_base
from toolkit.cli import main
from toolkit.evaluation import generate, measure
from toolkit.records.rundir import RunDirectory
from toolkit.run import evaluate_run


@pytest.fixture
def with_evaluation(recipe: dict[str, Any], tmp_path: Path) -> dict[str, Any]:
    rows = [{"prompt": f"what is {word}", "answer": word[0]} for word in WORDS[:9]]
    recipe["stages"][1]["name"] = "dpo-0.1"
    recipe["evaluate"] = {
        "data": str(write_jsonl(tmp_path / "held.jsonl", rows)),
        "max_new_tokens": 8,
        "batch_size": 4,
        "scores": {"answer": {"column": "answer"}, "short": {"regex": "^.{0,12}$"}},
    }
    return recipe


def test_the_table_is_what_plain_transformers_says(
    with_evaluation: dict[str, Any], write: Any, base: Path, tmp_path: Path
) -> None:
    result = toolkit.train(write(with_evaluation), output=tmp_path / "run")
    assert result.evaluation is not None
    model = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), str(result.adapter)
    )
    tokenizer = AutoTokenizer.from_pretrained(base)
    said = []
    for word in WORDS[:9]:
        ids = tokenizer(f"what is {word}", return_tensors="pt")
        out = model.generate(**ids, max_new_tokens=8, do_sample=False)
        said.append(tokenizer.decode(out[0, ids.input_ids.shape[1] :], skip_special_tokens=True))
    assert [sample["answers"]["dpo-0.1"] for sample in result.evaluation["samples"]] == said[:3]
    share = sum(word[0] in answer for word, answer in zip(WORDS[:9], said, strict=True)) / 9
    assert result.evaluation["scores"]["answer"]["dpo-0.1"] == pytest.approx(share)
    assert list(result.evaluation["scores"]["short"]) == ["base", "sft", "dpo-0.1"]


def test_a_broken_regex_is_found_at_once(with_evaluation: dict[str, Any], write: Any) -> None:
    with_evaluation["evaluate"]["scores"]["short"]["regex"] = "(a"
    with pytest.raises(
        toolkit.RecipeError, match=r"evaluate.scores.short: '\(a' is not a regular expression: missing \)"
    ):
        toolkit.load_recipe(write(with_evaluation))


def test_messages_without_a_template_are_found_before_training(
    with_evaluation: dict[str, Any], write: Any, tmp_path: Path
) -> None:
    rows = [{"prompt": [{"role": "user", "content": "what"}], "answer": "x"}]
    with_evaluation["evaluate"]["data"] = str(write_jsonl(tmp_path / "held.jsonl", rows))
    with_evaluation["model"]["name_or_path"] = str(make_base(tmp_path / "bare", chat_template=None))
    texts = [{"text": word} for word in WORDS]
    with_evaluation["stages"] = [{"type": "sft", "data": str(write_jsonl(tmp_path / "texts.jsonl", texts))}]
    with pytest.raises(toolkit.ModelError, match="the prompts are messages and there is no chat template"):
        toolkit.train(write(with_evaluation), output=tmp_path / "run")
    assert not (tmp_path / "run" / "sft").exists()


def test_an_empty_cell_is_found_before_training(with_evaluation: dict[str, Any], write: Any, tmp_path: Path) -> None:
    rows = [{"prompt": "what", "answer": "x"}, {"prompt": "what", "answer": None}]
    with_evaluation["evaluate"]["data"] = str(write_jsonl(tmp_path / "held.jsonl", rows))
    with pytest.raises(toolkit.DataError, match=r"row 1: answer is empty; fill it in, or remove the row"):
        toolkit.train(write(with_evaluation), output=tmp_path / "run")


def test_a_missing_column_is_found_before_training(with_evaluation: dict[str, Any], write: Any, tmp_path: Path) -> None:
    with_evaluation["evaluate"]["scores"]["answer"]["column"] = "anser"
    with pytest.raises(
        toolkit.DataError, match=r"evaluate.data\[0\].path: no column anser; found columns prompt, answer"
    ):
        toolkit.train(write(with_evaluation), output=tmp_path / "run")
    assert not (tmp_path / "run" / "sft").exists()


@pytest.fixture(scope="session")
def measured(base: Path, tmp_path_factory: pytest.TempPathFactory) -> toolkit.RunResult:
    """SFT then DPO, evaluated on rows that hold a prompt, a completion and a pair each."""
    folder = tmp_path_factory.mktemp("measured")
    trainer = {"per_device_train_batch_size": 4, "learning_rate": 1e-2, "save_strategy": "no"}
    trainer["gradient_checkpointing"] = False
    held = [
        {
            "prompt": r["question"] + ":",
            "completion": " " + r["good"],
            "chosen": " " + r["good"],
            "rejected": " " + r["bad"],
        }
        for r in answers(9)
    ]
    recipe = {
        "model": {"name_or_path": str(base), "dtype": "float32"},
        "lora": {"r": 4, "lora_alpha": 8},
        "stages": [
            {
                "type": "sft",
                "data": str(write_jsonl(folder / "sft.jsonl", messages(12))),
                "trainer": trainer,
            },
            {
                "type": "dpo",
                "data": str(write_jsonl(folder / "dpo.jsonl", pairs(12))),
                "trainer": trainer | {"beta": 0.2},
            },
        ],
        "evaluate": {"data": str(write_jsonl(folder / "held.jsonl", held)), "max_new_tokens": 8, "batch_size": 4},
        "seed": 7,
    }
    file = folder / "recipe.yaml"
    file.write_text(yaml.safe_dump(recipe, sort_keys=False))
    return toolkit.train(file, output=folder / "run")


def plain_logps(base: Path, adapter: Path | None, prompt: str, completion: str) -> tuple[float, int]:
    """Log-probability of a completion and its end token, and the number of its tokens: transformers and PEFT alone."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    model = PeftModel.from_pretrained(model, adapter) if adapter else model
    tokenizer = AutoTokenizer.from_pretrained(base)
    ids = tokenizer(prompt + completion + tokenizer.eos_token, return_tensors="pt").input_ids
    start = len(tokenizer(prompt).input_ids)
    with torch.no_grad():
        logps = model.eval()(ids).logits[0, :-1].log_softmax(-1)
    taken = logps.gather(1, ids[0, 1:, None])[start - 1 :, 0]
    return float(taken.sum()), len(taken)


def test_perplexity_and_preferences_are_what_plain_transformers_and_peft_say(
    measured: toolkit.RunResult, base: Path
) -> None:
    assert measured.evaluation is not None
    sft, dpo = measured.output / "sft" / "adapter", measured.output / "dpo" / "adapter"
    nats, tokens, margins = 0.0, 0, []
    for row in answers(9):
        ask, good, bad = row["question"] + ":", " " + row["good"], " " + row["bad"]
        chosen, n = plain_logps(base, dpo, ask, good)
        nats, tokens = nats + chosen, tokens + n
        reference = [plain_logps(base, sft, ask, answer)[0] for answer in (good, bad)]
        margins.append(0.2 * ((chosen - reference[0]) - (plain_logps(base, dpo, ask, bad)[0] - reference[1])))
    found = measured.evaluation["models"]["dpo"]
    assert found["perplexity"]["value"] == pytest.approx(math.exp(-nats / tokens), rel=1e-4)
    assert found["preference"]["accuracy"]["value"] == pytest.approx(sum(m > 0 for m in margins) / 9)
    assert found["preference"]["margin"]["value"] == pytest.approx(sum(margins) / 9, abs=1e-4)
    assert found["reference"] == "sft"
    low, value, high = (found["perplexity"][name] for name in ("low", "value", "high"))
    assert low < value < high


class Bigram(torch.nn.Module):
    """A model that says token 1 with probability p and token 2 otherwise, whatever came before; `ref` changes p."""

    def __init__(self) -> None:
        super().__init__()
        self.p = 0.9
        self.device = torch.device("cpu")
        self.config = type("Config", (), {"vocab_size": 3})()

    def forward(self, input_ids: torch.Tensor, **_: Any) -> Any:
        logits = torch.tensor([1e-30, self.p, 1 - self.p]).log().expand(*input_ids.shape, 3)
        return type("Output", (), {"logits": logits})()


def test_the_kl_is_the_closed_form_on_a_tiny_vocabulary() -> None:
    model = Bigram()

    @contextmanager
    def reference() -> Iterator[None]:
        model.p = 0.4
        yield
        model.p = 0.9

    sequences = [([1, 2], [1, 1, 2]), ([2], [1]), ([1], [2, 2, 2, 1, 1])]
    per_token = 0.9 * math.log(0.9 / 0.4) + 0.1 * math.log(0.1 / 0.6)
    found = generate.kl_divergences(model, reference, sequences, batch_size=2, pad=0)
    assert found == pytest.approx([3 * per_token, per_token, 5 * per_token], rel=1e-5)


def test_sampling_draws_from_the_models_own_distribution() -> None:
    scores = torch.tensor([0.5, 0.3, 0.2]).log().repeat(4000, 1)
    drawn = generate.Gumbel(list(range(4000)))(None, scores).argmax(-1)
    shares = torch.bincount(drawn, minlength=3) / 4000
    assert torch.allclose(shares, torch.tensor([0.5, 0.3, 0.2]), atol=0.03)


def test_answers_do_not_depend_on_the_batch_and_leave_torchs_generator_alone(base: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(base)
    prompts = [tokenizer("what is " + " ".join(WORDS[: i + 1])).input_ids for i in range(7)]
    seeds = [None, 1, 2, None, 3, 4, 5]
    before = torch.get_rng_state()
    one, three = (generate.answers(model, tokenizer, prompts, generate.Limits(10, size), seeds) for size in (1, 3))
    assert one == three
    assert torch.equal(before, torch.get_rng_state())
    assert generate.answers(model, tokenizer, prompts, generate.Limits(10, 3), [9] * 7) != three


def test_the_same_seed_says_the_same_and_nothing_is_measured_twice(measured: toolkit.RunResult, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(measured.output, run)
    stamps = {name: (run / name / "evaluation.json").stat().st_mtime_ns for name in ("base", "sft", "dpo")}
    evaluate_run(run)
    assert stamps == {name: (run / name / "evaluation.json").stat().st_mtime_ns for name in stamps}
    for name in stamps:
        (run / name / "evaluation.json").unlink()
    assert evaluate_run(run) == measured.evaluation
    other = evaluate_run(run, stages=["dpo"], limit=4, seed=8)
    assert list(other["models"]) == ["base", "dpo"]
    assert (other["prompts"], other["models"]["dpo"]["perplexity"]["n"]) == (4, 4)


def test_held_out_rows_come_from_eval_data_where_evaluate_has_none(
    recipe: dict[str, Any], write: Any, tmp_path: Path
) -> None:
    recipe["stages"][1]["eval_data"] = str(write_jsonl(tmp_path / "held.jsonl", pairs(5)))
    recipe["stages"] = [recipe["stages"][1]]
    recipe["evaluate"] = {"max_new_tokens": 4}
    found = toolkit.train(write(recipe), output=tmp_path / "run").evaluation
    assert found is not None
    assert found["held_out"] == {"prompts": 5, "answers": 5, "pairs": 5}
    assert found["models"]["base"]["kl"] is None
    assert found["models"]["dpo"]["kl"]["value"] > 0


def test_nothing_held_out_is_said_before_training(recipe: dict[str, Any], write: Any, tmp_path: Path) -> None:
    recipe["evaluate"] = {"max_new_tokens": 4}
    with pytest.raises(toolkit.DataError, match=r"nothing is held out; give evaluate.data, or a stage eval_data"):
        toolkit.train(write(recipe), output=tmp_path / "run")
    recipe["stages"][1]["eval_data"] = str(write_jsonl(tmp_path / "held.jsonl", pairs(5)))
    recipe["evaluate"] = {"lm_eval": ["arc_easy"]}
    with pytest.raises(toolkit.ModelError, match=r"lm-evaluation-harness is not installed; pip install lm-eval"):
        toolkit.train(write(recipe), output=tmp_path / "run")


def test_the_command(measured: toolkit.RunResult, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "run"
    shutil.copytree(measured.output, run)
    assert main(["evaluate", str(run), "--stage", "dpo", "--limit", "3"]) == 0
    said = capsys.readouterr().out
    assert said.startswith("3 held-out prompts, greedy answers; 3 answers, 3 pairs; 95% intervals")
    assert main(["evaluate", str(run), "--stage", "dop"]) == 2
    assert "dop: not finished here; finished: sft, dpo" in capsys.readouterr().err
    assert main(["evaluate", str(tmp_path)]) == 2
    assert "is not a run directory" in capsys.readouterr().err


def test_a_stage_is_measured_against_what_it_was_trained_from_or_not_at_all(
    measured: toolkit.RunResult, tmp_path: Path
) -> None:
    run = Path(shutil.copytree(measured.output, tmp_path / "run"))
    with RunDirectory(run).held(), pytest.raises(toolkit.RunError, match=r"process \d+ on .* is at work here"):
        evaluate_run(run)
    shutil.copy(run / "dpo" / "adapter" / "adapter_model.safetensors", run / "sft" / "adapter")
    with pytest.raises(toolkit.RunError, match=r"dpo was trained from sft, which is another one now; `toolkit train`"):
        evaluate_run(run)
    shutil.rmtree(run / "sft" / "adapter")
    with pytest.raises(toolkit.RunError, match=r"dpo was trained from sft, which is not there now; `toolkit train`"):
        evaluate_run(run)
    with pytest.raises(toolkit.RunError, match=r"sft: not finished here; finished: dpo"):
        evaluate_run(run, ["sft"])


def test_degeneration_is_counted() -> None:
    assert measure.repetition([1, 2, 3, 4, 5]) == 0.0
    assert measure.repetition([1] * 12) == pytest.approx(8 / 9)
    assert [measure.loops(ids) for ids in ([1] * 8, [1] * 7, [5, 1, 2, 3, 1, 2, 3, 1, 2, 3], list(range(20)))] == [
        True, False, True, False,
    ]  # fmt: skip
    assert measure.distinct([[1, 2, 1, 2], [1, 2]], 2) == 0.5


def test_the_bootstrap_covers_what_it_should() -> None:
    rng = np.random.default_rng(0)
    covered = 0
    for trial in range(200):
        found = measure.mean(rng.normal(size=50), seed=trial)
        covered += found["low"] <= 0 <= found["high"]
    assert 175 <= covered <= 199
    assert measure.ratio([2, 4], [1, 3], seed=0)["value"] == 1.5


def test_scores_count_texts_exactly_or_in_part() -> None:
    rows, texts = [{"a": "sun"}, {"a": "red"}], [" sun ", "it is red"]
    assert measure.hits(rows, texts, how="exact", what="a") == [1.0, 0.0]
    assert measure.hits(rows, texts, how="column", what="a") == [1.0, 1.0]
    assert measure.hits(rows, texts, how="regex", what="^it") == [0.0, 1.0]


def test_trackers_runs_are_named_after_the_run_and_the_stage(
    measured: toolkit.RunResult,
) -> None:
    names = {name: record["trainer_args"]["run_name"] for name, record in measured.stages.items()}
    assert names == {"sft": "run-sft", "dpo": "run-dpo"}
