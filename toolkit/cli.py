"""The command line: a thin layer over `load_recipe`, `train` and `compute_reference`."""

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from importlib.metadata import version
from typing import Any

from toolkit import launch, processes
from toolkit.errors import ToolkitError


def parser() -> argparse.ArgumentParser:
    """Every command and flag."""
    top = argparse.ArgumentParser(prog="toolkit", description="One recipe file in, one adapter out: LoRA with TRL.")
    top.add_argument("--version", action="version", version=version("trl-lora-toolkit"))
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")
    _add_train(commands)
    _add_reference(commands)
    _add_schema(commands)
    _add_check(commands)
    _add_preview(commands)
    _add_report(commands)
    _add_diff(commands)
    return top


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; 0 when it worked, 2 for bad input, 3 for a result that failed its proof."""
    args = parser().parse_args(argv)
    args.argv = list(sys.argv[1:] if argv is None else argv)
    try:
        return int(args.run(args))
    except KeyboardInterrupt:
        print("interrupted; run the same command again to resume from the last checkpoint", file=sys.stderr)
        return 130
    except Exception as error:
        if processes.are_several():
            processes.fail(error, getattr(error, "exit_code", 1))
        if not isinstance(error, ToolkitError):
            raise
        print(f"error: {error}" if "\n" not in str(error) else f"errors:\n{error}", file=sys.stderr)
        return error.exit_code


# --- one pair of functions for each command: its flags, and what it does --------------------------------------------


def _add_train(commands: Any) -> None:
    command = _command(commands, "train", "run the stages of a recipe and hand back one adapter", _train)
    _takes_recipe(command)
    _takes_output(command)
    command.add_argument("--stage", metavar="NAME", help="run this stage only; what it starts from must be finished")
    command.add_argument("--fresh", action="store_true", help="run finished stages again; old results are kept aside")
    text = "on a GPU, start without trying the longest batch first"
    command.add_argument("--no-probe", dest="probe", action="store_false", help=text)
    launch.add_flags(command)


def _train(args: argparse.Namespace) -> int:
    recipe = _recipe(args)
    if launch.asked_for(args):
        return launch.run(args.argv)
    _quiet()
    from toolkit.run import train

    train(recipe, output=args.output, stage=args.stage, fresh=args.fresh, probe=args.probe)
    return 0


def _add_reference(commands: Any) -> None:
    text = "fill the cache of reference log-probabilities, as a step of its own"
    command = _command(commands, "reference", text, _reference)
    _takes_recipe(command)
    _takes_output(command)
    launch.add_flags(command)


def _reference(args: argparse.Namespace) -> int:
    recipe = _recipe(args)
    if launch.asked_for(args):
        return launch.run(args.argv)
    _quiet()
    from toolkit.run import compute_reference

    compute_reference(recipe, output=args.output)
    return 0


def _add_schema(commands: Any) -> None:
    _command(commands, "schema", "print the JSON Schema of recipes, for editors", _schema)


def _schema(_: argparse.Namespace) -> int:
    from toolkit.schema import schema_text

    print(schema_text(), end="")
    return 0


def _add_check(commands: Any) -> None:
    text = "say what is wrong with a recipe, its template and its data, without a GPU and without weights"
    command = _command(commands, "check", text, _check)
    _takes_recipe(command)
    command.add_argument("--offline", action="store_true", help="do not ask the Hub")
    command.add_argument("--json", action="store_true", help="one JSON object, for machines")
    command.add_argument("--strict", action="store_true", help="warnings are errors")


def _check(args: argparse.Namespace) -> int:
    from toolkit.errors import RecipeError
    from toolkit.findings import Finding

    if args.offline:
        os.environ["HF_HUB_OFFLINE"] = "1"  # read when huggingface_hub is imported
    parts: Any = []
    stages: dict[str, Any] = {}
    try:
        recipe = _recipe(args)
    except RecipeError as error:
        wrong = [Finding("error", "recipe", ": ".join(filter(None, (p.where, p.key))), p.text) for p in error.problems]
        parts = [("recipe", wrong)]
    else:
        if not args.json:
            print("recipe\n  ok", flush=True)
        _quiet()
        from toolkit.check import check

        parts = check(recipe, stages)
    return _show(parts, stages, args)


def _show(parts: Any, stages: dict[str, Any], args: argparse.Namespace) -> int:
    """Print findings as they come, or all of them as JSON; the exit code."""
    import json

    findings: list[Any] = []
    for title, found in parts:
        findings += found
        if not args.json:
            print(title, *(f"  {f.level:<8} {f} [{f.check}]" for f in found), sep="\n", flush=True)
    n = {level: sum(f.level == level for f in findings) for level in ("error", "warning", "note")}
    if args.json:
        told = {"recipe": args.recipe, "findings": [f.as_dict() for f in findings], "stages": stages, "counts": n}
        print(json.dumps(told))
    else:
        print(f"\n{n['error']} errors, {n['warning']} warnings, {n['note']} notes")
    return 2 if n["error"] or (args.strict and n["warning"]) else 0


def _add_preview(commands: Any) -> None:
    command = _command(commands, "preview", "show rows as the trainer will see them", _preview)
    _takes_recipe(command)
    command.add_argument("--stage", metavar="NAME", help="this stage only")
    command.add_argument("-n", type=int, default=3, metavar="ROWS", help="how many rows (default: 3)")
    command.add_argument("--row", type=int, metavar="I", help="the row with this number in its source, from 0")


def _preview(args: argparse.Namespace) -> int:
    recipe = _recipe(args)
    _quiet()
    from rich.console import Console

    from toolkit import preview
    from toolkit.errors import RunError
    from toolkit.prepare import prepare
    from toolkit.rundir import RunDirectory, default_output

    jobs = prepare(recipe, RunDirectory(default_output(recipe))).jobs
    names = [job.plan.name for job in jobs]
    if args.stage not in (None, *names):
        raise RunError(f"{args.stage}: no such stage; the recipe has {', '.join(names)}")
    console = Console(highlight=False, soft_wrap=False)
    marks = f"between {preview.OPEN} and {preview.CLOSE}"
    console.print(f"supervised: green, or {marks} without colour; masked: dim or unmarked")
    for job in jobs:
        if args.stage in (None, job.plan.name):
            rows = range(min(args.n, job.data.steps_rows)) if args.row is None else [preview.row_at(job, args.row)]
            preview.show(job, console, list(rows))
    return 0


def _add_report(commands: Any) -> None:
    command = _command(commands, "report", "write one page about a run, compare several, or list a folder", _report)
    command.add_argument("runs", nargs="*", metavar="RUN", help="run directories; of one, RUN/report.html is written")
    command.add_argument("--list", nargs="?", const="runs", metavar="DIR", help="one line per run (default: runs)")
    command.add_argument("--sort", metavar="METRIC", help="of several runs: best first, as in --sort eval_loss")
    text = "of several runs: the page (default: comparison.html beside them)"
    command.add_argument("--output", metavar="FILE", help=text)


def _report(args: argparse.Namespace) -> int:
    from toolkit.errors import RunError

    if args.list is not None and (args.runs or args.sort or args.output):
        raise RunError("--list takes a folder and nothing else")
    if args.list is None and not args.runs:
        raise RunError("name a run directory, several to compare them, or --list DIR")
    if len(args.runs) == 1 and (args.sort or args.output):
        raise RunError("--sort and --output are for several runs; the page of one is RUN/report.html")
    from toolkit import compare, report

    if args.list is not None:
        print(compare.list_runs(args.list))
    elif len(args.runs) == 1:
        print(report.write(args.runs[0]))
    else:
        target, lines = compare.compare(args.runs, args.sort, args.output)
        print(f"{lines}\n\n{target}")
    return 0


def _add_diff(commands: Any) -> None:
    command = _command(commands, "diff", "show where two recipes differ, with defaults and extends resolved", _diff)
    command.add_argument("recipe", metavar="RECIPE")
    command.add_argument("other", metavar="RECIPE")
    command.add_argument("--set", dest="overrides", action="append", default=[], metavar="KEY=VALUE", help="in both")


def _diff(args: argparse.Namespace) -> int:
    from toolkit.compare import diff
    from toolkit.load import load_recipe

    # nothing is run or loaded here, so that both may ask for what training would have to be told to allow
    print(diff(*(load_recipe(file, args.overrides, True, True) for file in (args.recipe, args.other))))
    return 0


# --- what commands share ---------------------------------------------------------------------------------------------


def _command(commands: Any, name: str, text: str, run: Callable[[argparse.Namespace], int]) -> argparse.ArgumentParser:
    command: argparse.ArgumentParser = commands.add_parser(name, help=text, description=text)
    command.set_defaults(run=run)
    return command


def _takes_recipe(command: argparse.ArgumentParser) -> None:
    command.add_argument("recipe", metavar="RECIPE", help="the YAML file")
    command.add_argument("--set", dest="overrides", action="append", default=[], metavar="KEY=VALUE", help="any value")
    command.add_argument("--trust-remote-code", action="store_true", help="run the code of a base that has its own")
    command.add_argument("--allow-pickle", action="store_true", help="load base weights that are not safetensors")


def _takes_output(command: argparse.ArgumentParser) -> None:
    command.add_argument("--output", metavar="DIR", help="run directory (default: runs/FOLDER-RECIPE)")


def _recipe(args: argparse.Namespace) -> Any:
    """The recipe that is asked for, before torch is imported: a typo is answered at once."""
    from toolkit.load import load_recipe

    return load_recipe(args.recipe, args.overrides, args.trust_remote_code, args.allow_pickle)


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
