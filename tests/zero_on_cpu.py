"""`toolkit` under DeepSpeed's ZeRO on CPUs: `accelerate launch --config_file ... -m tests.zero_on_cpu train RECIPE`.

DeepSpeed runs on CPUs over gloo. accelerate 1.15 asks for an accelerator first: with `cpu` it calls several processes
MULTI_CPU whatever was launched, and without it finds no backend. Here its state is set up for CPUs and named after what
was launched; all the rest is accelerate's, transformers' and DeepSpeed's own.
"""

import os
import sys
from typing import Any

os.environ["DS_ACCELERATOR"] = "cpu"  # DeepSpeed would otherwise look for one


def allow() -> None:
    """Let accelerate run DeepSpeed on CPUs in this process."""
    from accelerate import PartialState
    from accelerate.utils import DistributedType
    from deepspeed import comm

    set_up = PartialState.__init__

    def set_up_on_cpu(state: Any, cpu: bool = False, **kwargs: Any) -> None:
        first = not PartialState._shared_state
        set_up(state, cpu=True, **kwargs)
        if first:
            comm.init_distributed(dist_backend="gloo", auto_mpi_discovery=False, verbose=False)
            state.distributed_type = DistributedType.DEEPSPEED

    PartialState.__init__ = set_up_on_cpu


if __name__ == "__main__":
    from toolkit.cli import main

    allow()
    sys.exit(main())
