"""What commands after training start from: a trained run, and adapters as they are pulled from the Hub."""

import json
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import toolkit
from tests.conftest import messages, pairs, write_jsonl
from toolkit.models.model import base_identity
from toolkit.recipe.sections import Recipe


@cache
def finished_run(base: Path) -> Path:
    """SFT then DPO, three steps each; read-only, since tests share it."""
    folder = Path(tempfile.mkdtemp(prefix="finished-"))
    trainer = {
        "per_device_train_batch_size": 4,
        "gradient_checkpointing": False,
        "learning_rate": 1e-2,
        "save_strategy": "no",
    }
    recipe = Recipe.model_validate(
        {
            "model": {"name_or_path": str(base), "dtype": "float32"},
            "lora": {"r": 4, "lora_alpha": 8},
            "stages": [
                {"type": "sft", "data": str(write_jsonl(folder / "sft.jsonl", messages(12))), "trainer": trainer},
                {"type": "dpo", "data": str(write_jsonl(folder / "dpo.jsonl", pairs(12))), "trainer": trainer},
            ],
        }
    )
    return toolkit.train(recipe, output=folder / "run").output


def pulled(folder: Path, base: Path, quantization: dict[str, Any] | None = None) -> Path:
    """A folder whose `adapter/` is there, with the record that a run leaves; nothing is trained."""
    rows = write_jsonl(folder / "rows.jsonl", messages(12))
    recipe = Recipe.model_validate(
        {
            "model": {"name_or_path": str(base), "dtype": "float32"},
            "quantization": quantization,
            "stages": [{"type": "sft", "data": str(rows)}],
        }
    )
    resolved = {"recipe": recipe.model_dump(mode="json", by_alias=True), "base": base_identity(recipe)}
    (folder / "resolved.json").write_text(json.dumps(resolved | {"dtype": "float32"}), encoding="utf-8")
    return folder
