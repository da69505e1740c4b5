"""One recipe file in, one adapter out: SFT and DPO with TRL and LoRA, the reference stated and proven."""

import os
from typing import TYPE_CHECKING, Any

from toolkit.errors import DataError, ModelError, ProofError, RecipeError, RunError, ToolkitError
from toolkit.load import load_recipe
from toolkit.recipe import Recipe

if TYPE_CHECKING:
    from toolkit.run import RunResult, train

# TRL and the Hub client report use unless told not to, and read this when they are imported.
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")

__all__ = [
    "DataError",
    "ModelError",
    "ProofError",
    "Recipe",
    "RecipeError",
    "RunError",
    "RunResult",
    "ToolkitError",
    "load_recipe",
    "train",
]


def __getattr__(name: str) -> Any:
    """`train` and `RunResult` bring torch and trl with them, so they are imported when they are first used."""
    if name in ("train", "RunResult"):
        from toolkit import run

        return getattr(run, name)
    raise AttributeError(f"module 'toolkit' has no attribute {name!r}")
