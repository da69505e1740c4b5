"""`accelerate_configs/` as accelerate reads them, and `--launch` as the short form of `accelerate launch`."""

import dataclasses
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import launch_command_parser
from accelerate.utils import DeepSpeedPlugin, FullyShardedDataParallelPlugin

from toolkit.cli import main, parser
from toolkit.errors import RunError
from toolkit.launching import launch

FOLDER = Path(__file__).parent.parent / "accelerate_configs"
NAMES = [
    "cpu_2proc",
    "ddp",
    "deepspeed_zero2",
    "deepspeed_zero3",
    "fsdp2",
    "fsdp2_qlora",
    "multi_node_ddp",
    "multi_node_fsdp2",
    "single_gpu",
]
SBATCH = FOLDER / "slurm.sbatch"


def check_with_accelerate(file: Path) -> None:
    """Its own class for the file; its launcher's arguments and its plugins' fields for the sections in it."""
    config = load_config_from_file(str(file))
    arguments = vars(launch_command_parser().parse_args(["x.py"]))
    sections = {"fsdp_config": FullyShardedDataParallelPlugin, "deepspeed_config": DeepSpeedPlugin}
    unknown = []
    for section, plugin in sections.items():
        fields = {field.name for field in dataclasses.fields(plugin)} | {
            "auto_wrap_policy": "",
            "offload_params": "",
            "offload_optimizer_device": "",
            "offload_param_device": "",
        }.keys()
        prefix = "fsdp_" if section == "fsdp_config" else ""
        for key in getattr(config, section):
            known = prefix + key.removeprefix(prefix) in arguments
            if not known or not {key, key.removeprefix("fsdp_")} & fields:
                unknown.append(key)
    assert not unknown, unknown
    assert config.num_processes >= 1
    if config.num_machines > 1:
        assert config.main_process_ip and config.main_process_port and config.same_network


def test_every_configuration_is_there() -> None:
    assert sorted(launch.configs()) == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_accelerate_knows_every_field(name: str) -> None:
    check_with_accelerate(FOLDER / f"{name}.yaml")
    text = (FOLDER / f"{name}.yaml").read_text()
    for said in ("# Choose it ", "# Memory "):
        assert said in text


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("num_machines:", "num_machine:"),
        ("fsdp_version:", "fsdp_versoin:"),
        ("fsdp_reshard_after_forward:", "fsdp_reshard:"),
    ],
)
def test_an_unknown_field_fails(tmp_path: Path, old: str, new: str) -> None:
    file = tmp_path / "fsdp2.yaml"
    file.write_text((FOLDER / "fsdp2.yaml").read_text().replace(old, new))
    with pytest.raises((ValueError, AssertionError), match=new[:-1]):
        check_with_accelerate(file)


