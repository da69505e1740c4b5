"""`toolkit` under DeepSpeed's ZeRO on CPUs: `accelerate launch --config_file ... -m tests.zero_on_cpu train RECIPE`.

DeepSpeed runs on CPUs over gloo. accelerate 1.15 asks for an accelerator first: with `cpu` it calls several processes
MULTI_CPU whatever was launched, and without it finds no backend. Here its state is set up for CPUs and named after what
was launched; all the rest is accelerate's, transformers' and DeepSpeed's own. Remove when accelerate offers it.
"""

import os
import sys
from typing import Any

os.environ["DS_ACCELERATOR"] = "cpu"  # DeepSpeed would otherwise look for one


def allow() -> None:
    """Let accelerate run DeepSpeed on CPUs in this process, and ZeRO-3 divide tiny parameters as well."""
    import deepspeed
    from accelerate import PartialState
    from accelerate.utils import DeepSpeedPlugin, DistributedType

    set_up, configure = PartialState.__init__, DeepSpeedPlugin.__post_init__

    def set_up_on_cpu(state: Any, cpu: bool = False, **kwargs: Any) -> None:
        first = not PartialState._shared_state
        set_up(state, cpu=True, **kwargs)
        if first:
            deepspeed.comm.init_distributed(dist_backend="gloo", auto_mpi_discovery=False, verbose=False)
            state.distributed_type = DistributedType.DEEPSPEED

    def configure_for_tiny(plugin: Any) -> None:
        configure(plugin)  # parameters of fewer than 100,000 numbers would stay whole
        plugin.deepspeed_config["zero_optimization"]["stage3_param_persistence_threshold"] = 0

    PartialState.__init__, DeepSpeedPlugin.__post_init__ = set_up_on_cpu, configure_for_tiny
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # a kernel beside gloo that takes a minute to build


if __name__ == "__main__":
    from toolkit.cli import main

    allow()
    sys.exit(main())
