"""`toolkit preview`: the batch of the real collators, every row by its number, and nothing acts on the terminal."""

import io
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

import toolkit
from tests.conftest import messages, pairs, write_jsonl
from tests.tiny import make_tokenizer
from toolkit.checks import preview, preview_rows
from toolkit.cli import main
from toolkit.job import StageJob
from toolkit.records.rundir import RunDirectory
from toolkit.training.prepare import prepare

ROW_3 = "what is red all"


@pytest.fixture
def jobs(recipe: dict[str, Any], write: Any, tmp_path: Path) -> Any:
    """The recipe's stages, ready."""
    return lambda: prepare(toolkit.load_recipe(write(recipe)), RunDirectory(tmp_path / "run")).jobs


@pytest.fixture
def shown(recipe: dict[str, Any], write: Any, capsys: pytest.CaptureFixture[str]) -> Any:
    """What `toolkit preview` prints on a pipe, or its complaint."""

    def _shown(*flags: str) -> str:
        code = main(["preview", str(write(recipe)), *flags])
        out, err = capsys.readouterr()
        return out if code == 0 else err

    return _shown


def built_for(job: StageJob) -> Any:
    from toolkit.models import model
    from toolkit.training import dpo, sft

    build: Any = sft.build if job.plan.type == "sft" else dpo.build
    built = build(job, model.load_base(job.recipe, job.hardware))
    if job.plan.type == "dpo":
        dpo.share_prompts(job, built)
    return built


def on_terminal(show: Any, width: int, **console: Any) -> str:
    out = Console(file=io.StringIO(), force_terminal=True, width=width, highlight=False, **console)
    show(out)
    return str(out.file.getvalue())  # type: ignore[attr-defined]


@pytest.mark.parametrize("own", [{}, {"padding_free": True}], ids=["padded", "padding_free"])
def test_a_row_is_the_batch_of_the_trainer(recipe: dict[str, Any], jobs: Any, own: dict[str, Any]) -> None:
    recipe["stages"][0]["trainer"] |= {"max_length": 24, **own}
    job = jobs()[0]
    built = built_for(job)
    for row in list(built.train_dataset)[:4]:
        batch = built.data_collator([row])
        assert preview_rows.supervised_row(job, row) == (batch["input_ids"][0].tolist(), batch["labels"][0].tolist())


@pytest.mark.parametrize("strategy", ["bfd", "bfd_split", "wrapped"])
def test_a_packed_row_is_the_batch_of_the_trainer(recipe: dict[str, Any], jobs: Any, strategy: str) -> None:
    packs = {"packing": True, "packing_strategy": strategy, "max_length": 30, "shuffle_dataset": True}
    recipe["stages"][0]["trainer"] |= packs
    job = jobs()[0]
    built, rows = built_for(job), preview_rows.packed_rows(job)
    assert len(built.train_dataset) == len(rows) == job.data.steps_rows
    for theirs, ours in zip(built.train_dataset, rows, strict=True):
        batch = built.data_collator([theirs])
        ids, labels = preview_rows.supervised_row(job, ours)
        assert ids == batch["input_ids"][0].tolist()
        assert [i for i in labels if i != -100] == [i for i in batch["labels"][0].tolist() if i != -100]
        trained = [i for i, label in enumerate(labels) if label != -100]
        assert [i - 1 for i in trained] == batch["scored_positions"][0, :-1].tolist()
        for part in preview_rows.documents(ours):
            assert set(ids[part.start : part.end]) <= set(job.data.train[part.row]["input_ids"])


@pytest.mark.parametrize("sharing", [True, False], ids=["shared", "by TRL"])
def test_a_pair_is_the_batch_of_the_trainer(recipe: dict[str, Any], jobs: Any, sharing: bool) -> None:
    recipe["stages"] = [recipe["stages"][1] | {"prefix_sharing": sharing}]
    recipe["stages"][0]["trainer"] |= {"max_length": 34}
    (job,) = jobs()
    assert job.data.counts.truncated > 0
    built = built_for(job)
    assert type(built.data_collator.collate).__name__ == ("PairCollator" if sharing else "DataCollatorForPreference")
    for row in list(job.data.train)[:4]:
        batch = built.data_collator([row])
        prompt, chosen, rejected = preview_rows.pair_parts(job, row)
        for side, answer in enumerate((chosen, rejected)):
            ids = batch["input_ids"][side][batch["completion_mask"][side].bool()]
            assert answer == ids.tolist()
            assert len(prompt) + len(answer) == int(batch["attention_mask"][side].sum())


def test_supervised_tokens_stand_in_marks(shown: Any) -> None:
    out = shown("--stage", "sft", "-n", "2")
    assert out.startswith("supervised: between ⟦ and ⟧; masked: unmarked\n\nsft: row 0: ")
    assert out.count("\nsft: row ") == 2 and "<|im_start|>assistant\n⟦it is is the<|im_end|>⟧\n" in out


def test_a_row_of_several_sources_is_shown_of_each(recipe: dict[str, Any], shown: Any, tmp_path: Path) -> None:
    few = write_jsonl(tmp_path / "few.jsonl", [*messages(3), {"messages": [{"role": "user", "content": "alone"}]}])
    recipe["stages"] = [recipe["stages"][0] | {"data": [str(tmp_path / "sft.jsonl"), str(few)]}]
    out = shown("--row", "1")
    assert "sft: row 1 of data[0] (sft.jsonl): " in out and "sft: row 1 of data[1] (few.jsonl): " in out
    out = shown("--row", "3")
    assert "sft: row 3 of data[0] (sft.jsonl): " in out
    assert out.endswith("sft: data[1] (few.jsonl): row 3 is dropped: no assistant turn\n")
    said = shown("--row", "50")
    assert said == (
        "errors:\nsft: data[0] (sft.jsonl): no row 50 among 0 to 11\nsft: data[1] (few.jsonl): no row 50 among 0 to 3\n"
    )
    assert "no such stage; the recipe has sft" in shown("--stage", "dpo")


