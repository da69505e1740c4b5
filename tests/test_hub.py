"""Push, pull and `from:`, against a stand-in Hub on loopback, by the real and unmodified client."""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
import yaml

import toolkit
from tests.conftest import write_recipe
from tests.hub_server import ENDPOINT, Fault, StandInHub
from toolkit.cli import main
from toolkit.errors import ProofError, RunError
from toolkit.publishing import hub as hub_module
from toolkit.publishing.hub import Patience, push
from toolkit.recipe.sections import Hub

QUICK = Patience(timeout=2.0, attempts=3, first_wait=0.0, longest_wait=0.0)


def snapshot(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_an_explicit_list_of_files_without_a_trace_of_this_machine(hub: StandInHub, run: Path, base: Path) -> None:
    shutil.rmtree(run / "report")
    (run / "report").mkdir()
    (run / "report.html").write_text(f"<p>{run.resolve()}/dpo</p>")
    (run / "report" / "loss.png").write_bytes(b"\x89PNG")
    assert main(["push", str(run), "--repo-id", "me/adapter"]) == 0
    files = hub.repositories["me/adapter"].files()
    assert sorted(files) == [
        ".gitattributes",
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
        "chat_template.jinja",
        "dpo/metrics.jsonl",
        "dpo/stage.json",
        "recipe.yaml",
        "report.html",
        "report/loss.png",
        "resolved.json",
        "sft/metrics.jsonl",
        "sft/stage.json",
        "tokenizer.json",
        "tokenizer_config.json",
    ]
    assert files["adapter_model.safetensors"] == (run / "adapter/adapter_model.safetensors").read_bytes()
    assert files["report.html"] == b"<p>run/dpo</p>"
    for place in (run.resolve(), run.parent, base, base.parent, Path.home(), "hf_writer"):
        assert not [name for name, content in files.items() if str(place).encode() in content], place


def test_the_pushed_recipe_holds_what_extends_and_set_added(hub: StandInHub, run: Path, tmp_path: Path) -> None:
    push(run, Hub(repo_id="me/adapter"))
    (tmp_path / "recipe.yaml").write_bytes(hub.repositories["me/adapter"].files()["recipe.yaml"])
    recipe = toolkit.load_recipe(tmp_path / "recipe.yaml")
    assert (recipe.seed, recipe.lora, recipe.stages[0].trainer["learning_rate"]) == (3, {"r": 4}, 1e-2)
    assert recipe.stages[1].data[0].path == str(tmp_path / "dpo.jsonl")


def test_the_same_run_again_makes_no_commit(hub: StandInHub, run: Path) -> None:
    first, second = (push(run, Hub(repo_id="me/adapter")) for _ in range(2))
    assert (first.changed, second.changed, first.commit) == (True, False, second.commit)
    assert len(hub.repositories["me/adapter"].commits) == 2


def test_a_branch_a_tag_and_a_stage(hub: StandInHub, run: Path) -> None:
    pushed = push(run, Hub(repo_id="me/adapter", revision="tries", tag="v1", stage="sft", private=True))
    repository = hub.repositories["me/adapter"]
    assert repository.private
    assert repository.tags == {"v1": pushed.commit}
    assert list(repository.files("main")) == [".gitattributes"]
    sft = (run / "sft/adapter/adapter_model.safetensors").read_bytes()
    assert repository.files("tries")["adapter_model.safetensors"] == sft
    assert "dpo/stage.json" not in repository.files("tries")


def test_a_pull_request_is_opened_once(hub: StandInHub, run: Path) -> None:
    hub.add("me/adapter", {"README.md": b"mine"})
    for _ in range(2):
        assert push(run, Hub(repo_id="me/adapter", create_pr=True)).url == f"{ENDPOINT}/me/adapter/discussions/1"
    assert hub.repositories["me/adapter"].files("main") == {"README.md": b"mine"}


def test_files_of_an_earlier_push_go_and_those_of_others_stay(hub: StandInHub, run: Path) -> None:
    hub.add("me/adapter", {"report/old.png": b"old", "vocab.json": b"{}", "mine.txt": b"mine"})
    push(run, Hub(repo_id="me/adapter"))
    files = hub.repositories["me/adapter"].files()
    assert "mine.txt" in files
    assert not {"report/old.png", "vocab.json"} & set(files)


@pytest.mark.parametrize(
    "fault",
    [
        Fault("/repos/create", 503),
        Fault("/commit/", 429, retry_after=3600),
        Fault("/commit/", 409),
        Fault("/commit/", "cut"),
        Fault("/commit/", "lost"),
        Fault("/validate-yaml", 503),
        Fault("/storage/", "cut"),
    ],
    ids=lambda f: f"{f.where}{f.kind}",
)
def test_a_passing_fault_is_tried_again(hub: StandInHub, run: Path, fault: Fault) -> None:
    hub.faults.append(fault)
    push(run, Hub(repo_id="me/adapter", verify=False), QUICK)
    assert fault.times == 0
    assert len(hub.repositories["me/adapter"].commits) == 2


@pytest.mark.parametrize(
    ("token", "fault", "reason"),
    [
        ("hf_wrong", None, "the Hub does not accept the token"),
        ("hf_other", None, "the token may not write there"),
        ("hf_writer", Fault("/commit/", 404, 9), "there is no such repository"),
        ("hf_writer", Fault("/commit/", 503, 9), r"the Hub is not well \(HTTP 503\)"),
        ("hf_writer", Fault("/repos/create", "silent", 9), "the Hub did not answer in time"),
    ],
    ids=["401", "403", "404", "503", "silent"],
)
def test_a_refusal_is_one_sentence_and_leaves_the_run_as_it_was(
    hub: StandInHub, run: Path, monkeypatch: pytest.MonkeyPatch, token: str, fault: Fault | None, reason: str
) -> None:
    monkeypatch.setenv("HF_TOKEN", token)
    hub.faults += [fault] if fault else []
    before = snapshot(run)
    patience = Patience(timeout=0.3, attempts=2, first_wait=0.0, longest_wait=0.0)
    with pytest.raises(RunError, match=f"not pushed to me/adapter: {reason}") as caught:
        push(run, Hub(repo_id="me/adapter", stage="sft"), patience)
    assert f"to try again: toolkit push {run} --repo-id me/adapter --stage sft" in str(caught.value)
    assert snapshot(run) == before


def test_a_read_only_token_is_refused(hub: StandInHub, run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.add("me/adapter", {"README.md": b"mine"})
    monkeypatch.setenv("HF_TOKEN", "hf_reader")
    with pytest.raises(RunError, match="the token may not write there"):
        push(run, Hub(repo_id="me/adapter"), QUICK)


def test_private_is_never_pushed_to_a_public_repository(hub: StandInHub, run: Path) -> None:
    hub.add("me/adapter", {"README.md": b"mine"})
    with pytest.raises(RunError, match="me/adapter exists and is public, and private is asked for"):
        push(run, Hub(repo_id="me/adapter", private=True), QUICK)


def test_what_comes_back_otherwise_fails_the_push(hub: StandInHub, run: Path) -> None:
    push(run, Hub(repo_id="me/adapter"))
    hub.corrupt.add("adapter_model.safetensors")
    with pytest.raises(ProofError, match=r"not what was sent: adapter_model\.safetensors"):
        push(run, Hub(repo_id="me/adapter"))
    assert not push(run, Hub(repo_id="me/adapter", verify=False)).verified


def test_pull_gives_a_directory_shaped_like_the_run(hub: StandInHub, run: Path, tmp_path: Path) -> None:
    commit = push(run, Hub(repo_id="me/adapter")).commit
    assert main(["pull", f"me/adapter@{commit}", "--output", str(tmp_path / "pulled")]) == 0
    pulled = snapshot(tmp_path / "pulled")
    for name in ("adapter/adapter_model.safetensors", "adapter/chat_template.jinja", "dpo/metrics.jsonl"):
        assert pulled[name] == (run / name).read_bytes()
    assert json.loads(pulled["resolved.json"])["pulled"] == {"repo_id": "me/adapter", "commit": commit}
    assert "dpo/adapter/adapter_model.safetensors" in pulled
    with pytest.raises(RunError, match="holds something already"):
        hub_module.pull("me/adapter", tmp_path / "pulled")
    assert push(tmp_path / "pulled", Hub(repo_id="me/adapter"), QUICK).commit == commit


def test_pickles_are_not_pulled(hub: StandInHub, tmp_path: Path) -> None:
    hub.add("me/old", {"adapter_config.json": b"{}", "adapter_model.bin": b"x"})
    with pytest.raises(RunError, match=r"no adapter_model\.safetensors; pickled weights are not loaded"):
        hub_module.pull("me/old", tmp_path / "pulled")
    assert list(tmp_path.iterdir()) == []


def test_a_stage_starts_from_the_hub_at_a_commit(hub: StandInHub, run: Path, base: Path, tmp_path: Path) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    commit = push(run, Hub(repo_id="me/adapter", stage="sft", tag="v1")).commit
    file = write_recipe(tmp_path, base)
    recipe = yaml.safe_load(file.read_text())
    recipe["stages"] = [recipe["stages"][1] | {"from": "me/adapter@v1"}]
    file.write_text(yaml.safe_dump(recipe))
    result = toolkit.train(file, output=tmp_path / "again")
    assert result.stages["dpo"]["start_commit"] == commit
    loaded = [
        PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), a)
        for a in ("me/adapter", str(run / "sft/adapter"))
    ]
    states = [{k: v for k, v in model.state_dict().items() if "lora" in k} for model in loaded]
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[1])


def test_an_adapter_of_another_base_is_refused(hub: StandInHub, run: Path, tmp_path: Path) -> None:
    from tests.tiny import make_base

    push(run, Hub(repo_id="me/adapter", stage="sft"))
    file = write_recipe(tmp_path, make_base(tmp_path / "wide", hidden_size=64))
    recipe = yaml.safe_load(file.read_text())
    recipe["stages"] = [recipe["stages"][1] | {"from": "me/adapter"}]
    file.write_text(yaml.safe_dump(recipe))
    with pytest.raises(toolkit.ModelError, match="the adapter is for another base"):
        toolkit.train(file, output=tmp_path / "again")


def test_a_recipe_pushes_when_training_ends(hub: StandInHub, run: Path, trained: Path) -> None:
    file = trained.parent / "recipe.yaml"
    asked = ("seed=3", "hub={repo_id: me/adapter}")
    result = toolkit.train(file, output=trained, overrides=asked)
    assert result.pushed is not None
    assert result.pushed.startswith(f"{ENDPOINT}/me/adapter/commit/")
    assert "hub" not in yaml.safe_load(hub.repositories["me/adapter"].files()["recipe.yaml"])
    assert os.environ["HF_TOKEN"] not in (trained / "resolved.json").read_text()
