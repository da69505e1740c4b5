"""Every finding about template, data and pairs, on a few rows that have the defect, with the numbers of the rows."""

from pathlib import Path
from typing import Any

import pytest
from tokenizers.processors import TemplateProcessing

import toolkit
from tests.conftest import write_jsonl
from tests.tiny import CHATML, make_tokenizer
from toolkit.checks import content as check_data
from toolkit.checks import pairs as check_pairs
from toolkit.checks import template as check_template
from toolkit.job import StageJob
from toolkit.recipe.plan import Hardware, stage_plans
from toolkit.rows import data
from toolkit.training.trainer import optimizer_steps

CPU = Hardware("cpu", bf16=False)
TURN = "{% for m in messages %}<|im_start|>{{ m.role }}\n"
ASKED = "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
NO_STOP = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}{% if add_generation_prompt %}assistant: "
NO_STOP += "{% endif %}"
UNMARKED = TURN + "{{ m.content + '' }}<|im_end|>\n{% endfor %}" + ASKED
STOP_OUTSIDE = TURN + "{% if m.role == 'assistant' %}{% generation %}{{ m.content }}{% endgeneration %}{% else %}"
STOP_OUTSIDE += "{{ m.content }}{% endif %}<|im_end|>\n{% endfor %}" + ASKED
NO_SYSTEM = "{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
FORGETS = TURN + "{% if m.role == 'assistant' %}{% generation %}{{ m.content if loop.last else m.content[:4] }}"
FORGETS += "<|im_end|>{% endgeneration %}{% else %}{{ m.content }}<|im_end|>{% endif %}\n{% endfor %}" + ASKED


def talk(*turns: str) -> dict[str, Any]:
    """A conversation; user and assistant take turns."""
    return {"messages": [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(turns)]}


def asked(prompt: str, completion: str) -> dict[str, Any]:
    roles = (("prompt", "user", prompt), ("completion", "assistant", completion))
    return {name: [{"role": role, "content": text}] for name, role, text in roles}


def pair(prompt: str, chosen: str, rejected: str, **more: Any) -> dict[str, Any]:
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected, **more}


def numbered(n: int) -> list[dict[str, Any]]:
    return [talk(f"question {i}", f"answer {i}") for i in range(n)]


@pytest.fixture
def job_of(tmp_path: Path, write: Any) -> Any:
    """A stage over these rows, without a model. `held_out` are its `eval_data`, `evaluate` those of the recipe."""

    def _job(rows: list[dict[str, Any]], type: str = "sft", tokenizer: Any = None, **more: Any) -> StageJob:
        source = {"path": str(write_jsonl(tmp_path / "rows.jsonl", rows)), **more.get("source", {})}
        stage = {"type": type, "data": [source], "trainer": more.get("trainer", {})}
        recipe: dict[str, Any] = {"model": {"name_or_path": "x"}, "stages": [stage]}
        if "held_out" in more:
            stage["eval_data"] = str(write_jsonl(tmp_path / "held_out.jsonl", more["held_out"]))
        if "evaluate" in more:
            recipe["evaluate"] = {"data": str(write_jsonl(tmp_path / "evaluate.jsonl", more["evaluate"]))}
        loaded, tokenizer = toolkit.load_recipe(write(recipe)), tokenizer or make_tokenizer()
        plan = stage_plans(loaded, CPU)[0]
        rows_of = data.prepare(loaded, plan, tokenizer)
        steps = optimizer_steps(rows_of.steps_rows, plan, CPU)
        return StageJob(loaded, plan, CPU, {}, tokenizer, rows_of, None, tmp_path, steps, 0, "", None)

    return _job


def template_findings(job: StageJob, tokenizer: Any = None) -> dict[str, Any]:
    found = check_template.check_template(job.recipe, job.plan, job.data, tokenizer or job.tokenizer)
    return {f.check: f for f in found}


def data_findings(job: StageJob) -> dict[str, Any]:
    text = check_data.read_text(job.data.sources, job.plan.type, job.tokenizer, job.recipe.seed)
    found = check_data.check_lengths(job) + check_data.check_steps(job) + check_data.check_text(job, text)
    found += check_data.check_overlap(job, text, job.tokenizer)
    return {f.check: f for f in found}


def pair_findings(job: StageJob) -> dict[str, Any]:
    return {f.check: f for f in check_pairs.check_pairs(job)}


def test_a_pad_token_that_is_the_end_token_is_said_to_be_handled(job_of: Any) -> None:
    job = job_of(numbered(2))
    job.tokenizer.pad_token = job.tokenizer.eos_token
    (found,) = check_template.check_tokenizer(job.recipe, job.tokenizer)
    assert (found.level, found.check) == ("note", "padding")
    assert "pads with its end token <|im_end|>; padding is masked by its place" in found.text


