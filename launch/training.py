"""`megalite train`: composed, checked and frozen once, then started as `launch` says."""

from collections.abc import Callable

from megalite.config.compose import compose_train
from megalite.config.frozen import config_yaml
from megalite.config.place import Place
from megalite.config.validate import validate_train
from megalite.errors import EXIT_OK, EXIT_REQUEUE, ConfigError
from megalite.guard.signals import ending_at_once
from megalite.log import setup_logging

from .deepspeed import describe_deepspeed, start_deepspeed
from .layout import describe_layout
from .lives import run_lives
from .prepare import Training, import_for_ranks, prepare, world_of
from .slurm import describe_slurm, start_slurm
from .spawn import spawn_ranks
from .torchrun import describe_torchrun, start_torchrun


def train(arguments: list[str]) -> int:
    """Train a model; returns the exit code of the run."""
    setup_logging()
    if several := {"-m", "--multirun"}.intersection(arguments):
        from .sweep import sweep

        return sweep([argument for argument in arguments if argument not in several])
    if own := [argument for argument in arguments if argument.startswith(("sweep.", "sweep="))]:
        raise ConfigError(f"{own[0]}: is for several trainings: megalite train -m ...")
    with ending_at_once(EXIT_REQUEUE):
        config = compose_train([argument for argument in arguments if argument != "--cfg"])
        if "--cfg" in arguments:
            validate_train(config, *world_of(config.launch))
            print(config_yaml(config), end="")
            return EXIT_OK
        training = prepare(config)
        describe, start = LAUNCHERS[config.launch.name]
        if config.launch.dry_run:
            print(describe_layout(training))
            print(describe(training))
            return EXIT_OK
        if config.launch.name == "local":
            import_for_ranks(training)
    return start(training)


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
