"""How long the rows of a stage are: small histograms of token counts, for `resolved.json` and the report."""

from typing import Any

import numpy as np
from datasets import Dataset

BINS = 24
COLUMNS = {"input_ids": "row", "prompt_ids": "prompt", "chosen_ids": "chosen", "rejected_ids": "rejected"}


def token_lengths(rows: Dataset) -> dict[str, Any]:
    """Histograms over tokenized rows, all with the same edges.

    Returns:
        `{"edges": [...], "counts": {"prompt": [...], ...}, "mean": {...}, "longest": {...}}`, in tokens.
    """
    found = {title: _lengths(rows, name) for name, title in COLUMNS.items() if name in rows.column_names}
    longest = max((int(values.max()) for values in found.values() if len(values)), default=0)
    width = max(-(-(longest + 1) // BINS), 1)  # tokens are whole: every bin holds as many lengths
    edges = np.arange(0, longest + width + 1, width)
    return {
        "edges": edges.tolist(),
        "counts": {title: np.histogram(values, edges)[0].tolist() for title, values in found.items()},
        "mean": {title: round(float(values.mean()), 1) for title, values in found.items() if len(values)},
        "longest": {title: int(values.max()) for title, values in found.items() if len(values)},
    }


def _lengths(rows: Dataset, name: str) -> Any:
    parts = [
        batch.column(name).combine_chunks().value_lengths().to_numpy(zero_copy_only=False)
        for batch in rows.select_columns(name).with_format("arrow").iter(10_000)
    ]
    return np.concatenate(parts) if parts else np.zeros(0, dtype=int)
