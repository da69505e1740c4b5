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
    _add_evaluate(commands)
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


def _add_evaluate(commands: Any) -> None:
    command = _command(commands, "evaluate", "measure the base and every finished stage of a run", _evaluate)
    command.add_argument("run_directory", metavar="RUN", help="the run directory")
    command.add_argument(
        "--stage", action="append", default=[], metavar="NAME", help="this stage only; may be repeated"
    )
    command.add_argument("--data", action="append", default=[], metavar="PATH", help="held-out rows; may be repeated")
    command.add_argument("--limit", type=_positive, metavar="N", help="at most so many rows of each data set")
    command.add_argument("--seed", type=int, metavar="N", help="for sampled answers and intervals")


def _evaluate(args: argparse.Namespace) -> int:
    _quiet()
    from toolkit.run import evaluate_run

    evaluate_run(args.run_directory, args.stage, args.data, args.limit, args.seed)
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


def _recipe(args: argparse.Namespace) -> Any:
    """The recipe that is asked for, before torch is imported: a typo is answered at once."""
    from toolkit.load import load_recipe

    return load_recipe(args.recipe, args.overrides)


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"found {text}, expected 1 or more")
    return value


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
