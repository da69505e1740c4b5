"""The rows of a data source: files and Hub data sets, renamed and drawn."""

import csv
import difflib
import random
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import datasets
from datasets import Dataset

from toolkit.errors import DataError
from toolkit.recipe.sections import Source
from toolkit.wording import first_line

BUILDERS = {".json": "json", ".jsonl": "json", ".csv": "csv", ".parquet": "parquet"}


def load_numbered(source: Source, where: str, seed: int) -> tuple[Dataset, Sequence[int]]:
    """The rows of one source, renamed and drawn, and the number that each has in the source, counted from 0.

    Raises:
        DataError: nothing there, not readable, empty, or a renamed column that is missing.
    """
    rows = _load(source, where)
    for ours, theirs in source.columns.items():
        if theirs not in rows.column_names:
            raise DataError(f"{where}: columns: {ours}: {theirs} is not a column; found {', '.join(rows.column_names)}")
        if ours != theirs and ours in rows.column_names:
            rows = rows.remove_columns(ours)
        rows = rows if ours == theirs else rows.rename_column(theirs, ours)
    if len(rows) == 0:
        raise DataError(f"{where}: {source.path!r} has no rows in split {source.split!r}")
    wanted = min(source.limit or len(rows), round(len(rows) * (source.fraction or 1)) or 1)
    if wanted == len(rows):
        return rows, range(len(rows))
    numbers = sorted(random.Random(seed).sample(range(len(rows)), wanted))
    return rows.select(numbers), numbers


def origin(source: Source, rows: Dataset) -> dict[str, Any]:
    """What was drawn from a source. `datasets` keeps a Hub data set in a cache folder named by its commit."""
    found: dict[str, Any] = {"rows": len(rows), "local": Path(source.path).exists()}
    folder = Path(rows.cache_files[0]["filename"]).parent.name if rows.cache_files else ""
    if not found["local"] and re.fullmatch(r"[0-9a-f]{40}", folder):
        found["commit"] = folder
    return found


def _load(source: Source, where: str) -> Dataset:
    path = Path(source.path)
    builder = next((BUILDERS[s] for s in reversed(path.suffixes) if s in BUILDERS), None)
    if (builder or path.is_absolute()) and not path.exists():
        raise DataError(f"{where}: no such file: {source.path}{_nearby(path)}")
    name, files = (builder, source.path) if builder and path.is_file() else (source.path, source.data_files)
    try:
        rows = datasets.load_dataset(
            name,
            name=source.name,
            data_files=files,
            split=source.split,
            revision=source.revision,
            **(_as_text(path) if name == "csv" and path.suffix == ".csv" else {}),
        )
    except Exception as error:  # every builder raises its own; all of them mean that this source cannot be read
        cause = error.__cause__ or error
        raise DataError(f"{where}: {source.path!r} cannot be read: {first_line(cause)}") from error
    return rows


def _as_text(path: Path) -> dict[str, Any]:
    """CSV has no types: an answer "42" is text, and so is "NA"."""
    with path.open(newline="", encoding="utf-8-sig") as stream:
        names = next(csv.reader(stream), [])
    features = datasets.Features({name: datasets.Value("string") for name in names})
    return {"features": features, "keep_default_na": False, "encoding": "utf-8-sig"}


def _nearby(path: Path) -> str:
    files = [file.name for file in path.parent.iterdir()] if path.parent.is_dir() else []
    near = difflib.get_close_matches(path.name, files, n=1)
    return f"; did you mean '{near[0]}'?" if near else ""
