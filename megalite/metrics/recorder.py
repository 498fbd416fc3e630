"""Everything that a run tells the world, behind two calls: the sinks and the progress line, on rank 0 alone."""

from pathlib import Path

from megalite.config.compose import config_values
from megalite.config.schema import TrainConfig
from megalite.mesh import Mesh
from megalite.metrics.base import Row
from megalite.metrics.progress import Progress, build_progress
from megalite.metrics.sinks import build_sinks


class Recorder:
    """Silent on every rank but 0."""

    def __init__(self, config: TrainConfig, mesh: Mesh, step: int):
        """For a run that stands at `step`; rows of an earlier session beyond it are dropped (see `build_sinks`)."""
        self._progress: list[Progress] = []
        self._sinks = []
        if mesh.rank == 0:
            values = config_values(config)
            self._sinks = build_sinks(config.logging, Path(config.run_dir), config.run_name, step, values)
            self._progress = [build_progress(config.trainer.steps, step, mesh.world_size)]

    def advance(self) -> None:
        """One step is done; costs nothing."""
        for progress in self._progress:
            progress.advance()

    def log(self, step: int, row: Row) -> None:
        """Record the figures of `step`; called once a step at most."""
        for target in [*self._sinks, *self._progress]:
            target.log(step, row)

    def close(self) -> None:
        """Write out what is pending, leave the terminal as it was."""
        for target in [*self._progress, *self._sinks]:
            target.close()
