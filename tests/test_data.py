"""Every format becomes the same tokens, and every row that is lost is counted."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

import toolkit
from tests.conftest import write_jsonl
from tests.tiny import make_tokenizer
from toolkit.recipe.plan import Hardware, stage_plans
from toolkit.records.rundir import RunDirectory
from toolkit.rows.data import StageData, prepare
from toolkit.training import prepare as prepare_run
from toolkit.training.trainer import optimizer_steps, repeated_rows

CPU = Hardware("cpu", bf16=False)
Q, A, B = "what is the sun", "it is red", "no it is not"
USER, ASSISTANT, WORSE = ({"role": r, "content": c} for r, c in (("user", Q), ("assistant", A), ("assistant", B)))
SYSTEM = {"role": "system", "content": "be kind"}


@pytest.fixture
def rows_of(tmp_path: Path, write: Any) -> Any:
    """Prepare rows for a stage; keyword arguments go to the data source, `trainer` to the trainer."""

    def _rows(rows: list[dict[str, Any]] | Path, type: str = "sft", trainer: Any = None, **source: Any) -> StageData:
        file = rows if isinstance(rows, Path) else write_jsonl(tmp_path / "rows.jsonl", rows)
        stage = {"type": type, "data": [{"path": str(file), **source}], "trainer": trainer or {}}
        recipe = toolkit.load_recipe(write({"model": {"name_or_path": "x"}, "stages": [stage]}))
        return prepare(recipe, stage_plans(recipe, CPU)[0], make_tokenizer())

    return _rows


def text(data: StageData, row: int = 0) -> tuple[str, str]:
    """The unsupervised and the supervised part of an SFT row."""
    ids, labels = data.train[row]["input_ids"], data.train[row]["labels"]
    start = next(i for i, label in enumerate(labels) if label != -100)
    tokenizer = make_tokenizer()
    return tokenizer.decode(ids[:start]), tokenizer.decode(ids[start:])


PROMPT = f"<|im_start|>user\n{Q}<|im_end|>\n<|im_start|>assistant\n"
WITH_SYSTEM = f"<|im_start|>system\nbe kind<|im_end|>\n{PROMPT}"
COMPLETION = f"{A}<|im_end|>\n"


@pytest.mark.parametrize(
    ("row", "prompt"),
    [
        ({"prompt": [USER], "completion": [ASSISTANT]}, PROMPT),
        ({"prompt": [SYSTEM, USER], "completion": [ASSISTANT]}, WITH_SYSTEM),
        ({"prompt": [USER], "completion": A}, PROMPT),
        ({"instruction": Q, "input": "", "output": A}, PROMPT),
        ({"instruction": "what is", "input": "the sun", "output": A}, PROMPT.replace(Q, "what is\n\nthe sun")),
        ({"system": "be kind", "instruction": Q, "output": A}, WITH_SYSTEM),
        ({"prompt": [USER], "chosen": [ASSISTANT], "rejected": [WORSE]}, PROMPT),
        ({"chosen": [USER, ASSISTANT], "rejected": [USER, WORSE]}, PROMPT),
        ({"prompt": Q, "chosen": [USER, ASSISTANT], "rejected": [USER, WORSE]}, PROMPT),
        ({"prompt": Q, "chosen": [ASSISTANT], "rejected": [WORSE]}, PROMPT),
        ({"instruction": Q, "chosen": A, "rejected": B}, PROMPT),
        ({"instruction": Q, "output": A, "chosen": B, "rejected": B}, PROMPT),
        ({"prompt": [USER], "chosen": ASSISTANT, "rejected": WORSE}, PROMPT),
    ],
)
def test_sft_formats(rows_of: Any, row: dict[str, Any], prompt: str) -> None:
    assert text(rows_of([row])) == (prompt, COMPLETION)


@pytest.mark.parametrize(
    "row",
    [
        {"messages": [USER, ASSISTANT]},
        {"conversations": [{"from": "human", "value": Q}, {"from": "gpt", "value": A}]},
        {"conversations": [USER, ASSISTANT]},
    ],
)
def test_messages_supervise_the_assistant(rows_of: Any, row: dict[str, Any]) -> None:
    data = rows_of([row])
    labels = [label for label in data.train[0]["labels"] if label != -100]
    assert make_tokenizer().decode(labels) == f"{A}<|im_end|>"
    assert make_tokenizer().decode(data.train[0]["input_ids"]) == PROMPT + COMPLETION


def test_every_assistant_turn_is_supervised(rows_of: Any) -> None:
    data = rows_of([{"messages": [USER, ASSISTANT, USER, WORSE]}])
    labels = [label for label in data.train[0]["labels"] if label != -100]
    assert make_tokenizer().decode(labels) == f"{A}<|im_end|>{B}<|im_end|>"


def test_plain_text_ends_with_the_end_token(rows_of: Any) -> None:
    assert text(rows_of([{"text": Q}])) == ("", f"{Q}<|im_end|>")
    assert text(rows_of([{"prompt": Q, "completion": " " + A}])) == (Q, f" {A}<|im_end|>")


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": [USER], "chosen": [ASSISTANT], "rejected": [WORSE]},
        {"chosen": [USER, ASSISTANT], "rejected": [USER, WORSE]},
        {"prompt": Q, "chosen": [USER, ASSISTANT], "rejected": [USER, WORSE]},
        {"instruction": Q, "input": "", "chosen": A, "rejected": B},
        {"conversations": [{"from": "human", "value": Q}], "chosen": {"from": "gpt", "value": A}, "rejected": {"from": "gpt", "value": B}},
    ],
)  # fmt: skip
def test_dpo_formats(rows_of: Any, row: dict[str, Any]) -> None:
    pair, tokenizer = rows_of([row], type="dpo").train[0], make_tokenizer()
    assert tokenizer.decode(pair["prompt_ids"]) == PROMPT
    assert tokenizer.decode(pair["chosen_ids"]) == COMPLETION
    assert tokenizer.decode(pair["rejected_ids"]) == f"{B}<|im_end|>\n"


def test_columns_rename(rows_of: Any) -> None:
    row = {"q": Q, "good": A, "bad": B}
    columns = {"instruction": "q", "chosen": "good", "rejected": "bad"}
    assert make_tokenizer().decode(rows_of([row], type="dpo", columns=columns).train[0]["prompt_ids"]) == PROMPT
    with pytest.raises(toolkit.DataError, match="columns: chosen: god is not a column; found q, good, bad"):
        rows_of([row], type="dpo", columns={"chosen": "god"})


def test_the_format_can_be_named(rows_of: Any) -> None:
    row = {"text": Q, "prompt": [USER], "completion": [ASSISTANT]}
    assert text(rows_of([row])) == (PROMPT, COMPLETION)
    assert text(rows_of([row], format="text")) == ("", f"{Q}<|im_end|>")


def test_file_types_give_the_same_rows(rows_of: Any, tmp_path: Path) -> None:
    rows = [{"instruction": Q, "output": A}, {"instruction": B, "output": A}]
    frame = pd.DataFrame(rows)
    frame.to_csv(tmp_path / "r.csv", index=False)
    frame.to_parquet(tmp_path / "r.parquet")
    frame.to_json(tmp_path / "r.json", orient="records")
    digests = {rows_of(tmp_path / name).digest for name in ("r.csv", "r.parquet", "r.json")} | {rows_of(rows).digest}
    assert len(digests) == 1


def test_many_dropped_rows_before_the_first_kept_one(rows_of: Any) -> None:
    rows = [{"prompt": Q, "completion": " "}] * 1200 + [{"prompt": Q, "completion": A}] * 3
    counts = rows_of(rows).counts
    assert (counts.rows, counts.dropped) == (3, {"empty answer": 1200})


def test_a_byte_order_mark(rows_of: Any, tmp_path: Path) -> None:
    (tmp_path / "r.csv").write_text(f"\ufeffprompt,completion\n{Q}, {A}\n", encoding="utf-8")
    assert text(rows_of(tmp_path / "r.csv"))[0] == Q


def test_tools_reach_the_template(rows_of: Any) -> None:
    from toolkit.rows.chat import tokenize_prompt_completion

    tokenizer = make_tokenizer("{{ tools[0].name if tools }}{% for m in messages %}{{ m.content }}{% endfor %}")
    row = {"prompt": [USER], "completion": [ASSISTANT], "tools": '[{"name": "clock"}]'}
    assert tokenizer.decode(tokenize_prompt_completion(row, tokenizer)["input_ids"]) == f"clock{Q}{A}"


def test_csv_cells_are_text(rows_of: Any, tmp_path: Path) -> None:
    (tmp_path / "r.csv").write_text("prompt,completion\nwhat is it,42\nand now,NA\nand then,\n")
    data = rows_of(tmp_path / "r.csv")
    assert [text(data, row)[1] for row in (0, 1)] == ["42<|im_end|>", "NA<|im_end|>"]
    assert data.counts.dropped == {"empty answer": 1}


def test_an_answer_that_is_not_text_is_named(rows_of: Any) -> None:
    with pytest.raises(
        toolkit.DataError, match="row 0: cannot be read as this format: expected text or messages, found 42"
    ):
        rows_of([{"prompt": Q, "completion": 42}])


def test_lost_rows_are_counted(rows_of: Any) -> None:
    long = {"role": "user", "content": "sun " * 60}
    sft = [{"prompt": [p], "completion": [c]} for p, c in ((USER, ASSISTANT), (long, ASSISTANT))]
    sft += [{"prompt": [USER], "completion": [{"role": "assistant", "content": c}]} for c in (" ", "moon " * 60)]
    counts = rows_of(sft, trainer={"max_length": 40}).counts
    assert (counts.rows, counts.truncated) == (2, 1)
    assert counts.dropped == {"empty answer": 1, "prompt fills max_length": 1}
    pairs = [{"prompt": [p], "chosen": [ASSISTANT], "rejected": [WORSE]} for p in (USER, long)]
    counts = rows_of(pairs, type="dpo", trainer={"max_length": 30}).counts
    assert (counts.rows, counts.truncated, counts.dropped) == (1, 1, {"prompt fills max_length": 1})


def test_tokens_are_counted(rows_of: Any) -> None:
    pair = {"prompt": [USER], "chosen": [ASSISTANT], "rejected": [WORSE]}
    row = rows_of([pair], type="dpo")
    prompt, chosen, rejected = (len(row.train[0][k]) for k in ("prompt_ids", "chosen_ids", "rejected_ids"))
    assert (row.counts.tokens, row.counts.supervised) == (2 * prompt + chosen + rejected, chosen + rejected)


def test_limit_and_fraction_draw_by_seed(rows_of: Any) -> None:
    rows = [{"instruction": f"{Q} {i}", "output": A} for i in range(20)]
    assert rows_of(rows, limit=5).digest == rows_of(rows, limit=5).digest
    assert (rows_of(rows, limit=5).counts.rows, rows_of(rows, fraction=0.25).counts.rows) == (5, 5)
    assert rows_of(rows, limit=99).counts.rows == 20
    with pytest.raises(toolkit.RecipeError, match="both limit and fraction are given"):
        rows_of(rows, limit=5, fraction=0.5)


def test_sources_of_different_formats_mix(write: Any, tmp_path: Path) -> None:
    a = write_jsonl(tmp_path / "a.jsonl", [{"messages": [USER, ASSISTANT]}] * 3)
    b = write_jsonl(tmp_path / "b.jsonl", [{"text": Q}] * 2)
    stage = {"type": "sft", "data": [str(a), {"path": str(b), "limit": 1}]}
    recipe = toolkit.load_recipe(write({"model": {"name_or_path": "x"}, "stages": [stage]}))
    assert prepare(recipe, stage_plans(recipe, CPU)[0], make_tokenizer()).counts.rows == 4


def test_the_row_that_cannot_be_read_is_named(rows_of: Any) -> None:
    rows = [{"messages": [USER, ASSISTANT]}, {"messages": [{"content": "no role"}, ASSISTANT]}]
    with pytest.raises(toolkit.DataError, match="row 1: cannot be read as this format: no key 'role'"):
        rows_of(rows)


@pytest.mark.parametrize(("rows", "batch", "accumulation", "epochs", "processes"), [(7, 2, 2, 3, 1), (9, 4, 1, 1.5, 1)])
def test_the_planned_steps_are_the_trainers(
    recipe: dict[str, Any],
    write: Any,
    tmp_path: Path,
    rows: int,
    batch: int,
    accumulation: int,
    epochs: float,
    processes: int,
) -> None:
    stage = recipe["stages"][0]
    stage["data"] = [{"path": stage["data"], "limit": rows}]
    stage["trainer"] |= {"per_device_train_batch_size": batch, "gradient_accumulation_steps": accumulation}
    stage["trainer"]["num_train_epochs"] = epochs
    result = toolkit.train(write(recipe), output=tmp_path / "run", stage="sft")
    plan = stage_plans(toolkit.load_recipe(write(recipe)), CPU)[0]
    from toolkit.training.progress import read_metrics

    last = read_metrics(result.output / "sft" / "metrics.jsonl")[-1]["step"]
    assert result.stages["sft"]["steps"] == optimizer_steps(rows, plan, CPU) == last


@pytest.mark.parametrize(
    ("rows", "batch", "processes", "twice"), [(16, 2, 2, 0), (17, 2, 2, 3), (18, 2, 2, 2), (3, 4, 2, 5)]
)
def test_the_rows_that_several_processes_repeat_are_counted(
    recipe: dict[str, Any], write: Any, rows: int, batch: int, processes: int, twice: int
) -> None:
    """As accelerate deals batches out."""
    from accelerate.data_loader import BatchSamplerShard
    from torch.utils.data import BatchSampler

    recipe["stages"][0]["trainer"]["per_device_train_batch_size"] = batch
    plan = stage_plans(toolkit.load_recipe(write(recipe)), CPU)[0]
    batches = BatchSampler(range(rows), batch, drop_last=False)
    dealt = [i for p in range(processes) for one in BatchSamplerShard(batches, processes, p) for i in one]
    assert len(dealt) - rows == repeated_rows(rows, plan, Hardware("cpu", bf16=False, processes=processes)) == twice
    assert repeated_rows(rows, plan, CPU) == 0


def test_the_plan_says_how_many_rows_come_twice(recipe: dict[str, Any], write: Any, tmp_path: Path) -> None:
    recipe["stages"] = recipe["stages"][:1]  # 12 rows in batches of 4
    prepared = prepare_run.prepare(toolkit.load_recipe(write(recipe)), RunDirectory(tmp_path / "run"))
    job = replace(prepared.jobs[0], hardware=Hardware("cpu", bf16=False, processes=2))
    assert "come twice" not in prepare_run.plan_text(prepared, {"sft": "new"})
    assert "  last step  4 rows of an epoch come twice" in prepare_run.plan_text(
        replace(prepared, jobs=[job]), {"sft": "new"}
    )


def test_the_planned_steps_count_packed_rows(recipe: dict[str, Any], write: Any, tmp_path: Path) -> None:
    from toolkit.training.progress import read_metrics

    recipe["stages"][0]["trainer"] |= {"packing": True, "max_length": 80, "per_device_train_batch_size": 1}
    result = toolkit.train(write(recipe), output=tmp_path / "run", stage="sft")
    last = read_metrics(result.output / "sft" / "metrics.jsonl")[-1]["step"]
    assert result.stages["sft"]["steps"] == last < 12
