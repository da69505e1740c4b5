"""Each stage logs to a run of its own in the trackers that are installed, under names that join the stages."""

import sqlite3
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import yaml

import toolkit
from tests.conftest import messages, pairs, write_jsonl
from toolkit.training import trackers

INSTALLED = [name for name in ("tensorboard", "mlflow", "wandb", "trackio") if find_spec(name)]


@pytest.fixture(scope="module")
def tracked(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which SFT, then DPO, logged to all trackers that are installed, the run's name being `run`."""
    folder = tmp_path_factory.mktemp("tracked")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        places = {
            "TENSORBOARD_LOGGING_DIR": "board",
            "TRACKIO_DIR": "trackio",
            "WANDB_DIR": ".",
            "WANDB_CACHE_DIR": "c",
        }
        for name, place in places.items():
            patch.setenv(name, str(folder / place))
        patch.setenv("WANDB_MODE", "offline")
        patch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{folder / 'mlflow.db'}")
        patch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")
        trainer = {"per_device_train_batch_size": 4, "learning_rate": 1e-2, "report_to": INSTALLED, "logging_steps": 1}
        trainer |= {"gradient_checkpointing": False, "save_strategy": "no"}
        recipe: dict[str, Any] = {"model": {"name_or_path": str(base), "dtype": "float32"}, "lora": {"r": 4}}
        recipe["stages"] = [
            {"type": "sft", "data": str(write_jsonl(folder / "sft.jsonl", messages(12))), "trainer": trainer},
            {"type": "dpo", "data": str(write_jsonl(folder / "dpo.jsonl", pairs(8))), "trainer": trainer},
        ]
        (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
        toolkit.train(folder / "recipe.yaml", output=folder / "run")
    return folder


def needs(name: str) -> pytest.MarkDecorator:
    return pytest.mark.skipif(name not in INSTALLED, reason=f"{name} is not installed")


def scalars(folder: Path) -> dict[str, list[int]]:
    """Tag -> steps, in one folder of TensorBoard."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found = EventAccumulator(str(folder)).Reload()
    return {tag: [event.step for event in found.Scalars(tag)] for tag in found.Tags()["scalars"]}


@needs("tensorboard")
def test_tensorboard(tracked: Path) -> None:
    assert sorted(place.name for place in (tracked / "board").iterdir()) == ["run-dpo", "run-sft"]
    sft, dpo = scalars(tracked / "board" / "run-sft"), scalars(tracked / "board" / "run-dpo")
    assert (sft["train/loss"], dpo["train/loss"]) == ([1, 2, 3], [1, 2])
    assert "train/rewards/margins" in dpo and "train/rewards/margins" not in sft


@needs("tensorboard")
def test_tensorboards_own_place_is_the_stages_folder(recipe: dict[str, Any], write: Any, tmp_path: Path) -> None:
    del recipe["stages"][1]
    recipe["stages"][0]["trainer"]["report_to"] = "tensorboard"
    toolkit.train(write(recipe), output=tmp_path / "run")
    assert scalars(tmp_path / "run" / "sft" / "tensorboard")["train/loss"] == [1, 2, 3]


@needs("mlflow")
def test_mlflow(tracked: Path) -> None:
    with sqlite3.connect(tracked / "mlflow.db") as store:
        asked = (
            "select name, status, max(step) from runs join metrics using (run_uuid) where key = 'loss' group by name"
        )
        assert store.execute(asked).fetchall() == [("run-dpo", "FINISHED", 2), ("run-sft", "FINISHED", 3)]


@needs("wandb")
def test_wandb(tracked: Path) -> None:
    import wandb

    assert wandb.run is None
    logged = [file.read_bytes() for file in sorted((tracked / "wandb").glob("offline-run-*/*.wandb"))]
    assert sorted((b"run-sft" in log, b"run-dpo" in log) for log in logged) == [(False, True), (True, False)]


@needs("trackio")
def test_trackio(tracked: Path) -> None:
    with sqlite3.connect(tracked / "trackio" / "huggingface.db") as store:
        asked = (
            "select run_name, count(*) from metrics where cast(metrics as text) like '%train/loss%' group by run_name"
        )
        assert store.execute(asked).fetchall() == [("run-dpo", 2), ("run-sft", 3)]


@pytest.mark.skipif("mlflow" in INSTALLED, reason="mlflow is installed")
@pytest.mark.filterwarnings("error")
def test_one_that_is_missing_is_said_and_nothing_else() -> None:
    with pytest.raises(RuntimeError, match="pip install mlflow"):
        trackers.check(["mlflow"])
