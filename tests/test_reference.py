"""Reference log-probs: cached by meaning, equal to those of every step, and never able to change a result."""

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import toolkit
from tests.conftest import pairs, write_jsonl
from tests.tiny import CHATML, make_base
from toolkit.cli import main
from toolkit.job import StageJob
from toolkit.launching.signals import Stopped
from toolkit.models import model
from toolkit.records.rundir import RunDirectory
from toolkit.rows.grouping import LengthGrouped
from toolkit.training import dpo, reference
from toolkit.training.cache import NAMES, key, read_parts, write_part
from toolkit.training.prepare import prepare
from toolkit.training.progress import read_metrics


@pytest.fixture(autouse=True)
def cache(tmp_path: Path) -> Iterator[Path]:
    """A cache folder of the test's own."""
    before = os.environ["TOOLKIT_CACHE"]
    os.environ["TOOLKIT_CACHE"] = str(tmp_path / "cache")
    yield tmp_path / "cache" / "reference"
    os.environ["TOOLKIT_CACHE"] = before


@pytest.fixture
def train(recipe: dict[str, Any], write: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Any:
    """Train the DPO stage on the base (or the whole recipe) and return what was said about the reference."""
    recipe["stages"][1]["eval_data"] = str(write_jsonl(tmp_path / "eval.jsonl", pairs(5)))

    def _train(*overrides: str, output: str = "run", stages: int = 1) -> str:
        chosen = {**recipe, "stages": recipe["stages"][-stages:]}
        toolkit.train(write(chosen), output=tmp_path / output, overrides=overrides, fresh=True)
        return "\n".join(line.strip() for line in capsys.readouterr().out.splitlines() if "  reference: " in line)

    return _train


COMPUTED = "reference: 12 training pairs computed\nreference: 5 held-out pairs computed"
FOUND = COMPUTED.replace("computed", "from the cache: same base, start adapter, dtype and token ids")


def adapter_of(tmp_path: Path, run: str = "run") -> bytes:
    return (tmp_path / run / "adapter" / "adapter_model.safetensors").read_bytes()


@pytest.mark.parametrize("stages", [1, 2], ids=["base", "stacked"])
def test_cached_and_online_give_the_same_losses(train: Any, tmp_path: Path, stages: int) -> None:
    train(output="cached", stages=stages)
    assert train("stages.dpo.reference=online", output="online", stages=stages) == ""
    names = ("loss", "rewards/margins", "rewards/chosen", "grad_norm")
    losses = [
        torch.tensor([[line[name] for name in names] for line in read_metrics(file) if "loss" in line])
        for file in (tmp_path / run / "dpo" / "metrics.jsonl" for run in ("cached", "online"))
    ]
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-5, atol=1e-6)
    evals = [
        next(
            line["eval_rewards/margins"]
            for line in read_metrics(tmp_path / run / "dpo" / "metrics.jsonl")
            if "eval_loss" in line
        )
        for run in ("cached", "online")
    ]
    assert evals[0] == pytest.approx(evals[1], abs=1e-5)


@pytest.mark.parametrize(
    "override",
    [
        "seed=8",
        "lora.r=2",
        "lora.lora_alpha=3",
        "stages.dpo.trainer.learning_rate=1e-4",
        "stages.dpo.trainer.beta=0.5",
        "stages.dpo.trainer.num_train_epochs=2",
        "stages.dpo.trainer.per_device_train_batch_size=3",
    ],
)
def test_a_sweep_pays_once(train: Any, override: str) -> None:
    assert train() == COMPUTED
    assert train(override) == FOUND


@pytest.mark.parametrize(
    "override",
    ["stages.dpo.data=[{path: DATA, limit: 11}]", "stages.dpo.trainer.max_length=30", "model.name_or_path=OTHER", "model.chat_template=TEMPLATE", "quantization={load_in_8bit: true}", "model.dtype=bfloat16"],
)  # fmt: skip
def test_another_meaning_is_a_miss(train: Any, tmp_path: Path, override: str) -> None:
    assert train() == COMPUTED
    override = override.replace("DATA", str(tmp_path / "dpo.jsonl"))
    if "OTHER" in override:
        override = override.replace("OTHER", str(make_base(tmp_path / "other", initializer_range=0.3, hidden_size=64)))
    if "TEMPLATE" in override:
        (tmp_path / "other.jinja").write_text(CHATML.replace("\\n", " "))
        override = override.replace("TEMPLATE", str(tmp_path / "other.jinja"))
    assert " training pairs computed" in train(override, output="elsewhere")


def test_another_sft_adapter_is_a_miss(train: Any) -> None:
    assert train(stages=2) == COMPUTED
    assert train("stages.dpo.trainer.beta=0.3", stages=2) == FOUND
    assert train("stages.sft.trainer.learning_rate=5e-3", stages=2) == COMPUTED


