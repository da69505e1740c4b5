"""What a check says about a recipe, its data, its template or the machine: one sentence, how bad, and where."""

from dataclasses import asdict, dataclass
from typing import Any, Literal

Level = Literal["error", "warning", "note"]
ROWS_NAMED = 5


@dataclass(frozen=True)
class Finding:
    """One thing worth knowing before training.

    An `error` stops `toolkit train`; a `warning` does so under `--strict` only; a `note` is a fact.
    """

    level: Level
    check: str
    """Short and stable, for machines and for searching: `length-bias`."""
    where: str
    """`file:line: key`, or what it is about."""
    text: str
    """What was found, what it means, and the way out."""
    rows: tuple[int, ...] = ()
    """Rows of the data source, counted from 0."""

    def as_dict(self) -> dict[str, Any]:
        """For `--json`."""
        return asdict(self)

    def __str__(self) -> str:
        rows = ""
        if self.rows:
            named = ", ".join(str(row) for row in self.rows[:ROWS_NAMED])
            more = len(self.rows) - ROWS_NAMED
            rows = f" (row {named}" if len(self.rows) == 1 else f" (rows {named}"
            rows += f" and {more:,} more)" if more > 0 else ")"
        return f"{self.where}: {self.text}{rows}"
