"""The proof stops a run whose reference is not what the plan says; a broken adapter is never called finished."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import toolkit
from toolkit.models import adapter
from toolkit.recipe.sections import Recipe


@pytest.mark.parametrize("init", ["pissa", "olora", False])
def test_an_initialisation_that_moves_the_policy_fails_the_proof(
    recipe: dict[str, Any], tmp_path: Path, init: str | bool
) -> None:
    """`load_recipe` refuses these; a Recipe made in Python comes as far as the proof, and no further."""
    recipe["lora"]["init_lora_weights"] = init
    recipe["stages"] = recipe["stages"][1:]
    with pytest.raises(toolkit.ProofError, match="does not start at its reference"):
        toolkit.train(Recipe.model_validate(recipe), output=tmp_path / "run")
    assert not (tmp_path / "run" / "dpo" / "stage.json").exists()
    assert not (tmp_path / "run" / "adapter").exists()


def test_a_changed_base_fails_the_proof(recipe: dict[str, Any], write: Any, tmp_path: Path) -> None:
    """Policy and reference agree with each other, and both differ from the start model loaded on its own."""
    from toolkit.models.model import load_base
    from toolkit.records.rundir import RunDirectory
    from toolkit.training import dpo, proof
    from toolkit.training.prepare import prepare

    recipe["stages"] = recipe["stages"][1:]
    loaded = toolkit.load_recipe(write(recipe))
    prepared = prepare(loaded, RunDirectory(tmp_path / "run"))
    (job,) = prepared.jobs
    base = load_base(loaded, prepared.hardware)
    start = proof.completion_logps(base, proof.first_sequences(job))
    with torch.no_grad():
        base.model.layers[0].self_attn.q_proj.weight.mul_(0.5)
    built = dpo.build(job, base)
    with pytest.raises(toolkit.ProofError, match="not the model this stage starts from"):
        dpo.prove(job, built, start)


def test_an_sft_adapter_that_stands_on_a_rewritten_base_is_refused(recipe: dict[str, Any], tmp_path: Path) -> None:
    recipe["lora"]["init_lora_weights"] = "pissa"
    recipe["stages"] = recipe["stages"][:1]
    with pytest.raises(toolkit.ModelError, match="stands on a base that loading it rewrites"):
        toolkit.train(Recipe.model_validate(recipe), output=tmp_path / "run")
    assert not (tmp_path / "run" / "sft" / "stage.json").exists()


def test_nothing_learned_is_refused(recipe: dict[str, Any], write: Any, tmp_path: Path) -> None:
    recipe["stages"][0]["trainer"]["learning_rate"] = 0.0
    with pytest.raises(toolkit.ProofError, match="every lora_B is zero"):
        toolkit.train(write(recipe), output=tmp_path / "run", stage="sft")


def test_nan_is_refused(recipe: dict[str, Any], write: Any, tmp_path: Path) -> None:
    folder = toolkit.train(write(recipe), output=tmp_path / "run", stage="sft").output / "sft" / "adapter"
    weights = load_file(folder / adapter.WEIGHTS)
    next(iter(weights.values()))[0, 0] = float("nan")
    save_file(weights, folder / adapter.WEIGHTS)
    with pytest.raises(toolkit.ProofError, match="NaN or infinite"):
        adapter.check_values(folder)


def test_a_reloaded_adapter_that_differs_is_refused(recipe: dict[str, Any], write: Any, tmp_path: Path) -> None:
    from toolkit.records.rundir import RunDirectory
    from toolkit.training import stage
    from toolkit.training.prepare import prepare

    loaded = toolkit.load_recipe(write(recipe))
    folder = toolkit.train(loaded, output=tmp_path / "run", stage="sft").output / "sft" / "adapter"
    prepared = prepare(loaded, RunDirectory(tmp_path / "run"))
    with pytest.raises(toolkit.ProofError, match="differs from the trained policy"):
        stage.verify(prepared.jobs[0], folder, torch.zeros(4))