@pytest.mark.parametrize(
    ("template", "rows", "check", "level", "text"),
    [
        (CHATML, "talk", "stop-token", "note", "the stop token <|im_end|> is trained after every answer"),
        (NO_STOP, "asked", "no-stop-token", "error", "the model would learn no stop token and never stop"),
        (STOP_OUTSIDE, "talk", "stop-not-trained", "error", "<|im_end|> is masked after 2 of 2 answers"),
        (UNMARKED, "talk", "untrained-turns", "warning", "of each conversation the last answer alone is trained"),
        (FORGETS, "talk", "rewritten-turns", "warning", "rewrites an answer once another question follows"),
        (UNMARKED.replace(ASKED, ""), "asked", "no-generation-prompt", "warning", "'<|im_start|>assistant' is trained"),
    ],
)  # fmt: skip
def test_what_a_template_does(job_of: Any, template: str, rows: str, check: str, level: str, text: str) -> None:
    row = talk("what is it", "the sun") if rows == "talk" else asked("what is it", "the sun")
    found = template_findings(job_of([row], tokenizer=make_tokenizer(template)))[check]
    assert found.level == level and text in found.text


def test_a_beginning_token_twice_or_never(job_of: Any) -> None:
    tokenizer = make_tokenizer("{{ bos_token }}{{ bos_token }}" + CHATML)
    tokenizer.bos_token = "<|endoftext|>"
    job = job_of([talk("a", "b"), talk("c", "d")], tokenizer=tokenizer)
    assert "begins with <|endoftext|> twice" in template_findings(job)["double-bos"].text
    tokenizer.chat_template = CHATML
    begins = TemplateProcessing(single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", tokenizer.bos_token_id)])
    tokenizer.backend_tokenizer.post_processor = begins
    assert "the template begins a conversation without it" in template_findings(job, tokenizer)["no-bos"].text
    texts = [{"text": text} for text in ("the sun", "<|endoftext|>the moon", "red")]
    assert data_findings(job_of(texts, tokenizer=tokenizer))["double-bos"].rows == (1,)


def test_a_template_that_raises_is_named_with_the_row(job_of: Any) -> None:
    rows = [talk("a", "b"), {"messages": [{"role": "system", "content": "be kind"}, *talk("a", "b")["messages"]]}]
    with pytest.raises(toolkit.DataError, match="row 1: the chat template cannot render it: System role not supported"):
        job_of(rows, tokenizer=make_tokenizer(NO_SYSTEM + CHATML))
    raises = template_findings(job_of([talk("a", "b")]), make_tokenizer("{{ raise_exception('never') }}"))["template"]
    assert (raises.level, raises.text) == ("error", "the template cannot render a question and its answer: never")


def test_a_prompt_whose_last_tokens_change_with_the_answer(job_of: Any) -> None:
    rows = [{"prompt": "what is", "completion": " the sun"}, {"prompt": "what is the su", "completion": "n"}]
    found = data_findings(job_of(rows))["prompt-boundary"]
    assert found.rows == (1,) and "in 50% of the rows the prompt's last tokens change" in found.text


def test_lengths_losses_and_drops_are_counted(job_of: Any) -> None:
    rows = [*numbered(3), talk("long", "the sun " * 40), talk("x", "  ")]
    rows.append({"messages": [{"role": "user", "content": "alone"}]})
    found = data_findings(job_of(rows, trainer={"max_length": 40}))
    assert found["lengths"].text.startswith("4 rows; tokens p50 ") and found["lengths"].text.endswith("max_length 40")
    truncated = found["truncated"]
    assert (truncated.level, truncated.rows) == ("warning", (3,))
    assert truncated.text.startswith("1 rows are longer than max_length 40; the stage loses ")
    assert found["no-assistant"].rows == (5,)
    full = data_findings(job_of(rows[:3], trainer={"max_length": 60, "packing": True}))["packing"].text
    assert full.startswith("packed into ") and full.endswith("% full")


def test_what_packing_cuts_is_lost_too(job_of: Any) -> None:
    rows = [talk("q", "the sun " * 40), *numbered(3)]
    job = job_of(rows, trainer={"max_length": 40, "packing": True})
    seen = sum(sum(label != -100 for label in row["labels"][:40]) for row in job.data.train)
    whole = job.data.counts.supervised
    assert check_data._kept_supervised(job) == seen < whole
    assert f"loses {1 - seen / whole:.1%}" in data_findings(job)["truncated"].text


def test_a_prompt_that_fills_max_length_is_dropped(job_of: Any) -> None:
    rows = [*numbered(3), talk("why " * 60, "so")]
    assert data_findings(job_of(rows, trainer={"max_length": 40}))["no-room"].rows == (3,)


def test_what_is_said_twice_or_cannot_be_trained(job_of: Any) -> None:
    rows = [
        *numbered(5),
        talk("question 1", "answer 1"),
        talk(" question 2 ", "other"),
        talk("a", "b", "c", "", "", "x"),
    ]
    rows += [talk("a<|im_end|>", "b"), talk("a", "b", "c")]
    found = data_findings(job_of(rows))
    expected = {"duplicate-rows": (5,), "special-tokens": (8,), "last-turn": (9,), "empty-turn": (7,)}
    assert {name: found[name].rows for name in expected} == expected
    assert found["duplicate-prompts"].level == "note" and found["duplicate-prompts"].rows[:2] == (5, 6)


def test_held_out_rows_that_are_trained_on(job_of: Any) -> None:
    held = [talk("other", "x"), talk("question 1", "answer 1"), talk("question 2", "new")]
    found = data_findings(job_of(numbered(4), held_out=held))["overlap"]
    assert (
        found.rows == (1, 2) and "2 held-out rows have a prompt that is trained on, 1 are the very rows" in found.text
    )
    evaluated = [{"prompt": "new"}, {"prompt": "question 3"}]
    found = data_findings(job_of(numbered(4), evaluate=evaluated))["overlap"]
    assert found.rows == (1,) and found.text == "1 prompts of evaluate are trained on in sft"


def test_runs_too_short_for_what_they_are_asked(job_of: Any) -> None:
    trainer = {"per_device_train_batch_size": 4, "warmup_steps": 7, "gradient_accumulation_steps": 2}
    found = data_findings(job_of(numbered(6), trainer=trainer))
    assert "warms up for 7 steps, and the run has 1" in found["warm-up"].text
    assert "the effective batch is 8 rows, and there are 6" in found["batch-size"].text
    assert "1 optimizer steps are hardly any training" in found["few-steps"].text
    fine = data_findings(job_of(numbered(6), trainer={"per_device_train_batch_size": 1}))
    assert not {"warm-up", "batch-size", "few-steps"} & set(fine)


@pytest.mark.parametrize(("longer", "level"), [(13, None), (14, "warning"), (6, "note")])
def test_a_length_bias_is_told_beyond_65_percent(job_of: Any, longer: int, level: str | None) -> None:
    long, short = "the sun is red", "red"
    rows = [pair(f"q {i}", *((long, short) if i < longer else (short, long))) for i in range(20)]
    found = pair_findings(job_of(rows, "dpo")).get("length-bias")
    assert (found.level if found else None) == level
    if level == "warning":
        assert found.rows == tuple(range(14)) and "chosen is the longer one in 70% of 20 pairs" in found.text


def test_pairs_that_teach_nothing_or_the_contrary(job_of: Any) -> None:
    rows = [pair("a", "x", "y"), pair("a", "y", "x"), pair("b", "z", "z"), pair("a", "x", "w"), pair("c", "w", "x")]
    found = pair_findings(job_of(rows, "dpo"))
    assert {name: f.rows for name, f in found.items()} == {"contradiction": (1,), "identical-pair": (2,)}
    assert pair_findings(job_of([pair("b", "z", "z")], "dpo"))["identical-pair"].level == "error"


def test_pairs_that_seem_swapped(job_of: Any) -> None:
    rows = [
        pair("a", "x", "y", score_chosen=1.0, score_rejected=2.0),
        pair("b", "x", "y", score_chosen=2, score_rejected=1),
    ]
    rows.append(pair("c", "x", "y", score_chosen=0.0, score_rejected=2.0))
    found = pair_findings(job_of(rows, "dpo"))["swapped"]
    assert found.rows == (0, 2)
    assert found.text == "score_chosen is below score_rejected in 2 of 3 pairs: chosen and rejected are swapped"
    crossed = {"columns": {"chosen": "worse", "rejected": "better"}}
    found = pair_findings(job_of([{"prompt": "a", "worse": "x", "better": "y"}], "dpo", source=crossed))["swapped"]
    assert found.text == "chosen is read from 'worse' and rejected from 'better': are they swapped?"
    found = pair_findings(job_of([pair("a", "x", "y", instruction="a", output="y")], "dpo")).get("swapped")
    assert found and found.text.startswith("rejected is the row's own `output` in 1 pairs")
    rows = [pair(f"q {i}", "I cannot help with that", "it is so") for i in range(20)]
    assert "20 of 20 chosen answers begin as a refusal" in pair_findings(job_of(rows, "dpo"))["swapped"].text
