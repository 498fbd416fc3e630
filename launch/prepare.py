"""A training before its ranks: how many there will be, on what, and every check that needs no torch."""

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from megalite.config.place import count_cores, count_gpus
from megalite.config.schema import StoreConfig, TrainConfig
from megalite.config.schema_launch import LaunchConfig
from megalite.config.validate import resolve_auto, validate_train
from megalite.data.manifest import MANIFEST
from megalite.log import get_logger
from megalite.preflight import preflight

log = get_logger(__name__)


@dataclass(frozen=True)
class Training:
    """What is to be trained, and by how many ranks on what."""

    config: TrainConfig  # validated, resolved, complete
    world_size: int
    device: str  # cpu or cuda

    @property
    def ranks_per_node(self) -> int:
        """Ranks on each host."""
        return self.world_size // self.config.launch.nodes


def world_of(launch: LaunchConfig) -> tuple[int, str]:
    """The number of ranks that `launch` stands for, and what they run on: `cpu` or `cuda`."""
    # Of Slurm's nodes nothing is known but what is asked for.
    gpus = launch.slurm.gpus_per_node or 0 if launch.name == "slurm" else count_gpus()
    return launch.nodes * (launch.nproc_per_node or max(1, gpus)), "cuda" if gpus else "cpu"


def prepare(config: TrainConfig, change: Callable[[TrainConfig], TrainConfig] = lambda config: config) -> Training:
    """Check everything that can be checked without torch and without ranks.

    `change`: done to the configuration once its own rules hold, and before the disk is looked at. Where stores are
    still to be made by jobs of `launch.slurm.after`, ranks look at the disk, and `model.vocab_size` may be null.
    Raises `ConfigError`, `DataError` or `CheckpointError`, naming the key or the file.
    """
    world_size, device = world_of(config.launch)
    validate_train(config, world_size, device)
    # Slurm's login node speaks for all: the run directory is there.
    is_alone = config.launch.nodes == 1 or config.launch.name == "slurm"
    config = resolve_auto(change(config), device, world_size)
    if awaited := [store.path for store in (*config.data.train, *config.data.validation) if _is_awaited(store, config)]:
        jobs = ", ".join(config.launch.slurm.after)
        log.info("data: %s: not there yet; looked at when job %s has ended well", ", ".join(awaited), jobs)
        return Training(config, world_size, device)
    found = preflight(config, is_alone)
    validate_train(found, world_size, device)  # again, now that model.vocab_size is known
    # A job that this one waits for may put other stores in their place: then ranks see what there is.
    return Training(config if config.launch.slurm.after else found, world_size, device)


def _is_awaited(store: StoreConfig, config: TrainConfig) -> bool:
    """Whether another job of Slurm, which this training waits for, is to make the store."""
    return bool(config.launch.slurm.after) and not (Path(store.path) / MANIFEST).exists()


def given_environment(launch: LaunchConfig) -> dict[str, str]:
    """The variables of `launch.environment`, told to the log."""
    given = {name: str(value) for name, value in launch.environment.items()}
    if given:
        log.info("launch.environment: %s", " ".join(f"{name}={value}" for name, value in given.items()))
    return given


def import_for_ranks(training: Training) -> None:
    """The slow imports, once, in the process that ranks are forked from, and the variables that ranks are to have."""
    os.environ.update(given_environment(training.config.launch))
    if training.world_size > 1 and training.device == "cpu":
        # Read when torch is imported: ranks share the cores.
        os.environ.setdefault("OMP_NUM_THREADS", str(max(1, count_cores() // training.world_size)))
    import megalite.train  # noqa: F401
    from megalite.engine import preload

    if training.device == "cpu":
        preload()
