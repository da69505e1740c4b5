"""The command line: a thin layer over `load_recipe`, `train` and `compute_reference`."""

import argparse
import gc
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

from toolkit.errors import RunError, ToolkitError
from toolkit.launching import launch, processes, signals
from toolkit.wording import visible


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
    _add_push(commands)
    _add_pull(commands)
    _add_merge(commands)
    _add_chat(commands)
    _add_evaluate(commands)
    _add_report(commands)
    _add_diff(commands)
    return top


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; 0 when it worked, 2 for bad input, 3 for a result that failed its proof.

    A signal that ended it: 75 for SIGTERM, 130 for SIGINT, with the command that resumes.
    """
    args = parser().parse_args(argv)
    args.argv = list(sys.argv[1:] if argv is None else argv)
    try:
        with signals.raised():
            code = int(args.run(args))
            processes.part()
            return code
    except signals.Stopped as stopped:
        if os.environ.get("RANK", "0") == "0":
            again = signals.resume_command(None if argv is None else ["toolkit", *argv])
            print(f"{stopped}\nresume with:\n  {again}", file=sys.stderr)
        if processes.are_several():
            processes.leave(stopped.exit_code)
        return stopped.exit_code
    except Exception as error:
        answer = _answer_to(error)
        if processes.are_several():
            processes.fail(answer or error, answer.exit_code if answer else 1)
        if answer is None:
            raise
        text = visible(str(answer))  # it may quote a data file
        print(f"error: {text}" if "\n" not in text else f"errors:\n{text}", file=sys.stderr)
        return answer.exit_code


def _answer_to(error: Exception) -> ToolkitError | None:
    """An error that is said without a traceback; `None` for a bug."""
    from toolkit.records.rundir import exhausted

    if isinstance(error, ToolkitError):
        return error
    text = exhausted(error)  # wherever it strikes: the caches of the libraries are on disks too
    return (
        RunError(f"{error.filename}: {text}" if isinstance(error, OSError) and error.filename else text)
        if text
        else None
    )


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
    with _heavy_imports():
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
    with _heavy_imports():
        from toolkit.run import compute_reference

    compute_reference(recipe, output=args.output)
    return 0


def _add_schema(commands: Any) -> None:
    _command(commands, "schema", "print the JSON Schema of recipes, for editors", _schema)


def _schema(_: argparse.Namespace) -> int:
    from toolkit.recipe.schema import schema_text

    print(schema_text(), end="")
    return 0


def _add_check(commands: Any) -> None:
    text = "say what is wrong with a recipe, its template and its data, without a GPU and without weights"
    command = _command(commands, "check", text, _check)
    _takes_recipe(command)
    command.add_argument("--offline", action="store_true", help="do not ask the Hub")
    command.add_argument("--json", action="store_true", help="one JSON object, for machines")
    command.add_argument("--strict", action="store_true", help="warnings are errors")
    command.add_argument("--launch", metavar="CONFIG", help="estimate for this launch: ddp, fsdp2, ..., or a file")
    command.add_argument("--num-processes", type=int, metavar="N", help="processes (GPUs) of that launch")


def _check(args: argparse.Namespace) -> int:
    from toolkit.checks.told import Report
    from toolkit.errors import RecipeError
    from toolkit.findings import Finding

    if args.offline:
        os.environ["HF_HUB_OFFLINE"] = "1"  # read when huggingface_hub is imported
    report = Report(args.recipe, args.json, args.strict)
    config = launch.config_for_check(args.launch, args.num_processes)
    try:
        recipe = _recipe(args)
    except RecipeError as error:
        wrong = [Finding("error", "recipe", ": ".join(filter(None, (p.where, p.key))), p.text) for p in error.problems]
        report.part("recipe", wrong)
        return report.finish()
    report.part("recipe", [])
    with _heavy_imports():
        from toolkit.checks.check import check

    for title, found in check(recipe, report.stages, config, args.num_processes):
        report.part(title, found)
    return report.finish()


def _add_preview(commands: Any) -> None:
    command = _command(commands, "preview", "show rows as the trainer will see them", _preview)
    _takes_recipe(command)
    command.add_argument("--stage", metavar="NAME", help="this stage only")
    command.add_argument("-n", type=int, default=3, metavar="ROWS", help="how many rows (default: 3)")
    command.add_argument("--row", type=int, metavar="I", help="the row with this number in its source, from 0")


def _preview(args: argparse.Namespace) -> int:
    recipe = _recipe(args)
    with _heavy_imports():
        from toolkit.checks.preview import preview

    preview(recipe, args.stage, args.n, args.row)
    return 0


def _add_push(commands: Any) -> None:
    command = _command(commands, "push", "push the adapter of a finished run to the Hub, and check what arrived", _push)
    command.add_argument("run_directory", metavar="RUN", help="the run directory")
    command.add_argument("--repo-id", metavar="OWNER/NAME", help="where to (default: the recipe's hub section)")
    command.add_argument("--private", action="store_true", default=None, help="create a private repository")
    command.add_argument("--stage", metavar="NAME", help="push this stage's adapter (default: the last one's)")
    command.add_argument("--revision", metavar="BRANCH", help="push to this branch")
    command.add_argument("--tag", metavar="NAME", help="tag the commit")
    command.add_argument("--create-pr", action="store_true", default=None, help="open a pull request")
    command.add_argument(
        "--no-verify", dest="verify", action="store_false", default=None, help="do not fetch the adapter and compare it"
    )


def _push(args: argparse.Namespace) -> int:
    from pathlib import Path

    from toolkit.publishing.hub import push
    from toolkit.records.portable import hub_section

    names = ("repo_id", "private", "stage", "revision", "tag", "create_pr", "verify")
    asked = {name: value for name in names if (value := getattr(args, name)) is not None}
    run = Path(args.run_directory)
    print(push(run, hub_section(run, asked)))
    return 0


def _add_pull(commands: Any) -> None:
    command = _command(commands, "pull", "fetch an adapter from the Hub into a directory shaped like a run", _pull)
    command.add_argument("repo", metavar="OWNER/NAME[@REVISION]", help="the repository")
    command.add_argument("--output", metavar="DIR", help="where to (default: runs/NAME)")


def _pull(args: argparse.Namespace) -> int:
    from pathlib import Path

    from toolkit.publishing.hub import pull

    print(f"pulled: {pull(args.repo, Path(args.output) if args.output else None)}")
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
    with _heavy_imports():
        from toolkit.publishing.merge import merge

    merge(
        args.run_directory,
        stage=args.stage,
        dtype=args.dtype,
        output=args.output,
        verify=args.verify,
        trust_remote_code=args.trust_remote_code,
    )
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
    with _heavy_imports():
        from toolkit.publishing.talk import Sampling, talk

    sampling = Sampling(
        args.greedy, args.temperature, args.top_p, args.top_k, max_new_tokens=args.max_new_tokens, seed=args.seed
    )
    talk(
        args.run_directory,
        sampling,
        args.stage,
        compare=args.compare,
        system=args.system,
        as_json=args.json,
        trust_remote_code=args.trust_remote_code,
    )
    return 0


def _add_evaluate(commands: Any) -> None:
    command = _command(commands, "evaluate", "measure the base and every finished stage of a run", _evaluate)
    _takes_run(command)
    command.add_argument(
        "--stage", action="append", default=[], metavar="NAME", help="this stage only; may be repeated"
    )
    command.add_argument("--data", action="append", default=[], metavar="PATH", help="held-out rows; may be repeated")
    command.add_argument("--limit", type=_positive, metavar="N", help="at most so many rows of each data set")
    command.add_argument("--seed", type=int, metavar="N", help="for sampled answers and intervals")
    launch.add_flags(command)


def _evaluate(args: argparse.Namespace) -> int:
    _check_run(args.run_directory)
    if launch.asked_for(args):
        return launch.run(args.argv)
    with _heavy_imports():
        from toolkit.run import evaluate_run

    evaluate_run(
        args.run_directory, args.stage, args.data, args.limit, args.seed, trust_remote_code=args.trust_remote_code
    )
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
    from toolkit.pages import compare, report

    if args.list is not None:
        print(compare.list_runs(args.list))
    elif len(args.runs) == 1:
        print(report.write(args.runs[0]))
    else:
        target, lines = compare.compare(args.runs, args.sort, args.output)
        print(f"{lines}\n\n{target}")
    return 0


def _add_diff(commands: Any) -> None:
    text = "show where two recipes differ, with defaults and extends resolved"
    command = _command(commands, "diff", text, _diff)
    for name in ("recipe", "other"):
        command.add_argument(name, metavar="RECIPE", help="a YAML file, or a run directory: the recipe as it was run")
    help_text = "in both, where they are files"
    command.add_argument("--set", dest="overrides", action="append", default=[], metavar="KEY=VALUE", help=help_text)


def _diff(args: argparse.Namespace) -> int:
    from toolkit.pages.compare import diff
    from toolkit.recipe.load import load_recipe
    from toolkit.records.rundir import RunDirectory

    def read(place: str) -> Any:
        # nothing is run or loaded here, so that both may ask for what training would have to be told to allow
        if Path(place).is_dir():
            return RunDirectory(Path(place)).recipe(trust_remote_code=True)
        return load_recipe(place, args.overrides, True, True)

    print(diff(read(args.recipe), read(args.other)))
    return 0


# --- what commands share ---------------------------------------------------------------------------------------------


def _command(commands: Any, name: str, text: str, run: Callable[[argparse.Namespace], int]) -> argparse.ArgumentParser:
    command: argparse.ArgumentParser = commands.add_parser(name, help=text, description=text)
    command.set_defaults(run=run)
    return command


def _takes_recipe(command: argparse.ArgumentParser) -> None:
    command.add_argument("recipe", metavar="RECIPE", help="the YAML file")
    command.add_argument("--set", dest="overrides", action="append", default=[], metavar="KEY=VALUE", help="any value")
    _takes_trust(command)
    command.add_argument("--allow-pickle", action="store_true", help="load base weights that are not safetensors")


def _takes_trust(command: argparse.ArgumentParser) -> None:
    command.add_argument("--trust-remote-code", action="store_true", help="run the code of a base that has its own")


def _takes_output(command: argparse.ArgumentParser) -> None:
    command.add_argument("--output", metavar="DIR", help="run directory (default: runs/FOLDER-RECIPE)")


def _takes_run(command: argparse.ArgumentParser) -> None:
    command.add_argument("run_directory", metavar="RUN", help="a run directory, or a pulled adapter")
    _takes_trust(command)


def _check_run(path: str) -> None:
    """A typo is answered before torch is imported."""
    from pathlib import Path

    from toolkit.errors import RunError

    if not Path(path).is_dir():
        raise RunError(f"{path}: no such folder; expected the output of toolkit train or toolkit pull")


def _recipe(args: argparse.Namespace) -> Any:
    """The recipe that is asked for, before torch is imported: a typo is answered at once."""
    from toolkit.recipe.load import load_recipe

    return load_recipe(args.recipe, args.overrides, args.trust_remote_code, args.allow_pickle)


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"found {text}, expected 1 or more")
    return value


@contextmanager
def _heavy_imports() -> Iterator[None]:
    """Within, torch and what builds on it are imported, faster than they would be by themselves.

    Nothing that an import leaves behind is garbage: the collector rests meanwhile, and never looks through it again.
    """
    gc.disable()
    try:
        _quiet()
        yield
        gc.freeze()
    finally:
        gc.enable()


def _quiet() -> None:
    """Keep libraries from talking over the plan and the progress; their warnings and errors still show."""
    import logging
    import warnings

    from toolkit.models.kernels import import_bitsandbytes

    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # optional kernels it does without
    warnings.filterwarnings("ignore", category=FutureWarning)  # of TRL about transformers, and of both about themselves
    import_bitsandbytes()
    import datasets
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    datasets.utils.logging.set_verbosity(logging.CRITICAL)  # it logs what it then raises
    if not sys.stderr.isatty():
        datasets.disable_progress_bars()
