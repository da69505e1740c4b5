"""Trackers stay the ecosystem's; here each stage gets a run of its own, named after the run directory and the stage."""

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from transformers.integrations import TensorBoardCallback, get_reporting_integration_callbacks

from toolkit.job import StageJob

TENSORBOARD = "tensorboard"


def run_name(job: StageJob) -> str:
    """`RUN-STAGE`: stages of one recipe stand together, and apart from other runs of it."""
    return f"{job.folder.parent.name}-{job.plan.name}"


def check(report_to: Sequence[str]) -> None:
    """Find out whether the packages are installed.

    Raises:
        RuntimeError: one is not; the text says how to install it.
    """
    for tracker in get_reporting_integration_callbacks(report_to):
        # MLflow's `__del__` reads what its `__init__` sets, which fails without the package
        type(tracker.__name__, (tracker,), {"_auto_end_run": False})()


@contextmanager
def own_run(trainer: Any, job: StageJob) -> Iterator[None]:
    """Give what is logged inside a place of its own, and close it, so that the next stage does not log into it.

    TensorBoard: `STAGE/tensorboard` in the run directory, or a folder with the run's name in TENSORBOARD_LOGGING_DIR.
    A run of wandb or MLflow that was open before is its owner's: it is logged into, and stays open.
    """
    for callback in trainer.callback_handler.callbacks:
        if isinstance(callback, TensorBoardCallback):
            named = callback.logging_dir and Path(callback.logging_dir, trainer.args.run_name)
            callback.logging_dir = str(named or job.folder / TENSORBOARD)
    before, failed = _open_runs(), True
    try:
        yield
        failed = False
    finally:
        ours = _open_runs() - before
        if "wandb" in ours:  # which transformers leaves open
            sys.modules["wandb"].finish(exit_code=int(failed))
        if "mlflow" in ours:  # which transformers leaves open after an error
            sys.modules["mlflow"].end_run("FAILED")


def _open_runs() -> set[str]:
    wandb, mlflow = sys.modules.get("wandb"), sys.modules.get("mlflow")
    runs = {"wandb": getattr(wandb, "run", None), "mlflow": mlflow and mlflow.active_run()}
    return {name for name, run in runs.items() if run is not None}
