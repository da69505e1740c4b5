"""The command line: a thin layer over `load_recipe`, `train` and `compute_reference`."""

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from importlib.metadata import version
from typing import Any

from toolkit.errors import ToolkitError


def parser() -> argparse.ArgumentParser:
    """Every command and flag."""
    top = argparse.ArgumentParser(prog="toolkit", description="One recipe file in, one adapter out: LoRA with TRL.")
    top.add_argument("--version", action="version", version=version("trl-lora-toolkit"))
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")
    _add_train(commands)
    _add_reference(commands)
    _add_merge(commands)
    _add_chat(commands)
    return top


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; 0 when it worked, 2 for bad input, 3 for a result that failed its proof."""
    args = parser().parse_args(argv)
    try:
        return int(args.run(args))
    except KeyboardInterrupt:
        print("interrupted; run the same command again to resume from the last checkpoint", file=sys.stderr)
        return 130
    except ToolkitError as error:
        print(f"error: {error}" if "\n" not in str(error) else f"errors:\n{error}", file=sys.stderr)
        return error.exit_code


# --- one pair of functions for each command: its flags, and what it does --------------------------------------------


def _add_train(commands: Any) -> None:
    command = _command(commands, "train", "run the stages of a recipe and hand back one adapter", _train)
    _takes_recipe(command)
    _takes_output(command)
    command.add_argument("--stage", metavar="NAME", help="run this stage only; what it starts from must be finished")
    command.add_argument("--fresh", action="store_true", help="run finished stages again; old results are kept aside")


def _train(args: argparse.Namespace) -> int:
    recipe = _recipe(args)
    _quiet()
    from toolkit.run import train

    train(recipe, output=args.output, stage=args.stage, fresh=args.fresh)
    return 0


def _add_reference(commands: Any) -> None:
    text = "fill the cache of reference log-probabilities, as a step of its own"
    command = _command(commands, "reference", text, _reference)
    _takes_recipe(command)
    _takes_output(command)


def _reference(args: argparse.Namespace) -> int:
    recipe = _recipe(args)
    _quiet()
    from toolkit.run import compute_reference

    compute_reference(recipe, output=args.output)
    return 0


def _add_merge(commands: Any) -> None:
    text = "write base and adapter as one plain model for serving, and measure how close it is"
    command = _command(commands, "merge", text, _merge)
    _takes_run(command)
    command.add_argument("--stage", metavar="NAME", help="whose adapter (default: the last stage's)")
    types = ("bfloat16", "float16", "float32")
    command.add_argument("--dtype", choices=types, help="type of the weights (default: the one that was trained on)")
    command.add_argument("--output", metavar="DIR", help="a new folder (default: RUN/merged, or RUN/merged-STAGE)")
    text = "do not load the two models to compare them; memory then stays near one file"
    command.add_argument("--no-verify", dest="verify", action="store_false", help=text)


def _merge(args: argparse.Namespace) -> int:
    _check_run(args.run_directory)
    _quiet()
    from toolkit.merge import merge

    merge(args.run_directory, stage=args.stage, dtype=args.dtype, output=args.output, verify=args.verify)
    return 0


def _add_chat(commands: Any) -> None:
    text = "talk to the base or a stage; on a pipe, one prompt a line, each a conversation of its own"
    command = _command(commands, "chat", text, _chat)
    _takes_run(command)
    who = command.add_mutually_exclusive_group()
    who.add_argument("--stage", metavar="NAME", help="base, or a stage (default: the last one)")
    who.add_argument("--compare", action="store_true", help="the base and every stage answer")
    command.add_argument("--system", metavar="TEXT", help="the system prompt")
    command.add_argument("--greedy", action="store_true", help="always the most likely token")
    command.add_argument("--temperature", type=float, metavar="T", help="above 0 (default: 0.7)")
    command.add_argument(
        "--top-p", type=float, metavar="P", help="of the most likely tokens with this sum (default: 0.95)"
    )
    command.add_argument("--top-k", type=int, metavar="K", help="of the K most likely tokens (default: all)")
    command.add_argument("--max-new-tokens", type=int, default=512, metavar="N", help="length of an answer")
    command.add_argument("--seed", type=int, metavar="N", help="the same answers again")
    command.add_argument("--json", action="store_true", help="on a pipe: one JSON object a line, prompt and answers")


def _chat(args: argparse.Namespace) -> int:
    _check_run(args.run_directory)
    _quiet()
    from toolkit.talk import Sampling, talk

    sampling = Sampling(
        args.greedy, args.temperature, args.top_p, args.top_k, max_new_tokens=args.max_new_tokens, seed=args.seed
    )
    talk(args.run_directory, sampling, args.stage, compare=args.compare, system=args.system, as_json=args.json)
    return 0


# --- what commands share ---------------------------------------------------------------------------------------------


def _command(commands: Any, name: str, text: str, run: Callable[[argparse.Namespace], int]) -> argparse.ArgumentParser:
    command: argparse.ArgumentParser = commands.add_parser(name, help=text, description=text)
    command.set_defaults(run=run)
    return command


def _takes_recipe(command: argparse.ArgumentParser) -> None:
    command.add_argument("recipe", metavar="RECIPE", help="the YAML file")
    command.add_argument("--set", dest="overrides", action="append", default=[], metavar="KEY=VALUE", help="any value")


def _takes_output(command: argparse.ArgumentParser) -> None:
    command.add_argument("--output", metavar="DIR", help="run directory (default: runs/FOLDER-RECIPE)")


def _takes_run(command: argparse.ArgumentParser) -> None:
    command.add_argument("run_directory", metavar="RUN", help="a run directory, or a pulled adapter")


def _check_run(path: str) -> None:
    """A typo is answered before torch is imported."""
    from pathlib import Path

    from toolkit.errors import RunError

    if not Path(path).is_dir():
        raise RunError(f"{path}: no such folder; expected the output of toolkit train or toolkit pull")


def _recipe(args: argparse.Namespace) -> Any:
    """The recipe that is asked for, before torch is imported: a typo is answered at once."""
    from toolkit.load import load_recipe

    return load_recipe(args.recipe, args.overrides)


def _quiet() -> None:
    """Keep libraries from talking over the plan and the progress; their warnings and errors still show."""
    import logging
    import warnings

    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # optional kernels it does without
    warnings.filterwarnings("ignore", category=FutureWarning)  # of TRL about transformers, and of both about themselves
    import datasets
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    datasets.utils.logging.set_verbosity(logging.CRITICAL)  # it logs what it then raises
    if not sys.stderr.isatty():
        datasets.disable_progress_bars()
