"""TensorBoard event files, under the panel names that wandb uses."""

from pathlib import Path

from megalite.errors import ConfigError
from megalite.metrics.base import Row, panels


class TensorboardSink:
    """Writes scalars; the extra `tensorboard` brings the library."""

    def __init__(self, folder: Path, resume_step: int) -> None:
        """Start an event file in `folder`; what earlier files hold beyond `resume_step` is hidden by TensorBoard.

        Raises `ConfigError` when the library is missing.
        """
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise ConfigError(
                f"logging.tensorboard=true needs a library that is missing ({error}): "
                "pip install megalite[tensorboard], or set logging.tensorboard=false"
            ) from None
        self._writer = SummaryWriter(str(folder), purge_step=resume_step + 1 if resume_step else None)

    def log(self, step: int, row: Row) -> None:
        """Write the row's scalars and flush, so that a kill loses nothing that was logged."""
        for name, value in panels(row).items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()

    def close(self) -> None:
        """Close the event file."""
        self._writer.close()