def test_rows_keep_their_numbers_when_some_are_drawn(recipe: dict[str, Any], shown: Any, tmp_path: Path) -> None:
    recipe["stages"] = [recipe["stages"][0] | {"data": [{"path": str(tmp_path / "sft.jsonl"), "limit": 4}]}]
    drawn = [i for i in range(12) if "sft: row " in shown("--row", str(i))]
    assert len(drawn) == 4
    absent = next(i for i in range(12) if i not in drawn)
    assert f"no row {absent} among the 4 that are drawn" in shown("--row", str(absent))


def test_a_packed_row_is_found_by_the_row_that_it_holds(recipe: dict[str, Any], shown: Any) -> None:
    recipe["stages"] = recipe["stages"][:1]
    recipe["stages"][0]["trainer"] |= {"packing": True, "max_length": 100}
    out = shown("--row", "3")
    heading = next(line for line in out.splitlines() if line.startswith("sft: packed row "))
    assert ", which holds row 3: 3 documents, " in heading
    assert out.count("\n  row 3: ") == 1 and ROW_3 in out.split("\n  row 3: ")[1]
    assert shown("-n", "2").count("\nsft: packed row ") == 2


def test_answers_stand_side_by_side_where_there_is_room(recipe: dict[str, Any], jobs: Any) -> None:
    job = jobs()[1]
    wide, narrow = (on_terminal(lambda c: preview.show(job, c, list(range(6))), w, no_color=True) for w in (100, 20))
    assert any("chosen: " in line and "rejected: " in line for line in wide.splitlines())
    assert not any("chosen: " in line and "rejected: " in line for line in narrow.splitlines())
    for text in (wide, narrow):
        lines = [line.strip() for line in text.splitlines()]
        assert "⟧" not in lines and not any(line.startswith("⟧") for line in lines)
        assert text.count("⟦") == text.count("⟧") == 12


def test_a_terminal_shows_colour_and_no_marks(jobs: Any) -> None:
    text = on_terminal(lambda c: preview.show(jobs()[0], c, [0]), 100, color_system="standard")
    assert "\x1b[32mit is is the\x1b[0m\x1b[1;32m<|im_end|>\x1b[0m" in text and "⟦" not in text
    assert "\x1b[1;2m<|im_start|>\x1b[0m\x1b[2muser\x1b[0m" in text


def test_text_of_the_data_is_never_a_command(recipe: dict[str, Any], shown: Any, tmp_path: Path) -> None:
    hostile = "\x1b]0;owned\x07\x1b[2J [bold red]x[/] :smile: \u202egnp ⟦y⟧ \u2028 \r"
    rows = [row | {"messages": [row["messages"][0], {"role": "assistant", "content": hostile}]} for row in messages(2)]
    recipe["stages"] = [recipe["stages"][0] | {"data": str(write_jsonl(tmp_path / "hostile.jsonl", rows))}]
    out = shown("-n", "1")
    assert not {"\x1b", "\x07", "\u202e", "\u2028", "\r"} & set(out)
    assert "\\x1b]0;owned\\x07\\x1b[2J [bold red]x[/] :smile: \\u202egnp \\u27e6y\\u27e7 \\u2028 \\r" in out
    assert out.count("⟦") == out.count("⟧") == 2  # one in the legend


def test_blanks_at_the_edge_of_a_span_stay_with_it() -> None:
    assert preview._marked(" it is \n") == "⟦␣it is␣\\n⟧\n"
    assert preview._marked("\n\n") == "⟦\\n\\n⟧"
    assert preview._marked("") == "⟦⟧"


def test_sentencepiece_keeps_the_blank_between_prompt_and_answer() -> None:
    vocabulary = {"<unk>": 0, "</s>": 1, "▁what": 2, "▁is": 3, "▁red": 4}
    pieces = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    pieces.pre_tokenizer = pre_tokenizers.Metaspace()
    pieces.decoder = decoders.Metaspace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=pieces, eos_token="</s>", unk_token="<unk>")
    assert tokenizer.decode([3, 4]) == "is red"  # the blank is gone
    assert preview.render([2, 3, 4, 1], [False, False, True, True], tokenizer, True).plain == "what is⟦␣red</s>⟧"
    assert preview.render([4], [True], tokenizer, True, before=[2, 3]).plain == "⟦␣red⟧"


def test_a_character_of_several_tokens_cut_in_two_is_shown_as_broken() -> None:
    tokenizer = make_tokenizer()
    ids = tokenizer("é")["input_ids"]
    assert len(ids) == 2
    assert preview.render(ids, [False, True], tokenizer, True).plain == "�⟦�⟧"


def test_pairs_and_rows_of_one_command(recipe: dict[str, Any], shown: Any, tmp_path: Path) -> None:
    write_jsonl(tmp_path / "dpo.jsonl", pairs(12))
    out = shown("--row", "11")
    assert "sft: row 11: " in out and "dpo: row 11: prompt " in out and "all supervised" in out
