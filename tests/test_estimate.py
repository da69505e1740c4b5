"""The estimate: what is counted, what is measured without data, and what does not fit."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from toolkit import load_recipe
from toolkit.errors import RunError
from toolkit.launching.division import Sharding
from toolkit.models import model
from toolkit.records.rundir import RunDirectory
from toolkit.resources import estimate, fit
from toolkit.training.prepare import Prepared, prepare


@pytest.fixture
def prepared(recipe: dict[str, Any], write: Callable[..., Path], tmp_path: Path) -> Prepared:
    directory = RunDirectory(tmp_path / "run")
    loaded = load_recipe(write(recipe))
    directory.claim(loaded)
    return prepare(loaded, directory)


def test_items_are_what_the_settings_imply(prepared: Prepared) -> None:
    sft, dpo = (estimate.estimate(job, model.empty_base(prepared.recipe)) for job in prepared.jobs)
    assert sft.items["gradients"] == sft.trainable * 4
    assert sft.items["optimizer"] == sft.trainable * 8
    assert dpo.items["adapter"] == 2 * sft.items["adapter"]  # the frozen one below
    assert sft.items["activations"] > 0 and sft.items["logits"] > 0
    assert sum(sft.items.values()) == pytest.approx(sft.phases["training step"], abs=2)
    assert set(dpo.phases) == {"training step", "verification", "reference pass"}
    assert sft.unknown == dpo.unknown == ""


def test_four_bits_take_about_an_eighth_of_float32_in_linear_layers_alone(prepared: Prepared) -> None:
    empty = model.empty_base(prepared.recipe)
    full = estimate.weight_bytes(empty, torch.float32, None)
    packed = estimate.weight_bytes(empty, torch.float32, {"load_in_4bit": True, "bnb_4bit_use_double_quant": True})
    linear = sum(m.weight.numel() for n, m in empty.named_modules() if "proj" in n)
    assert full - packed == pytest.approx(linear * (4 - 0.516), rel=0.01)


def test_sharding_divides_what_it_says(tmp_path: Path) -> None:
    file = tmp_path / "zero.yaml"
    file.write_text("distributed_type: DEEPSPEED\nnum_processes: 8\ndeepspeed_config: {zero_stage: 2}\n")
    assert Sharding.from_file(file) == Sharding(8, weights=1, gradients=8, optimizer=8)
    assert Sharding.fsdp(4) == Sharding(4, 4, 4, 4)
    (tmp_path / "ds.json").write_text('{"zero_optimization": {\n\t"stage": 3}}')  # goes before accelerate's setting
    named = "distributed_type: DEEPSPEED\nnum_processes: 8\ndeepspeed_config: {deepspeed_config_file: "
    file.write_text(f"{named}{tmp_path}/ds.json, zero_stage: 2}}\n")
    assert Sharding.from_file(file) == Sharding(8, weights=8, gradients=8, optimizer=8)
    file.write_text(f"{named}{tmp_path}/none.json}}\n")
    with pytest.raises(RunError, match=r"deepspeed_config_file: .*none\.json: cannot be read"):
        Sharding.from_file(file)
    file.write_text("- no mapping\n")
    with pytest.raises(RunError, match="a mapping is expected"):
        Sharding.from_file(file)


def test_weights_that_do_not_fit_are_an_error_and_a_full_gpu_a_warning(prepared: Prepared, tmp_path: Path) -> None:
    found = estimate.estimate(prepared.jobs[0], model.empty_base(prepared.recipe))
    levels = [
        [f.level for f in fit.findings([found], there, {tmp_path: 10**12}) if f.check == "memory"]
        for there in (found.items["weights"] - 1, found.peak, 2 * found.peak)
    ]
    assert levels == [["error"], ["warning"], []]
    assert [f.level for f in fit.findings([found], None, {tmp_path: 10})] == ["error"]
