"""Where a process stands among the ranks: what launchers say in environment variables, read in this one place."""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from megalite.errors import ConfigError


@dataclass(frozen=True)
class Place:
    """One rank's place. `init_method` is what `torch.distributed.init_process_group` takes."""

    rank: int = 0
    local_rank: int = 0
    world_size: int = 1
    local_world_size: int = 1  # ranks on this machine
    init_method: str | None = None  # None: a world of one that needs no rendezvous
    started: float | None = None  # when the command was, in seconds since 1970; None: with this process


def place_from_environment(environment: Mapping[str, str] | None = None) -> Place:
    """The place that torchrun or the deepspeed launcher gave this process; a world of one without a launcher.

    Raises `ConfigError` when only some of the variables are set, or one is no number.
    """
    environment = os.environ if environment is None else environment
    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE")
    found = [name for name in names if name in environment]
    if not found:
        return Place()
    missing = [name for name in (*names, "MASTER_ADDR", "MASTER_PORT") if name not in environment]
    if missing:
        raise ConfigError(f"the environment sets {', '.join(found)} but not {', '.join(missing)}: a launcher sets all")
    rank, local_rank, world_size = (_number(environment, name) for name in names)
    if not 0 <= local_rank <= rank < world_size:
        raise ConfigError(
            f"the environment sets LOCAL_RANK={local_rank}, RANK={rank}, WORLD_SIZE={world_size}; a launcher sets "
            "0 <= LOCAL_RANK <= RANK < WORLD_SIZE"
        )
    # The deepspeed launcher does not tell; on one machine, which is where it matters (CPU threads), all are local.
    local_world_size = _number(environment, "LOCAL_WORLD_SIZE") if "LOCAL_WORLD_SIZE" in environment else world_size
    return Place(rank, local_rank, world_size, local_world_size, "env://")


def _number(environment: Mapping[str, str], name: str) -> int:
    try:
        return int(environment[name])
    except ValueError:
        raise ConfigError(f"{name}={environment[name]!r} in the environment is not a whole number") from None


def count_gpus(environment: Mapping[str, str] | None = None) -> int:
    """NVIDIA GPUs that a process started here would see, counted without torch."""
    environment = os.environ if environment is None else environment
    present = len([device for device in Path("/dev").glob("nvidia[0-9]*") if device.name[6:].isdigit()])
    if (visible := environment.get("CUDA_VISIBLE_DEVICES")) is not None:
        named = [device for device in visible.split(",") if device.strip() and device.strip() != "-1"]
        return min(len(named), present)  # a variable left over from another machine makes no GPU
    return present


def drop_local_rank(arguments: list[str]) -> list[str]:
    """The arguments without the `--local_rank=N`, or `--local_rank N`, that the deepspeed launcher adds."""
    names = ("--local_rank", "--local-rank")
    kept = []
    for number, argument in enumerate(arguments):
        value_of_last = number > 0 and arguments[number - 1] in names
        if not value_of_last and not argument.startswith(names):
            kept.append(argument)
    return kept
