"""One recipe file in, one adapter out: SFT and DPO with TRL and LoRA, the reference stated and proven."""

import os
from typing import TYPE_CHECKING, Any

from toolkit.errors import DataError, ModelError, ProofError, RecipeError, RunError, ToolkitError
from toolkit.recipe.load import load_recipe
from toolkit.recipe.sections import Recipe

if TYPE_CHECKING:
    from toolkit.run import RunResult, compute_reference, evaluate_run, train

# TRL and the Hub client report use unless told not to, and read this when they are imported.
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")

# transformers would have the Hub convert weights that are pickles, from a pull request that anyone may open
os.environ.setdefault("DISABLE_SAFETENSORS_CONVERSION", "1")

__all__ = [
    "DataError",
    "ModelError",
    "ProofError",
    "Recipe",
    "RecipeError",
    "RunError",
    "RunResult",
    "ToolkitError",
    "compute_reference",
    "evaluate_run",
    "load_recipe",
    "train",
]


def __getattr__(name: str) -> Any:
    """What brings torch and trl along is imported when it is first used."""
    if name in ("train", "compute_reference", "evaluate_run", "RunResult"):
        from toolkit.models.kernels import import_bitsandbytes

        import_bitsandbytes()
        from toolkit import run

        return getattr(run, name)
    raise AttributeError(f"module 'toolkit' has no attribute {name!r}")
