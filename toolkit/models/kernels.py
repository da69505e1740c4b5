"""bitsandbytes imported without torch's compiler, which would take a fifth of the time of every start."""

import contextlib
import os

VARIABLE = "TORCHDYNAMO_DISABLE"


def import_bitsandbytes() -> None:
    """Import it as PEFT will, quantized base or not, with `torch.compile` switched off meanwhile.

    Four of its functions, for devices that it has no kernels for, are compiled as soon as they are declared. Here
    they stay as written; what asks for a compiler later gets one. Remove when bitsandbytes asks on the first use.
    """
    before = os.environ.get(VARIABLE)
    os.environ[VARIABLE] = "1"
    try:
        with contextlib.suppress(ImportError):  # said where a recipe quantizes
            import bitsandbytes  # noqa: F401
    finally:
        del os.environ[VARIABLE]
        if before is not None:
            os.environ[VARIABLE] = before
