"""How a launch divides a model among its processes: read from the environment, or from an accelerate config file."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from toolkit.errors import RunError


@dataclass(frozen=True)
class Sharding:
    """Processes, and by how many of them weights, gradients and optimizer state are divided. DDP divides nothing."""

    processes: int = 1
    weights: int = 1
    gradients: int = 1
    optimizer: int = 1

    @classmethod
    def current(cls, processes: int) -> "Sharding":
        """What `accelerate launch` told this process, by its environment."""
        if os.environ.get("ACCELERATE_USE_FSDP", "").lower() in ("true", "1"):
            strategy = os.environ.get("FSDP_SHARDING_STRATEGY", "FULL_SHARD")
            return cls.fsdp(processes, strategy)
        if os.environ.get("ACCELERATE_USE_DEEPSPEED", "").lower() in ("true", "1"):
            return cls.zero(processes, launched_zero_stage())
        return cls(processes)

    @classmethod
    def from_file(cls, file: Path, processes: int | None = None) -> "Sharding":
        """What an accelerate config file asks for.

        Raises:
            RunError: it cannot be read, or is not a mapping.
        """
        config = mapping_of(file)
        n = processes or int(config.get("num_processes") or 1)
        if config.get("distributed_type") == "FSDP":
            fsdp = config.get("fsdp_config") or {}
            return cls.fsdp(n, str(fsdp.get("fsdp_sharding_strategy", "FULL_SHARD")))
        if config.get("distributed_type") == "DEEPSPEED":
            asked = config.get("deepspeed_config") or {}
            return cls.zero(n, _zero_stage(asked.get("deepspeed_config_file"), asked.get("zero_stage")))
        return cls(n)

    @classmethod
    def fsdp(cls, processes: int, strategy: str = "FULL_SHARD") -> "Sharding":
        """FSDP divides everything; `SHARD_GRAD_OP` all but the weights, `NO_SHARD` nothing. Names or FSDP's numbers."""
        if strategy in ("NO_SHARD", "3"):
            return cls(processes)
        weights = 1 if strategy in ("SHARD_GRAD_OP", "2") else processes
        return cls(processes, weights, processes, processes)

    @classmethod
    def zero(cls, processes: int, stage: int) -> "Sharding":
        """DeepSpeed's stages: 1 divides the optimizer's state, 2 gradients too, 3 weights too."""
        return cls(
            processes,
            processes if stage >= 3 else 1,
            processes if stage >= 2 else 1,
            processes if stage >= 1 else 1,
        )


def launched_zero_stage() -> int:
    """The ZeRO stage of this process, which was launched with DeepSpeed.

    Raises:
        RunError: DeepSpeed's own configuration file cannot be read.
    """
    env = os.environ
    return _zero_stage(env.get("ACCELERATE_DEEPSPEED_CONFIG_FILE"), env.get("ACCELERATE_DEEPSPEED_ZERO_STAGE"))


def mapping_of(file: Path) -> dict[str, Any]:
    """What stands in an accelerate config file.

    Raises:
        RunError: it cannot be read, or is not a mapping.
    """
    try:
        config: Any = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError, UnicodeDecodeError) as error:
        raise RunError(f"{file}: not an accelerate config file: {str(error).splitlines()[0]}") from None
    if not isinstance(config, dict):
        raise RunError(f"{file}: not an accelerate config file: a mapping is expected")
    return config


def _zero_stage(file: str | None, stage: Any) -> int:
    """What DeepSpeed's own file says goes before accelerate's `zero_stage`, which is left out beside one."""
    from accelerate.utils.deepspeed import HfDeepSpeedConfig

    if file and file != "none":
        try:
            own = HfDeepSpeedConfig(file).get_value("zero_optimization.stage")
        except (OSError, ValueError) as error:
            raise RunError(f"deepspeed_config_file: {file}: cannot be read: {str(error).splitlines()[0]}") from None
        stage = stage if own in (None, "auto") else own
    return int(2 if stage is None else stage)
