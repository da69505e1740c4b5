"""One stage, ready to be trained: what the modules that train, prove and verify it are given."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from toolkit.recipe.plan import Hardware, StagePlan
from toolkit.recipe.sections import Recipe
from toolkit.rows.data import StageData


@dataclass(frozen=True)
class StageJob:
    """A stage, its rows, and where it stands in the run."""

    recipe: Recipe
    plan: StagePlan
    hardware: Hardware
    base: dict[str, str]
    """What the base weights are: `{"commit": ...}` or `{"sha256": ...}`."""
    tokenizer: Any
    data: StageData
    start: Path | None
    """The adapter the stage starts from; `None` for the base."""
    folder: Path
    """The stage's folder in the run directory."""
    steps: int
    """Optimizer steps."""
    trainable: int
    """Parameters in training."""
    digest: str
    """Key of everything the stage's result depends on."""
    no_sharing: str | None
    """Why pairs do not share their prompt, as far as that is known before the weights are loaded."""

    def where(self, *location: str | int) -> str:
        """`file:line: key` of a place in this stage's part of the recipe."""
        return self.recipe.where("stages", self.plan.index, *location)
