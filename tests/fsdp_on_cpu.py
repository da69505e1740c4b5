"""`toolkit` for `accelerate launch` with an FSDP configuration and `use_cpu: true`: the base is really sharded, over gloo.

PyTorch shards on CPUs as on GPUs; accelerate 1.15 takes two CPU processes for data parallel ones whatever is asked.
That one decision is changed here. Remove when accelerate offers FSDP on CPUs.
"""

import sys
from typing import Any

from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType

decide = AcceleratorState.__init__


def decide_for_fsdp(self: Any, *args: Any, fsdp_plugin: Any = None, **kwargs: Any) -> None:
    first = not AcceleratorState._shared_state
    decide(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
    if first and fsdp_plugin is not None:
        AcceleratorState._shared_state |= {"distributed_type": DistributedType.FSDP, "fsdp_plugin": fsdp_plugin}


if __name__ == "__main__":
    AcceleratorState.__init__ = decide_for_fsdp  # type: ignore[method-assign]
    from toolkit.cli import main

    sys.exit(main(sys.argv[1:]))