def damage(file: Path, how: str) -> None:
    tensors = load_file(file)
    if how == "cut":
        file.write_bytes(file.read_bytes()[:-7])
    elif how == "flipped":
        data = bytearray(file.read_bytes())
        data[-3] ^= 0x40
        file.write_bytes(bytes(data))
    elif how == "version":
        save_file(tensors, file, metadata={"version": "0"})
    elif how == "forged":  # other numbers, under a checksum that fits them
        from toolkit.training.cache import NAMES, ROWS, VERSION, _checksum

        tensors = {name: tensors[name] + 3 * (name in NAMES) for name in (ROWS, *NAMES) if name in tensors}
        about = {"version": VERSION, "key": file.name.strip(".").split(".")[0], "sha256": _checksum(tensors)}
        save_file(tensors, file, metadata=about)


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ("cut", "damaged (Error while deserializing"),
        ("flipped", "does not hold what it was written with"),
        ("version", "written by another version (0)"),
        ("forged", "the cache disagrees with the reference model by"),
    ],
)
def test_a_bad_entry_is_computed_again_and_changes_nothing(
    train: Any, cache: Path, tmp_path: Path, how: str, said: str
) -> None:
    train()
    good = adapter_of(tmp_path)
    for file in cache.glob("*.safetensors"):
        damage(file, how)
    again = train()
    assert again.count(said) == again.count("; computed again") == 2
    assert adapter_of(tmp_path) == good
    assert train() == FOUND


@pytest.fixture
def job(recipe: dict[str, Any], write: Any, tmp_path: Path) -> StageJob:
    """DPO on the base: 12 pairs in six batches of the reference pass."""
    recipe["stages"] = recipe["stages"][1:]
    recipe["stages"][0]["trainer"]["per_device_train_batch_size"] = 1
    return prepare(toolkit.load_recipe(write(recipe)), RunDirectory(tmp_path / "run")).jobs[0]


def reference_pass(job: StageJob, before_third: Callable[[], None] | None = None) -> tuple[list[list[float]], int]:
    """The log-probs of a pass, and how often it ran the model; something happens before it does so a third time."""
    built = dpo.build(job, model.load_base(job.recipe, job.hardware))
    runs: list[None] = []

    def count(*_: Any) -> None:
        if before_third is not None and len(runs) == 2:
            before_third()
        runs.append(None)

    built.model.get_base_model().model.layers[0].register_forward_pre_hook(count)
    rows = reference.with_reference(job, built, built.train_dataset, "training")
    return [list(rows[name]) for name in NAMES], len(runs)


def interrupt(job: StageJob, error: BaseException) -> None:
    def fail() -> None:
        raise error

    with pytest.raises(type(error)):
        reference_pass(job, fail)


def whole_pass(job: StageJob, cache: Path) -> list[list[float]]:
    """What an uninterrupted pass computes; nothing of it is left behind."""
    values, runs = reference_pass(job)
    assert runs == 6
    (entry,) = cache.iterdir()
    entry.unlink()
    return values


@pytest.mark.parametrize("error", [Stopped(signal.SIGTERM), OSError("a disk fails")], ids=["signal", "error"])
def test_an_interrupted_pass_goes_on_where_it_was(
    job: StageJob, cache: Path, capsys: pytest.CaptureFixture[str], error: BaseException
) -> None:
    whole = whole_pass(job, cache)
    interrupt(job, error)
    assert [file.suffix for file in cache.iterdir()] == [".part"]
    assert reference_pass(job) == (whole, 1 + 4)  # a check of what was stored, and the batches that were not
    assert "reference: 4 of 12 training pairs were computed before the interruption" in capsys.readouterr().out
    assert [file.suffix for file in cache.iterdir()] == [".safetensors"]


@pytest.mark.parametrize(("seconds", "stored"), [(0.0, 4), (30.0, 0)])
def test_a_killed_pass_has_stored_what_was_known_some_seconds_ago(
    job: StageJob, cache: Path, monkeypatch: pytest.MonkeyPatch, seconds: float, stored: int
) -> None:
    monkeypatch.setattr(reference, "KEPT_EVERY", seconds)
    found: list[int] = []
    reference_pass(job, lambda: found.append(len(read_parts(key(job, job.data.train), 12)[0])))
    assert found == [stored]
    assert [file.suffix for file in cache.iterdir()] == [".safetensors"]


@pytest.mark.parametrize(
    ("how", "said", "runs"),
    [
        ("cut", "damaged (Error while deserializing", 6),
        ("flipped", "does not hold what it was written with", 6),
        ("version", "written by another version (0)", 6),
        ("forged", "what an interrupted pass left behind disagrees with the reference model by", 1 + 6),
    ],
)
def test_a_bad_part_is_computed_again_and_changes_nothing(
    job: StageJob, cache: Path, capsys: pytest.CaptureFixture[str], how: str, said: str, runs: int
) -> None:
    whole = whole_pass(job, cache)
    interrupt(job, Stopped(signal.SIGTERM))
    damage(next(cache.glob(".*.part")), how)
    assert reference_pass(job) == (whole, runs)
    assert capsys.readouterr().out.count(said) == 1


