"""The card: valid metadata, code that runs as written, and nothing of this machine."""

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from huggingface_hub import ModelCard

from tests.hub_server import StandInHub
from toolkit.publishing.card import base_licence, card, vllm_rank
from toolkit.publishing.hub import push
from toolkit.publishing.merge import merge
from toolkit.recipe.fields import field_defaults
from toolkit.recipe.sections import Hub


@pytest.fixture
def with_hub_base(hub: StandInHub, run: Path, base: Path) -> Iterator[Path]:
    """The run, as if its base had come from the stand-in Hub at a commit, under a license."""
    files = {file.name: file.read_bytes() for file in base.iterdir()}
    commit = hub.add("tiny/base", files | {"README.md": b"---\nlicense: apache-2.0\n---\n"})
    resolved = json.loads((run / "resolved.json").read_text())
    resolved["recipe"]["model"]["name_or_path"] = "tiny/base"
    resolved["base"] = {"commit": commit}
    resolved["recipe"]["stages"][0]["data"][0]["path"] = "them/chats"
    resolved["stages"][0]["sources"] = [{"rows": 8, "local": False, "commit": "c" * 40}]
    (run / "resolved.json").write_text(json.dumps(resolved))
    yield run


def test_the_metadata_is_valid_and_inherits_the_license(hub: StandInHub, with_hub_base: Path) -> None:
    push(with_hub_base, Hub(repo_id="me/adapter"))
    loaded = ModelCard.load("me/adapter")
    loaded.validate()
    assert loaded.data.to_dict() == {
        "base_model": "tiny/base",
        "base_model_relation": "adapter",
        "datasets": ["them/chats"],
        "library_name": "peft",
        "license": "apache-2.0",
        "pipeline_tag": "text-generation",
        "tags": ["lora", "trl", "sft", "dpo"],
    }


def test_the_code_block_of_six_lines_runs_as_written(hub: StandInHub, with_hub_base: Path, tmp_path: Path) -> None:
    push(with_hub_base, Hub(repo_id="me/adapter"))
    text = hub.repositories["me/adapter"].files()["README.md"].decode()
    code = re.search(r"```python\n(.*?)```", text, re.S)
    assert code is not None
    assert len(code[1].splitlines()) == 6
    import os

    environment = os.environ | {"HF_HUB_OFFLINE": "0"}
    subprocess.run([sys.executable, "-c", code[1]], check=True, capture_output=True, env=environment, cwd=tmp_path)


def test_a_local_base_is_said_to_be_one(run: Path, base: Path) -> None:
    text = card(run)
    loaded = ModelCard(text)
    assert loaded.data.base_model is None
    assert f"`./{base.name}`, a local folder that is not on the Hub (SHA-256 of its files" in text
    for trace in (str(base), str(run.parent), str(Path.home()), "None"):
        assert trace not in text


def test_the_card_written_when_training_ends_tells_everything(trained: Path, base: Path) -> None:
    lines = (trained / "README.md").read_text().splitlines()
    for start in (
        "| dpo | dpo | base + sft adapter (frozen) + new adapter | base + sft adapter (the new adapter disabled); equal",
        "| sft | `./sft.jsonl` | a local file | 8 |",
        "| sft | **in all** | 315 tokens, 67 of them supervised | 8 |",
        "| sft: trainer | learning_rate | `0.01` |",
        "|  | seed | `3` | 42",
        f"vllm serve ./{base.name} --enable-lora --max-lora-rank 8 --lora-modules adapter=adapter",
        "toolkit train recipe.yaml",
    ):
        assert any(line.replace("`42`", "42").startswith(start) for line in lines), start
    assert any(re.fullmatch(r"\| dpo \| .+ \(CPU\) \| [\d,]+ s \| \d+\.\d\d GB \|", line) for line in lines)


def test_scores_and_pictures_are_shown(run: Path) -> None:
    scores = {"right": {"base": 0.1, "dpo": {"share": 0.9, "low": 0.8, "high": 0.95}}}
    (run / "evaluation.json").write_text(json.dumps({"prompts": 40, "scores": scores}))
    (run / "report").mkdir(exist_ok=True)
    (run / "report" / "reward_margins.png").write_bytes(b"\x89PNG")
    text = card(run)
    assert "| base | 10.0% |\n| dpo | 90.0% (80.0% to 95.0%) |" in text
    assert "![reward margins](report/reward_margins.png)" in text


def test_how_far_the_merged_model_is_from_the_policy_is_shown(run: Path) -> None:
    merge(run, dtype="bfloat16", output=run.parent / "merged")
    text = (run / "README.md").read_text()
    assert re.search(r"Merged into the base as bfloat16, it differs .* by a KL of [\d.e-]+ nats per token", text)
    shutil.rmtree(run / "adapter")
    shutil.copytree(run / "sft" / "adapter", run / "adapter")  # another adapter since: nothing is known of it
    assert "Merged into the base" not in card(run)


@pytest.mark.parametrize(("rank", "served"), [(4, 8), (8, 8), (24, 32), (257, 320), (512, 512), (600, None)])
def test_the_rank_is_rounded_up_to_one_that_vllm_allows(rank: int, served: int | None) -> None:
    assert vllm_rank({"r": 2, "rank_pattern": {"q_proj": rank}}) == served


def test_a_license_file_of_a_local_base_is_recognised(tmp_path: Path) -> None:
    assert base_licence(str(tmp_path), None) == {}
    shutil.copy(Path(__file__).parent.parent / "LICENSE", tmp_path / "LICENSE")
    assert base_licence(str(tmp_path), None) == {"license": "apache-2.0"}


@pytest.mark.parametrize("name", ["SFTConfig", "DPOConfig", "LoraConfig"])
def test_the_defaults_are_those_of_the_installed_classes(name: str) -> None:
    import dataclasses

    import peft
    import trl

    fields = {f.name: f.default for f in dataclasses.fields(getattr(peft if name == "LoraConfig" else trl, name))}
    defaults = field_defaults(name)
    assert len(defaults) > 20
    assert defaults == {key: fields[key] for key in defaults}
