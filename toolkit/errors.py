"""Every error the toolkit raises on purpose.

ToolkitError            exit code 2: bad input, said without a traceback
├── RecipeError         the recipe file, all of its problems at once
├── DataError           a data source: missing, empty, wrong columns
├── ModelError          base model, tokenizer, chat template, adapter configuration
├── RunError            the run directory: another recipe's, not writable, disk full
└── ProofError          exit code 3: a check on the result failed (reference proof, reloaded adapter)
"""

from dataclasses import dataclass


class ToolkitError(Exception):
    """Base of all errors that are answers rather than bugs."""

    exit_code = 2


class DataError(ToolkitError):
    """A data source cannot be used as asked."""


class ModelError(ToolkitError):
    """The base model, its tokenizer or an adapter cannot be used as asked."""


class RunError(ToolkitError):
    """The run directory cannot be used as asked."""


class ProofError(ToolkitError):
    """What was computed is not what was promised; nothing that failed a proof is called finished."""

    exit_code = 3


@dataclass(frozen=True)
class Problem:
    """One thing wrong with a recipe: where it stands, the dotted key, and what to do about it."""

    where: str
    key: str
    text: str

    def __str__(self) -> str:
        return ": ".join(part for part in (self.where, self.key, self.text) if part)


class RecipeError(ToolkitError):
    """A recipe that cannot be used, with every problem found in it."""

    def __init__(self, problems: list[Problem]):
        self.problems = problems
        super().__init__("\n".join(str(problem) for problem in problems))
