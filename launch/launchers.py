"""How each launcher starts the ranks of a training that is prepared, and what it says it would start."""

from collections.abc import Callable

from megalite.config.place import Place
from megalite.errors import EXIT_OK

from .deepspeed import describe_deepspeed, start_deepspeed
from .lives import run_lives
from .prepare import Training
from .slurm.submit import describe_slurm, start_slurm
from .spawn import spawn_ranks
from .torchrun import describe_torchrun, start_torchrun


def start_local(training: Training) -> int:
    """Ranks on this machine, forked from this process; the only one of a world of one is this process."""
    from megalite.train import train as train_rank

    config = training.config
    if training.world_size == 1 and not config.launch.restarts:
        train_rank(config, Place())
        return EXIT_OK
    return run_lives(lambda: spawn_ranks(lambda place: train_rank(config, place), training.world_size), config)


def describe_local(training: Training) -> str:
    """What `start_local` would do."""
    return f"{training.world_size} ranks on this machine, forked from the megalite command; they meet through a file"


# How each launcher is described (launch.dry_run=true) and started.
LAUNCHERS: dict[str, tuple[Callable[[Training], str], Callable[[Training], int]]] = {
    "local": (describe_local, start_local),
    "torchrun": (describe_torchrun, start_torchrun),
    "deepspeed": (describe_deepspeed, start_deepspeed),
    "slurm": (describe_slurm, start_slurm),
}
