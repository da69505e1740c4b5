"""`toolkit train RECIPE --launch ddp`: short for `accelerate launch --config_file ... -m toolkit train RECIPE`."""

import argparse
import difflib
import shlex
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

from toolkit.errors import RunError

# In the repository, and where the wheel puts the same files.
PACKAGE = Path(__file__).parent.parent
FOLDERS = (PACKAGE.parent / "accelerate_configs", PACKAGE / "accelerate_configs")
FORWARDED = ("num_processes", "num_machines", "machine_rank", "main_process_ip", "main_process_port")


def add_flags(command: argparse.ArgumentParser) -> None:
    """The flags of a launch; all but `--launch` are accelerate's own, over what the configuration file says."""
    group = command.add_argument_group("several processes")
    group.add_argument("--launch", metavar="CONFIG", help="run under `accelerate launch`: ddp, fsdp2, ..., or a file")
    group.add_argument("--num-processes", type=int, metavar="N", help="processes (GPUs), of all machines together")
    group.add_argument("--num-machines", type=int, metavar="N")
    group.add_argument("--machine-rank", type=int, metavar="R", help="number of this machine, from 0")
    group.add_argument("--main-process-ip", metavar="HOST", help="the first machine, as the others reach it")
    group.add_argument("--main-process-port", type=int, metavar="PORT")


def config_file(name: str) -> Path:
    """A file of `accelerate_configs/` by its name, or any file by its path.

    Raises:
        RunError: there is none, with the nearest name.
    """
    path = Path(name)
    if path.suffix in (".yaml", ".yml", ".json") or "/" in name:
        if not path.is_file():
            raise RunError(f"--launch: no such file: {name}")
        return path
    known = configs()
    if name not in known:
        near = difflib.get_close_matches(name, known, n=1)
        hint = f"; did you mean '{near[0]}'?" if near else ""
        raise RunError(f"--launch: no configuration {name!r}; found {', '.join(known)}, or give a file's path{hint}")
    return known[name]


def config_for_check(name: str | None, processes: int | None) -> Path | None:
    """The configuration that `toolkit check` estimates for.

    Raises:
        RunError: it does not exist, or a number of processes stands without it.
    """
    if name is None and processes is not None:
        raise RunError("--num-processes: is for --launch; add --launch ddp, or the configuration's name")
    if processes is not None and processes < 1:
        raise RunError(f"--num-processes: {processes}: a number from 1 is expected")
    return None if name is None else config_file(name)


def configs() -> dict[str, Path]:
    """Name -> file of every configuration that comes with the toolkit."""
    folder = next((folder for folder in FOLDERS if folder.is_dir()), FOLDERS[0])
    here = Path.cwd()
    files = sorted(folder.glob("*.yaml"))
    return {file.stem: file.relative_to(here) if file.is_relative_to(here) else file for file in files}


def accelerate_arguments(argv: Sequence[str]) -> list[str]:
    """What follows `accelerate launch`, for the arguments of a `toolkit` command with `--launch` among them.

    Raises:
        RunError: the configuration does not exist, or flags of a launch stand without `--launch`.
    """
    flags = argparse.ArgumentParser(add_help=False)
    add_flags(flags)
    asked, rest = flags.parse_known_args(list(argv))
    given = [name for name in FORWARDED if getattr(asked, name) is not None]
    if asked.launch is None:
        raise RunError(
            f"--{given[0].replace('_', '-')}: is for --launch; add --launch ddp, or the configuration's name"
        )
    own = [text for name in given for text in (f"--{name}", str(getattr(asked, name)))]
    return ["--config_file", str(config_file(asked.launch)), *own, "-m", "toolkit", *rest]


def asked_for(args: argparse.Namespace) -> bool:
    """Whether any flag of a launch was given."""
    return any(getattr(args, name) is not None for name in ("launch", *FORWARDED))


def run(argv: Sequence[str]) -> int:
    """Say the line in full, and run it through accelerate's own launcher.

    Returns:
        The exit code of the process that failed first, where `accelerate launch` itself exits with 1 for all of them.
    """
    arguments = accelerate_arguments(argv)
    print(shlex.join(["accelerate", "launch", *arguments]), flush=True)
    from accelerate.commands.launch import launch_command, launch_command_parser
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    sys.argv = ["accelerate", "launch", *arguments]  # its parser looks at it
    try:
        launch_command(launch_command_parser().parse_args(arguments))
    except ChildFailedError as error:
        code = error.get_first_failure()[1].exitcode
        return code if code >= 0 else 128 - code
    except SignalException as error:
        return 130 if error.sigval == signal.SIGINT else 75
    except (ImportError, ValueError, AssertionError, ConnectionError) as error:
        raise RunError(f"--launch: accelerate: {error}") from error
    except Exception as error:
        if not hasattr(error, "returncode"):  # which the launcher for one process reports
            raise
        return int(error.returncode)
    return 0
