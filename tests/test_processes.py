"""Several processes: two real ones on gloo, and shards of a model on one. Each launch costs many seconds: few of them."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import toolkit
from tests.conftest import messages, pairs, write_jsonl
from tests.launched import logged, stopped
from toolkit.errors import RunError
from toolkit.launching.processes import check_world
from toolkit.run import evaluate_run
from toolkit.training.progress import read_metrics

CPU_2PROC = Path(__file__).parent.parent / "accelerate_configs" / "cpu_2proc.yaml"

FAILS_ON = """
import os, sys
if os.environ["RANK"] == sys.argv[1]:
    os.environ["HF_DATASETS_CACHE"] = "/dev/null/nowhere"  # no data set can be read here
from toolkit.cli import main
sys.exit(main(sys.argv[2:]))
"""

FAILS_IN_THE_PASS = """
import os, sys
from toolkit.training import reference
compute, batches = reference._logps, []
def fails(*about):
    batches.append(about)
    if os.environ["RANK"] == "1" and len(batches) > 2:
        raise OSError(5, "Input/output error")
    return compute(*about)
reference._logps = fails
from toolkit.cli import main
sys.exit(main(sys.argv[1:]))
"""

ENDS = """
import sys
import torch
from toolkit.cli import main
code = main(sys.argv[1:])
sys.exit(1 if torch.distributed.is_initialized() else code)
"""

COUNTS = """
import os, sys
from pathlib import Path
from toolkit.evaluation import generate
answer, counted = generate._generate, []
def counts(model, tokenizer, prompts, *about):
    counted.append(len(prompts))
    return answer(model, tokenizer, prompts, *about)
