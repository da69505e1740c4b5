"""Tiny real models, real tokenizers, real data; everything is built here and nothing is fetched."""

import os
import tempfile

from tests.forks import Forks
from tests.hub_server import ENDPOINT, StandInHub

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_ENDPOINT"] = ENDPOINT  # the client reads it once; nothing listens there but the stand-in Hub
os.environ["HF_HUB_DISABLE_XET"] = "1"  # the stand-in speaks plain LFS
os.environ["HF_HOME"] = tempfile.mkdtemp(prefix="hf-home-")  # neither the user's cache nor the user's token
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ.setdefault("OMP_NUM_THREADS", "1")  # tiny models gain nothing from threads, and lose much to a busy machine

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

os.environ["TOOLKIT_CACHE"] = tempfile.mkdtemp(prefix="toolkit-cache-")  # never the user's own

WORDS = [
    "the",
    "sun",
    "is",
    "red",
    "and",
    "a",
    "moon",
    "was",
    "blue",
    "but",
    "all",
    "stars",
    "are",
    "white",
    "or",
    "green",
    "at",
    "night",
    "in",
    "our",
    "sky",
]


def pytest_runtest_setup(item: pytest.Item) -> None:
    """What is marked `gpu` waits for a machine that has one."""
    if item.get_closest_marker("gpu"):
        import torch

        if not torch.cuda.is_available():
            pytest.skip("needs a CUDA device")


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama with two layers, its tokenizer and a ChatML template."""
    from tests.tiny import make_base

    return make_base(tmp_path_factory.mktemp("base"))


def answers(n: int) -> list[dict[str, Any]]:
    """Questions with an answer, a preferred one and a rejected one, of unequal lengths."""
    rows = []
    for i in range(n):
        a, b, c = WORDS[i % 19], WORDS[(i * 3 + 1) % 19], WORDS[(i * 7 + 2) % 19]
        rows.append({"question": f"what is {a} {b}", "good": f"it is {c} {a}", "bad": f"no {b} " * (1 + i % 3)})
    return rows


def messages(n: int) -> list[dict[str, Any]]:
    return [
        {"messages": [{"role": "user", "content": r["question"]}, {"role": "assistant", "content": r["good"]}]}
        for r in answers(n)
    ]


def pairs(n: int) -> list[dict[str, Any]]:
    return [
        {
            "prompt": [{"role": "user", "content": r["question"]}],
            "chosen": [{"role": "assistant", "content": r["good"]}],
            "rejected": [{"role": "assistant", "content": r["bad"]}],
        }
        for r in answers(n)
    ]


def write_jsonl(file: Path, rows: list[dict[str, Any]]) -> Path:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return file


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., Path]:
    """Write a recipe, given as a mapping or as YAML text, and return its file."""

    def _write(recipe: dict[str, Any] | str, name: str = "recipe.yaml") -> Path:
        file = tmp_path / name
        file.write_text(recipe if isinstance(recipe, str) else yaml.safe_dump(recipe, sort_keys=False))
        return file

    return _write


@pytest.fixture(scope="session")
def forks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Forks]:
    """Runs of the command line that cost no import, and what may befall them."""
    forks = Forks(tmp_path_factory.mktemp("disk"))
    yield forks
    forks.close()


@pytest.fixture(scope="session")
def finished_run(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of SFT and DPO with held-out pairs and an evaluation, as `toolkit train` leaves it; not to be changed."""
    import toolkit

    folder = tmp_path_factory.mktemp("finished")
    trainer = {"per_device_train_batch_size": 4, "gradient_checkpointing": False, "logging_steps": 1}
    trainer |= {"learning_rate": 1e-2, "save_strategy": "no"}
    held = [{"prompt": f"what is {word}", "answer": word[0]} for word in WORDS[:4]]
    sft = {"type": "sft", "data": str(write_jsonl(folder / "sft.jsonl", messages(12))), "trainer": trainer}
    dpo = {"type": "dpo", "data": str(write_jsonl(folder / "dpo.jsonl", pairs(12))), "trainer": trainer}
    dpo["eval_data"] = str(write_jsonl(folder / "dpo_heldout.jsonl", pairs(4)))
    evaluate = {"data": str(write_jsonl(folder / "held.jsonl", held)), "max_new_tokens": 4, "scores": {}}
    evaluate["scores"] = {"right": {"column": "answer"}}
    model = {"name_or_path": str(base), "dtype": "float32"}
    recipe = {"model": model, "lora": {"r": 4}, "stages": [sft, dpo], "evaluate": evaluate, "seed": 7}
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe, sort_keys=False))
    return toolkit.train(folder / "recipe.yaml", output=folder / "run").output


@pytest.fixture
def recipe(base: Path, tmp_path: Path) -> dict[str, Any]:
    """SFT then DPO on tiny data, in float32, a few steps each."""
    trainer = {
        "per_device_train_batch_size": 4,
        "gradient_checkpointing": False,
        "logging_steps": 1,
        "learning_rate": 1e-2,
        "save_strategy": "no",
    }
    return {
        "model": {"name_or_path": str(base), "dtype": "float32"},
        "lora": {"r": 4, "lora_alpha": 8},
        "stages": [
            {"type": "sft", "data": str(write_jsonl(tmp_path / "sft.jsonl", messages(12))), "trainer": dict(trainer)},
            {"type": "dpo", "data": str(write_jsonl(tmp_path / "dpo.jsonl", pairs(12))), "trainer": dict(trainer)},
        ],
        "seed": 7,
    }


@pytest.fixture(scope="session")
def server() -> StandInHub:
    """One for all tests: it has the one port that the client knows."""
    return StandInHub()


@pytest.fixture
def hub(server: StandInHub, monkeypatch: pytest.MonkeyPatch) -> Iterator[StandInHub]:
    """An empty Hub, online, with a token that may write."""
    server.clear()
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_TOKEN", "hf_writer")
    yield server


def write_recipe(folder: Path, base: Path) -> Path:
    """A recipe that extends another, on data beside it and a local base."""
    trainer = {
        "per_device_train_batch_size": 4,
        "gradient_checkpointing": False,
        "logging_steps": 1,
        "learning_rate": 1e-2,
    }
    write_jsonl(folder / "sft.jsonl", messages(8))
    write_jsonl(folder / "dpo.jsonl", pairs(8))
    shared = {"model": {"name_or_path": str(base), "dtype": "float32", "chat_template": "zephyr"}, "lora": {"r": 4}}
    stages = [{"type": kind, "data": f"./{kind}.jsonl", "trainer": trainer} for kind in ("sft", "dpo")]
    (folder / "shared.yaml").write_text(yaml.safe_dump(shared))
    (folder / "recipe.yaml").write_text(yaml.safe_dump({"extends": "shared.yaml", "stages": stages}))
    return folder / "recipe.yaml"


@pytest.fixture(scope="session")
def trained(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of that recipe, for reading."""
    from toolkit import train

    folder = tmp_path_factory.mktemp("experiment")
    return train(write_recipe(folder, base), output=folder / "run", overrides=("seed=3",)).output


@pytest.fixture
def run(trained: Path, tmp_path: Path) -> Path:
    """A copy of it, for writing."""
    return Path(shutil.copytree(trained, tmp_path / "run"))