@pytest.mark.parametrize("name", ["fsdp2", "fsdp2_qlora", "multi_node_fsdp2"])
def test_the_fsdp_plugin_takes_the_values(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As the launcher hands them on: by environment variables."""
    from accelerate.utils.launch import prepare_multi_gpu_env

    monkeypatch.setattr(sys, "argv", ["accelerate", "launch"])
    args = launch_command_parser().parse_args(["--config_file", str(FOLDER / f"{name}.yaml"), "-m", "toolkit"])
    from accelerate.commands.launch import _validate_launch_command

    args, _, _ = _validate_launch_command(args)
    args.main_process_port = 0
    for key, value in prepare_multi_gpu_env(args).items():
        if key.startswith("FSDP_"):
            monkeypatch.setenv(key, value)
    plugin = FullyShardedDataParallelPlugin()
    assert (plugin.fsdp_version, plugin.reshard_after_forward) == (2, True)
    assert plugin.cpu_ram_efficient_loading == (name != "fsdp2_qlora")
    assert "SHARDED_STATE_DICT" in str(plugin.state_dict_type)


def test_the_short_form_is_accelerate_launch() -> None:
    argv = ["train", "r.yaml", "--launch", "ddp", "--set", "seed=1", "--num-processes", "4", "--output", "out"]
    file = str(launch.config_file("ddp"))
    expected = ["--config_file", file, "--num_processes", "4", "-m", "toolkit"]
    assert launch.accelerate_arguments(argv) == [*expected, "train", "r.yaml", "--set", "seed=1", "--output", "out"]
    nodes = ["reference", "r.yaml", "--launch=multi_node_ddp", "--machine-rank=1", "--main-process-ip", "n0"]
    file = str(launch.config_file("multi_node_ddp"))
    expected = ["--config_file", file, "--machine_rank", "1", "--main_process_ip", "n0", "-m", "toolkit"]
    assert launch.accelerate_arguments(nodes) == [*expected, "reference", "r.yaml"]
    assert launch.config_file(str(FOLDER / "ddp.yaml")) == FOLDER / "ddp.yaml"


def test_an_unknown_configuration_is_answered(tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"no configuration 'fsdp'; found cpu_2proc, ddp, .* did you mean 'fsdp2'\?"):
        launch.config_file("fsdp")
    with pytest.raises(RunError, match=r"no such file: \./mine.yaml"):
        launch.config_file("./mine.yaml")
    with pytest.raises(RunError, match="--num-processes: is for --launch; add --launch ddp"):
        launch.accelerate_arguments(["train", "r.yaml", "--num-processes", "2"])


def test_a_typo_is_answered_before_launching(
    recipe: dict[str, Any], write: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe["stages"][0]["trainer"]["learning_rat"] = 1
    assert main(["train", str(write(recipe)), "--launch", "cpu_2proc"]) == 2
    said = capsys.readouterr()
    assert said.err.count("unknown key") == 1
    assert "accelerate launch" not in said.out


def test_one_process_under_launch_keeps_its_exit_code(tmp_path: Path, recipe: dict[str, Any], write: Any) -> None:
    """`single_gpu` runs on a CPU as well; what the run answers is what the command answers."""
    (tmp_path / "dpo.jsonl").unlink()
    command = [sys.executable, "-m", "toolkit", "train", str(write(recipe)), "--launch", "single_gpu"]
    done = subprocess.run([*command, "--output", str(tmp_path / "run")], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stdout.startswith("accelerate launch --config_file ")
    assert done.stderr.count("no such file") == 1
    assert "Traceback" not in done.stderr


def test_the_slurm_file_is_shell_and_names_what_exists() -> None:
    subprocess.run(["bash", "-n", str(SBATCH)], check=True)
    text = SBATCH.read_text()
    train = next(a for a in parser()._actions if a.dest == "command").choices["train"]  # type: ignore[index,union-attr]
    flags = {flag for action in train._actions for flag in action.option_strings}
    after = re.sub(r"(?m)^\s*#.*$|(srun|sbatch|scancel) .*$", "", text)
    assert (
        {f"--{f}" for f in ("launch", "num-processes", "num-machines", "main-process-ip", "main-process-port")}
        <= set(re.findall(r"--[a-z-]+", after))
        <= flags | {"--machine-rank"}
    )
    assert {"multi_node_ddp", "ddp"} == set(re.findall(r"echo (\w*ddp)", text)) <= set(NAMES)
    for path in re.findall(r"(?:accelerate_configs|recipes)/[\w./-]+", text):
        assert (FOLDER.parent / path).is_file(), path
    assert yaml.safe_load((FOLDER / "multi_node_ddp.yaml").read_text())["num_machines"] == 2


SRUN = """#!/bin/bash
trap 'exit 137' TERM  # SLURM's own kills the processes then, and saves nothing
echo "srun $*" >> "$SAID"
[ "$SENT" = none ] || { kill -"$SENT" "$PPID"; sleep 0.2; }  # bash loses the code of a child that ends at that instant
[ "$SENT" != USR1 ] || until grep -q "^scancel --signal=TERM 7$" "$SAID"; do sleep 0.02; done
exit "$CODE"
"""
SCONTROL = """#!/bin/bash
case $1 in show) echo node0; echo node1 ;; *) echo "scontrol $*" >> "$SAID" ;; esac
"""
SCANCEL = """#!/bin/bash
echo "scancel $*" >> "$SAID"
"""


@pytest.mark.parametrize(
    ("sent", "code", "requeued"),
    [
        ("none", 0, False),
        ("none", 2, False),
        ("none", 137, False),
        ("none", 75, True),  # preempted: the processes were told, this script was not
        ("USR1", 75, True),
        ("USR1", 137, True),
        ("USR1", 0, False),
        ("USR1", 2, False),
        ("TERM", 75, False),  # cancelled, or requeued by SLURM itself
    ],
)
def test_the_slurm_file_requeues_what_can_go_on(tmp_path: Path, sent: str, code: int, requeued: bool) -> None:
    """With stand-ins for SLURM's commands."""
    for name, text in {"srun": SRUN, "scontrol": SCONTROL, "scancel": SCANCEL}.items():
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    said = tmp_path / "said"
    job = {"SLURM_JOB_ID": "7", "SLURM_NNODES": "2", "SLURM_GPUS_ON_NODE": "4", "SLURM_JOB_NODELIST": "node[0-1]"}
    env = os.environ | job | {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
    env |= {"SAID": str(said), "SENT": sent, "CODE": str(code)}
    done = subprocess.run(["bash", str(SBATCH), "r.yaml"], env=env, capture_output=True, check=False, timeout=30)
    lines = said.read_text().splitlines()
    assert done.returncode == (0 if requeued else code)
    assert ("scontrol requeue 7" in lines) == requeued
    assert "train r.yaml --launch multi_node_ddp --num-processes 8 --main-process-port 20007" in said.read_text()