generate._generate = counts
from toolkit.cli import main
code = main(sys.argv[2:])
Path(sys.argv[1], os.environ["RANK"]).write_text(str(sum(counted)))
sys.exit(code)
"""

ON_ONE_GPU = """
import os, sys
import torch
os.environ["LOCAL_RANK"] = "0"  # as on two machines: both take the first GPU
torch.distributed.init_process_group("gloo")  # NCCL refuses two processes on one GPU; accelerate keeps what is there
from toolkit.cli import main
sys.exit(main(sys.argv[1:]))
"""


def run(*arguments: str, **env: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "toolkit", *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=os.environ | env, check=False, timeout=240)


def run_script(text: str, folder: Path, *arguments: str, **env: str) -> subprocess.CompletedProcess[str]:
    """A script on two processes; it lies in the folder."""
    script = folder / "script.py"
    script.write_text(text)
    command = [str(Path(sys.executable).with_name("accelerate")), "launch", "--config_file", str(CPU_2PROC)]
    command += ["--main_process_port", "0", str(script), *arguments]
    own = os.environ | {"PYTHONPATH": str(Path(__file__).parent.parent)} | env
    return subprocess.run(command, capture_output=True, text=True, env=own, check=False, timeout=240)


def test_two_processes_train_what_one_does(recipe: dict[str, Any], write: Any, tmp_path: Path) -> None:
    """Half the batch on each of two processes: packed and plain SFT, DPO stacked and continued, both references.

    Of seven held-out pairs, three are left for the last batches of two.
    """
    sft, dpo = recipe["stages"]
    write_jsonl(tmp_path / "sft.jsonl", messages(16))
    write_jsonl(tmp_path / "dpo.jsonl", pairs(16))
    dpo |= {"eval_data": str(write_jsonl(tmp_path / "held.jsonl", pairs(7))), "guard": {"prompts": 1}}
    dpo["trainer"]["per_device_eval_batch_size"] = 2
    packed = sft["trainer"] | {"packing": True, "max_length": 64, "learning_rate": 1e-3}
    recipe["stages"] = [
        sft | {"name": "packed", "trainer": packed},
        sft | {"trainer": sft["trainer"] | {"learning_rate": 1e-3}},
        dpo | {"trainer": dpo["trainer"] | {"learning_rate": 1e-3}},
        dpo | {"name": "online", "adapter": "continue", "reference": "online"},
    ]
    recipe["stages"][3]["trainer"] = dpo["trainer"] | {"learning_rate": 1e-3}
    one = toolkit.train(write(recipe), output=tmp_path / "one")
    assert "on: " in one.stages["dpo"]["prefix_sharing"]
    for stage in recipe["stages"]:
        stage["trainer"]["per_device_train_batch_size"] = 2
    own = {"TOOLKIT_CACHE": str(tmp_path / "cache"), "HF_DATASETS_CACHE": str(tmp_path / "datasets")}
    done = run("train", str(write(recipe)), "--output", str(tmp_path / "two"), "--launch", "cpu_2proc", **own)
    assert done.returncode == 0, done.stderr
    said = done.stdout
    assert said.startswith("accelerate launch --config_file accelerate_configs/cpu_2proc.yaml -m toolkit train ")
    assert said.count("reference: 16 training pairs computed") == 1
    assert said.count("on cpu, 2 processes, seed 7") == said.count("dpo: dpo") == 1
    for stage in one.stages:
        names = ["loss", "rewards/margins", "logps/chosen"] if stage in ("dpo", "online") else ["loss"]
        metrics = [read_metrics(out / stage / "metrics.jsonl") for out in (one.output, tmp_path / "two")]
        steps = [[[line[name] for name in names] for line in lines if "loss" in line] for lines in metrics]
        torch.testing.assert_close(torch.tensor(steps[0]), torch.tensor(steps[1]), rtol=1e-5, atol=1e-5)
        held_out = [[[line[f"eval_{name}"] for name in names] for line in of if "eval_loss" in line] for of in metrics]
        torch.testing.assert_close(torch.tensor(held_out[0]), torch.tensor(held_out[1]), rtol=1e-5, atol=1e-5)
    weights = [load_file(out / "adapter" / "adapter_model.safetensors") for out in (one.output, tmp_path / "two")]
    # Adam divides by the gradient's size, so where that is nearly nothing the order of its summation shows
    torch.testing.assert_close(weights[0], weights[1], rtol=1e-3, atol=1e-4)


def test_a_signal_ends_two_processes_after_one_step_and_they_resume(
    recipe: dict[str, Any], write: Any, tmp_path: Path
) -> None:
    """The launcher passes SIGTERM on; both processes agree on the step, inside the second epoch, and go on there."""
    recipe["stages"] = recipe["stages"][1:]
    recipe["stages"][0]["trainer"]["num_train_epochs"] = 2
    write_jsonl(tmp_path / "dpo.jsonl", pairs(24))
    one = toolkit.train(write(recipe), output=tmp_path / "one")
    recipe["stages"][0]["trainer"]["per_device_train_batch_size"] = 2
    arguments = ["train", str(write(recipe)), "--output", str(tmp_path / "two"), "--launch", "cpu_2proc"]
    command = [sys.executable, "-u", "-m", "toolkit", *arguments]
    code, said = stopped(command, at="  dpo 7/12")
    assert code == 75
    assert said.count("stopped by SIGTERM after step ") == 1
    assert "--launch cpu_2proc" in said.split("resume with:")[1]
    done = run(*arguments)
    assert done.returncode == 0, done.stderr
    assert "  resumes from checkpoint-" in done.stdout
    torch.testing.assert_close(logged(one.output / "dpo"), logged(tmp_path / "two" / "dpo"), rtol=1e-5, atol=1e-5)


def test_an_interrupted_reference_pass_of_two_processes_goes_on(
    recipe: dict[str, Any], write: Any, tmp_path: Path
) -> None:
    recipe["stages"] = recipe["stages"][1:]
    recipe["stages"][0]["trainer"]["per_device_train_batch_size"] = 1  # two pairs to a batch of the pass
    write_jsonl(tmp_path / "dpo.jsonl", pairs(16))
    overrides = ("stages.dpo.reference=online", "stages.dpo.trainer.per_device_train_batch_size=2")
    one = toolkit.train(write(recipe), output=tmp_path / "one", overrides=overrides)
    arguments = ["train", str(write(recipe)), "--output", str(tmp_path / "two")]
    failed, done = (
        run_script(text, tmp_path, *arguments, TOOLKIT_CACHE=str(tmp_path / "cache"))
        for text in (FAILS_IN_THE_PASS, ENDS)
    )
    assert failed.stderr.count("the disk fails: Input/output error") == 1, failed.stderr
    assert done.returncode == 0, done.stderr
    assert "training pairs were computed before the interruption" in done.stdout, done.stdout
    assert "reference: 16 training pairs computed" in done.stdout
    torch.testing.assert_close(logged(one.output / "dpo"), logged(tmp_path / "two" / "dpo"), rtol=1e-5, atol=1e-5)


def test_two_processes_divide_an_evaluation_and_find_what_one_does(finished_run: Path, tmp_path: Path) -> None:
    one, two = (Path(shutil.copytree(finished_run, tmp_path / name)) for name in ("one", "two"))
    alone = evaluate_run(one, seed=3)
    done = run_script(COUNTS, tmp_path, str(tmp_path), "evaluate", str(two), "--seed", "3")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("4 held-out prompts, greedy answers") == 1
    together = json.loads((two / "evaluation.json").read_text())
    assert together["samples"] == alone["samples"]
    for name, summary in together["models"].items():
        assert summary["perplexity"] == pytest.approx(alone["models"][name]["perplexity"], rel=1e-5)
        assert summary["scores"] == alone["models"][name]["scores"]
    assert together["models"]["dpo"]["kl"] == pytest.approx(alone["models"]["dpo"]["kl"], rel=1e-4)
    assert [(tmp_path / rank).read_text() for rank in "01"] == ["12", "12"]  # half of 4 prompts, twice, by 3 models


@pytest.mark.gpu
def test_two_processes_on_one_gpu_train_what_one_does(recipe: dict[str, Any], write: Any, tmp_path: Path) -> None:
    write_jsonl(tmp_path / "sft.jsonl", messages(16))
    write_jsonl(tmp_path / "dpo.jsonl", pairs(16))
    for stage in recipe["stages"]:
        stage["trainer"]["learning_rate"] = 1e-3
    one = toolkit.train(write(recipe), output=tmp_path / "one")
    for stage in recipe["stages"]:
        stage["trainer"]["per_device_train_batch_size"] = 2
    script = tmp_path / "on_one_gpu.py"
    script.write_text(ON_ONE_GPU)
    file = Path(__file__).parent.parent / "accelerate_configs" / "ddp.yaml"
    command = [str(Path(sys.executable).with_name("accelerate")), "launch", "--config_file", str(file)]
    command += ["--num_processes", "2", "--main_process_port", "0", str(script)]
    command += ["train", str(write(recipe)), "--output", str(tmp_path / "two")]
    own = {"CUDA_VISIBLE_DEVICES": "0", "TOOLKIT_CACHE": str(tmp_path / "cache")}
    own |= {"PYTHONPATH": str(Path(__file__).parent.parent)}
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | own, check=False, timeout=400)
    assert done.returncode == 0, done.stderr
    assert ", 2 processes, seed 7" in done.stdout
    for stage in one.stages:
        torch.testing.assert_close(logged(one.output / stage), logged(tmp_path / "two" / stage), rtol=1e-4, atol=1e-4)
    weights = [load_file(out / "adapter" / "adapter_model.safetensors") for out in (one.output, tmp_path / "two")]
    torch.testing.assert_close(weights[0], weights[1], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("rank", ["0", "1"])
def test_a_failure_on_one_rank_ends_all_with_one_message(
    recipe: dict[str, Any], write: Any, tmp_path: Path, rank: str
) -> None:
    done = run_script(FAILS_ON, tmp_path, rank, "train", str(write(recipe)), "--output", str(tmp_path / "run"))
    assert done.stderr.count("cannot be read") == 1, done.stderr
    assert "exitcode  : 2 " in done.stderr  # accelerate's own code is 1 whatever happened; --launch hands on the 2
    assert done.returncode == 1
    assert not (tmp_path / "run" / "sft").exists()


def test_another_world_than_was_asked_for_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("WORLD_SIZE", "MASTER_PORT", "ACCELERATE_MIXED_PRECISION"):
        monkeypatch.delenv(name, raising=False)
    check_world(1)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(RunError, match="2 processes were started"):
        check_world(1)
    check_world(2)
    monkeypatch.delenv("WORLD_SIZE")
    monkeypatch.setenv("MASTER_PORT", "29500")
    check_world(1)
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    with pytest.raises(RunError, match="asked for several processes and started one"):
        check_world(1)
