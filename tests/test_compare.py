"""Several runs beside each other, runs line by line, and recipes that differ."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest

import toolkit
from tests.test_report import Page, assert_self_contained
from toolkit.cli import main
from toolkit.pages import settings
from toolkit.pages.compare import compare, diff, list_runs, results
from toolkit.records.history import read_run


@pytest.fixture
def runs(finished_run: Path, tmp_path: Path) -> Path:
    """A folder with three runs that differ in beta and in the loss they ended with."""
    for name, beta, loss in (("one", 0.1, 0.5), ("two", 0.3, 0.2), ("three", 0.5, None)):
        run = Path(shutil.copytree(finished_run, tmp_path / "runs" / name))
        resolved = json.loads((run / "resolved.json").read_text())
        resolved["stages"][1]["trainer"]["beta"] = beta
        (run / "resolved.json").write_text(json.dumps(resolved))
        lines = [{"step": step, "loss": 0.69, "eval_loss": 0.7} for step in (1, 2)] + [{"step": 3, "loss": loss}]
        (run / "dpo" / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return tmp_path / "runs"


def rows(file: Path) -> list[list[str]]:
    """The cells of the page's table."""
    text = re.sub(r"\s+", " ", file.read_text(encoding="utf-8"))
    found = [re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", row) for row in re.findall(r"<tr[^>]*>(.*?)</tr>", text)]
    return [row for row in found if row]


def test_differing_settings_beside_differing_results_best_first(runs: Path) -> None:
    target, said = compare([runs / name for name in ("one", "two", "three")], sort="loss")
    assert target == runs.resolve() / "comparison.html"
    assert said.splitlines() == ["two  dpo.loss 0.2", "one  dpo.loss 0.5", "three"]
    assert_self_contained(target)
    assert rows(target) == [
        ["", "two", "one", "three"],
        ["settings"],
        ["dpo.trainer.beta", "0.3", "0.1", "0.5"],
        ["results"],
        ["dpo.loss", "0.2", "0.5", "-"],
    ]
    assert "dpo: Loss, training, over optimizer steps: two from 0.69 to 0.2" in Page(target).text


def test_more_is_better_for_some_metrics(runs: Path) -> None:
    for name, accuracy in (("one", 0.25), ("two", 0.75)):
        file = runs / name / "evaluation.json"
        models = {"dpo": {"preference": {"accuracy": {"value": accuracy}}}}
        file.write_text(json.dumps({"models": models, "samples": []}))
    _, said = compare([runs / "one", runs / "two"], sort="preference.accuracy", output=runs / "x" / "page.html")
    assert said.splitlines() == ["two  dpo.preference.accuracy 0.75", "one  dpo.preference.accuracy 0.25"]
    assert (runs / "x" / "page.html").is_file()


def test_an_unknown_metric_is_said_and_nothing_is_written(runs: Path) -> None:
    with pytest.raises(toolkit.RunError, match=r"--sort los: no run has this metric; did you mean 'loss'\?; found "):
        compare([runs / "one", runs / "two"], sort="los")
    assert not (runs / "comparison.html").exists()


def test_any_logged_number_can_be_sorted_by(runs: Path) -> None:
    for name, kl in (("one", 0.75), ("two", 0.25)):
        with (runs / name / "dpo" / "metrics.jsonl").open("a") as stream:
            stream.write(json.dumps({"step": 3, "eval_guard/kl": kl}) + "\n")
    target, said = compare([runs / "one", runs / "two"], sort="eval_guard/kl")
    assert said.splitlines() == ["two  dpo.eval_guard/kl 0.25", "one  dpo.eval_guard/kl 0.75"]
    assert [row[0] for row in rows(target)] == [
        "", "settings", "dpo.trainer.beta", "results", "dpo.eval_guard/kl", "dpo.loss",
    ]  # fmt: skip
    assert "dpo: KL to the reference, held-out, over optimizer steps: two from 0.25" in Page(target).text


def test_runs_of_one_name_are_told_apart(runs: Path) -> None:
    (runs / "a").mkdir()
    (runs / "b").mkdir()
    (runs / "one").rename(runs / "a" / "run")
    (runs / "two").rename(runs / "b" / "run")
    _, said = compare([runs / "a" / "run", runs / "b" / "run"])
    assert said.splitlines() == ["a/run", "b/run"]


def test_unfinished_empty_and_many_runs_fit_on_one_page(runs: Path) -> None:
    (runs / "one" / "dpo" / "stage.json").unlink()
    (runs / "two" / "dpo" / "metrics.jsonl").write_text("")
    for i in range(40):
        shutil.copytree(runs / "three", runs / f"many{i}")
        lines = [{"step": step, "loss": (step * i % 97) / 97} for step in range(3_000)]
        (runs / f"many{i}" / "sft" / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    target, said = compare(sorted(path for path in runs.iterdir()), sort="sft.loss")
    assert len(said.splitlines()) == 43
    found = assert_self_contained(target)
    assert "Of the first 16 runs in this order; 27 more are in the table only." in found.text


def test_results_are_numbers_by_stage_and_model(finished_run: Path) -> None:
    found = results(read_run(finished_run))
    assert {"sft.loss", "dpo.eval_loss", "dpo.rewards/margins", "dpo.seconds", "dpo.peak_memory_bytes"} <= set(found)
    assert found["sft.tokens_per_second"] > 0
    evaluation = json.loads((finished_run / "evaluation.json").read_text())
    assert found["dpo.scores.right"] == evaluation["scores"]["right"]["dpo"]


def test_a_line_for_each_run(runs: Path) -> None:
    (runs / "one" / "dpo" / "stage.json").unlink()
    shutil.rmtree(runs / "three" / "dpo")
    (runs / "broken").mkdir()
    (runs / "broken" / "resolved.json").write_text("[1]")
    (runs / "notes.txt").write_text("not a run")
    lines = list_runs(runs).splitlines()
    date = r"\d{4}-\d\d-\d\d \d\d:\d\d"
    assert lines[0].startswith("broken") and "cannot be read" in lines[0]
    assert re.fullmatch(rf"one +{date} +\S+ +sft finished, dpo step 3 of 3 +dpo: loss 0.5, eval loss 0.7", lines[1])
    assert re.fullmatch(rf"three +{date} +\S+ +sft finished, dpo not run +sft: loss [\d.]+", lines[2])
    assert re.fullmatch(rf"two +{date} +\S+ +sft finished, dpo finished +dpo: loss 0.2, eval loss 0.7", lines[3])
    with pytest.raises(toolkit.RunError, match="no run is in here"):
        list_runs(Path(__file__).parent)


def test_recipes_differ_in_what_they_resolve_to(recipe: dict[str, Any], write: Any) -> None:
    del recipe["stages"][0]
    write(recipe, "one.yaml")
    same = {**recipe, "stages": [{**recipe["stages"][0], "name": "dpo", "reference": "cached"}]}
    one, other = (toolkit.load_recipe(write(r, n)) for r, n in ((recipe, "one.yaml"), (same, "other.yaml")))
    assert diff(one, other) == "no differences"
    longer = "extends: one.yaml\nlora: {r: 8}\nseed: 8\n"
    changed = toolkit.load_recipe(write(longer, "longer.yaml"), ["stages.dpo.trainer.beta=0.2"])
    lines = [line.split() for line in diff(one, changed).splitlines()]
    assert lines == [
        ["one.yaml", "longer.yaml"],
        ["lora.r", "4", "8"],
        ["stages.dpo.lora.r", "4", "8"],
        ["stages.dpo.trainer.beta", "0.1", "0.2"],
        ["seed", "7", "8"],
    ]


def test_paths_are_shortened_as_far_as_they_stay_different() -> None:
    assert settings.tails(["/data/v1/train.jsonl", "/data/v2/train.jsonl"]) == ["v1/train.jsonl", "v2/train.jsonl"]
    assert settings.tails(["/data/v1/a.jsonl", "/data/v1/b.jsonl", None]) == ["a.jsonl", "b.jsonl", "-"]
    assert settings.tails([True, 5e-6, ["q_proj", "v_proj"]]) == ["true", "5e-06", "q_proj, v_proj"]


def test_the_commands(runs: Path, finished_run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = str(finished_run.parent / "recipe.yaml")
    assert main(["diff", recipe, recipe]) == 0
    assert capsys.readouterr().out == "no differences\n"
    assert main(["diff", str(finished_run), recipe]) == 0
    assert capsys.readouterr().out == "no differences\n"
    assert main(["diff", recipe, str(runs.parent)]) == 2
    assert "is not a run directory" in capsys.readouterr().err
    assert main(["report", "--list", str(runs)]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 3
    assert main(["report", str(runs / "one")]) == 0
    assert capsys.readouterr().out == f"{runs / 'one' / 'report.html'}\n"
    assert main(["report", str(runs / "one"), str(runs / "two"), "--sort", "dpo.loss"]) == 0
    assert capsys.readouterr().out.endswith(f"\n\n{(runs / 'comparison.html').resolve()}\n")
    for wrong in (["report"], ["report", "a", "--sort", "loss"], ["report", "a", "--list", "b"]):
        assert main(wrong) == 2
        assert capsys.readouterr().err.startswith("error: ")
