"""Nothing that comes with a recipe, a model or a checkpoint runs code or tells secrets unless it is allowed to."""

import json
import os
import pickle
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import toolkit
from toolkit.cli import main

TOKEN = "hf_" + "s3cretS3cretS3cretS3cretS3cretS3cr"
WITH_TOKEN = {"HF_TOKEN": TOKEN, "HF_HUB_OFFLINE": "1"}


class Dangerous:
    """What an attacker would put into a pickle: loading it makes a file."""

    def __init__(self, file: Path):
        self.file = file

    def __reduce__(self) -> Any:
        return Path.touch, (self.file,)


def test_remote_code_is_asked_for_twice(
    recipe: dict[str, Any], write: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe["model"]["trust_remote_code"] = True
    file = write(recipe)
    assert main(["train", str(file), "--output", str(tmp_path / "run")]) == 2
    said = capsys.readouterr().err
    assert "recipe.yaml:4: model.trust_remote_code: the recipe asks to run Python code that comes with the base" in said
    assert not (tmp_path / "run").exists()
    assert toolkit.load_recipe(file, trust_remote_code=True).model.trust_remote_code


def test_a_run_whose_base_has_code_is_not_loaded_unasked(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = {"name_or_path": "someone/model", "trust_remote_code": True}
    recipe = {"model": model, "stages": [{"type": "sft", "data": "rows.jsonl"}]}
    (tmp_path / "resolved.json").write_text(json.dumps({"recipe": recipe}))
    for command in ("evaluate", "merge", "chat"):
        assert main([command, str(tmp_path)]) == 2
        assert "someone/model comes with Python code of its own; read that code" in capsys.readouterr().err


def test_a_base_of_pickles_is_loaded_by_flag_only(recipe: dict[str, Any], write: Any, tmp_path: Path) -> None:
    base = Path(shutil.copytree(recipe["model"]["name_or_path"], tmp_path / "pickled"))
    torch.save(load_file(base / "model.safetensors"), base / "pytorch_model.bin")
    (base / "model.safetensors").unlink()
    recipe["model"]["name_or_path"] = str(base)
    with pytest.raises(toolkit.ModelError, match=r"Weights are loaded from safetensors only; .* --allow-pickle"):
        toolkit.train(write(recipe), output=tmp_path / "run")
    allowed = toolkit.load_recipe(write(recipe), allow_pickle=True)
    assert toolkit.train(allowed, output=tmp_path / "run", stage="sft").stages["sft"]["steps"] == 3


def test_an_adapter_of_pickles_is_refused(recipe: dict[str, Any], write: Any, tmp_path: Path) -> None:
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text("{}")
    (adapter / "adapter_model.bin").write_bytes(pickle.dumps(Dangerous(tmp_path / "it-ran")))
    recipe["stages"] = [recipe["stages"][1] | {"from": str(adapter)}]
    with pytest.raises(toolkit.ModelError, match=r"is not an adapter: no adapter_model.safetensors"):
        toolkit.train(write(recipe), output=tmp_path / "run")
    assert not (tmp_path / "it-ran").exists()


def test_a_token_is_written_nowhere(recipe: dict[str, Any], write: Any, tmp_path: Path) -> None:
    recipe["hub"] = {"repo_id": "someone/adapter"}  # offline, so that the push is refused in words
    command = [sys.executable, "-m", "toolkit", "train", str(write(recipe)), "--output", str(tmp_path / "run")]
    environment = os.environ | WITH_TOKEN
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 2
    assert "not pushed to someone/adapter" in done.stderr
    assert TOKEN not in done.stdout + done.stderr
    written = [file for file in (tmp_path / "run").rglob("*") if file.is_file()]
    assert {"resolved.json", "stage.json", "metrics.jsonl"} <= {file.name for file in written}
    assert not [file for file in written if TOKEN.encode() in file.read_bytes()]


def test_use_is_not_reported_unless_the_user_says_so() -> None:
    ask = "import os, toolkit; print(os.environ['HF_HUB_DISABLE_TELEMETRY'])"
    quiet = {name: value for name, value in os.environ.items() if name != "HF_HUB_DISABLE_TELEMETRY"}
    for environment, expected in ((quiet, "1"), (quiet | {"HF_HUB_DISABLE_TELEMETRY": "0"}, "0")):
        said = subprocess.run([sys.executable, "-c", ask], capture_output=True, text=True, env=environment, check=True)
        assert said.stdout.strip() == expected