def test_parts_of_several_processes_are_put_together_and_of_other_rows_left_out(cache: Path) -> None:
    write_part("key", 0, {0: [-1.5, -2.5], 7: [-3.0, -4.0]})
    write_part("key", 1, {2: [-5.0, -6.0], 7: [-3.0, -4.0]})
    assert read_parts("key", 8) == ({0: [-1.5, -2.5], 2: [-5.0, -6.0], 7: [-3.0, -4.0]}, [])
    assert read_parts("key", 7) == ({}, [".key.0.part: has other rows", ".key.1.part: has other rows"])
    assert read_parts("other", 8) == ({}, [])
    (cache / ".key.0.part").rename(cache / ".other.0.part")
    assert read_parts("other", 8) == ({}, [".other.0.part: does not hold what it was written with"])


def test_a_cache_that_cannot_be_written_is_done_without(train: Any, cache: Path, tmp_path: Path) -> None:
    train(output="with")
    os.environ["TOOLKIT_CACHE"] = str(tmp_path / "file")
    (tmp_path / "file").write_text("not a folder")
    assert train(output="without").count("; not kept: ") == 2
    assert adapter_of(tmp_path, "with") == adapter_of(tmp_path, "without")


def test_two_runs_fill_the_same_key(recipe: dict[str, Any], write: Any, cache: Path, tmp_path: Path) -> None:
    file = write({**recipe, "stages": recipe["stages"][1:]})
    command = [sys.executable, "-m", "toolkit", "train", str(file), "--output"]
    both = [subprocess.Popen([*command, str(tmp_path / name)], stdout=subprocess.DEVNULL) for name in "ab"]
    assert [process.wait() for process in both] == [0, 0]
    assert adapter_of(tmp_path, "a") == adapter_of(tmp_path, "b")
    assert [file.suffix for file in cache.iterdir()] == [".safetensors"]


def test_reference_is_a_step_of_its_own(
    recipe: dict[str, Any], write: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file, output = str(write(recipe)), str(tmp_path / "run")
    assert main(["reference", file, "--output", output]) == 2
    assert "starts from sft, which is not finished" in capsys.readouterr().err
    assert main(["train", file, "--output", output, "--stage", "sft"]) == 0
    assert main(["reference", file, "--output", output]) == 0
    assert "reference: 12 training pairs computed" in capsys.readouterr().out
    assert main(["train", file, "--output", output]) == 0
    assert "reference: 12 training pairs from the cache" in capsys.readouterr().out


def test_reference_on_the_base_comes_before_everything_else(recipe: dict[str, Any], write: Any, tmp_path: Path) -> None:
    file = write({**recipe, "stages": recipe["stages"][1:]})
    assert toolkit.compute_reference(file, output=tmp_path / "run") == ["dpo"]
    assert toolkit.train(file, output=tmp_path / "run").adapter is not None


def test_sft_has_no_reference(recipe: dict[str, Any], write: Any) -> None:
    recipe["stages"][0]["reference"] = "online"
    with pytest.raises(toolkit.RecipeError, match=r"stages\[0\].reference: is for dpo stages"):
        toolkit.load_recipe(write(recipe))


def test_grouping_puts_like_lengths_together_and_every_row_anywhere() -> None:
    lengths = [((7 * i) % 97 + 40, (11 * i) % 37 + 1) for i in range(400)]
    sampler = LengthGrouped(lengths, batch_size=4, seed=1)
    first, again = list(sampler), list(sampler)
    assert first == again
    assert sorted(first) == list(range(400))
    batches = [first[i : i + 4] for i in range(0, 400, 4)]

    def spread(of: int) -> float:
        return sum(max(lengths[r][of] for r in b) - min(lengths[r][of] for r in b) for b in batches) / len(batches)

    assert spread(0) < 10  # 58 in a random order
    assert spread(1) < 10  # 22 in a random order, 21 where only the total is looked at
    where = {row: [] for row in (lengths.index(max(lengths)), lengths.index(min(lengths)))}
    for epoch in range(200):
        sampler.set_epoch(epoch)
        order = list(sampler)
        for row, places in where.items():
            places.append(order.index(row) / 400)
    for places in where.values():  # the longest row and the shortest come early and late alike
        assert 0.4 < sum(places) / len(places) < 0.6


def test_a_short_batch_stands_at_the_end() -> None:
    order = list(LengthGrouped([(n, n) for n in range(1, 12)], batch_size=4, seed=3))
    assert sorted(order) == list(range(11))
