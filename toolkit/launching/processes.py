"""Several processes: how many there are, who goes first, and failing together."""

import os
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, NoReturn, TypeVar

from toolkit.errors import RunError, ToolkitError

T = TypeVar("T")
K = TypeVar("K")

STORE_TIMEOUT = timedelta(seconds=10)
PEER_GONE = ("Connection reset by peer", "Connection closed by peer")  # in gloo's words


def check_world(processes: int) -> None:
    """Refuse a run on another number of processes than was asked for.

    Args:
        processes: those that accelerate counts.

    Raises:
        RunError
    """
    env = os.environ
    asked = int(env.get("WORLD_SIZE", "1"))
    if asked != processes:
        raise RunError(f"{asked} processes were started (WORLD_SIZE), and accelerate runs {processes} of them together")
    # accelerate names a meeting point to the one process it starts when it was asked for more than one
    if "ACCELERATE_MIXED_PRECISION" in env and "MASTER_PORT" in env and "WORLD_SIZE" not in env:
        raise RunError(
            "accelerate was asked for several processes and started one, as it does with `distributed_type: MULTI_CPU` "
            "and with `--cpu --num_processes`; use accelerate_configs/cpu_2proc.yaml on CPUs, ddp.yaml on GPUs "
            "(or unset MASTER_PORT, if one process is what you want)"
        )


@contextmanager
def first_then_others() -> Iterator[None]:
    """The main process works first, then the first one of each other machine, then the rest: they find its caches."""
    from accelerate import PartialState

    state = PartialState()
    with state.main_process_first(), state.local_main_process_first():
        yield


def from_main(value: Any) -> Any:
    """The main process's value, on every process: what is read from a directory may differ between them."""
    from accelerate.utils import broadcast_object_list

    values = [value]
    broadcast_object_list(values, from_process=0)
    return values[0]


def own_share(items: list[T]) -> list[T]:
    """What falls to this process of work that all have the same list of: every n-th of n processes."""
    from accelerate import PartialState

    state = PartialState()
    return items[state.process_index :: state.num_processes]


def from_all(own: dict[K, T]) -> dict[K, T]:
    """What each process found for its share, put together, on every process."""
    from accelerate.utils import gather_object

    return dict(gather_object(list(own.items())))


def are_several() -> bool:
    """Whether this process was started as one of several."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


def part() -> None:
    """Leave the process group, if there is one, after the work is done. All processes must: NCCL's groups end together.

    Gloo's threads outlive the interpreter otherwise, and abort a process that ends before its peers.
    """
    torch = sys.modules.get("torch")  # a command that did without it is in no group
    if torch is not None and torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def leave(code: int) -> NoReturn:
    """End this process without waiting for communication that will not come."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def fail(error: BaseException, code: int) -> NoReturn:
    """End this process as one of several: the first one to fail says why, for all, and decides the exit code.

    The launcher stops the others then. What they raise when their peer is gone is not said.
    """
    number = _agreed_code(code)
    if number is None:
        if isinstance(error, ToolkitError):
            text = str(error)
            print(f"errors:\n{text}" if "\n" in text else f"error: {text}", file=sys.stderr)
        elif any(words in str(error) for words in PEER_GONE):
            text = (
                "another process of this run was killed (out of memory?); the same command resumes, see the lines below"
            )
            print(f"error: {text}", file=sys.stderr)
        else:
            traceback.print_exception(error)
    leave(code if number is None else number)


def _agreed_code(code: int) -> int | None:
    """The exit code of the process that failed before this one, or `None` where this one is the first."""
    from torch.distributed import TCPStore

    try:
        store = TCPStore(
            os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False, timeout=STORE_TIMEOUT
        )
        name = f"toolkit/failed/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}"
        if store.add(name, 1) == 1:
            store.set(f"{name}/code", str(code))
            return None
        return int(store.get(f"{name}/code"))
    except Exception:  # no store to ask any more: better said twice than not at all
        return None
