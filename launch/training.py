"""`megalite train`: composed, checked and frozen once, then started as `launch` says."""

from megalite.config.compose import compose_train
from megalite.config.frozen import config_yaml
from megalite.config.place import is_one_of_several
from megalite.config.validate import validate_train
from megalite.errors import EXIT_OK, EXIT_REQUEUE, ConfigError
from megalite.guard.signals import ending_at_once
from megalite.log import setup_logging

from .launchers import LAUNCHERS
from .layout import describe_layout
from .prepare import import_for_ranks, prepare, world_of


def train(arguments: list[str]) -> int:
    """Train a model; returns the exit code of the run."""
    setup_logging()
    if several := {"-m", "--multirun"}.intersection(arguments):
        from .sweep.command import sweep

        return sweep([argument for argument in arguments if argument not in several])
    if own := [argument for argument in arguments if argument.startswith(("sweep.", "sweep="))]:
        raise ConfigError(f"{own[0]}: is for several trainings: megalite train -m ...")
    if is_one_of_several():
        raise ConfigError(
            "megalite train starts the ranks itself, and srun or torchrun has started several of it: give them "
            "`python -m megalite.train` with the same keys, or see launch=slurm"
        )
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
