"""The disk that checkpoints are written to: tried again where that is wanted, and what to say when it refuses."""

import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from megalite.errors import CheckpointError
from megalite.log import get_logger

RETRY_SECONDS = (1.0, 5.0, 25.0)  # between the tries of checkpoint.on_save_error=retry

log = get_logger(__name__)
T = TypeVar("T")


class Disk:
    """As one rank sees it."""

    def __init__(self, run_dir: Path, rank: int, num_bytes: int, tries_again: bool):
        """`num_bytes`: what a checkpoint takes."""
        self._run_dir, self._rank, self._num_bytes, self._tries_again = run_dir, rank, num_bytes, tries_again

    def retrying(self, work: Callable[[], T]) -> T:
        """What `work` returns; with `checkpoint.on_save_error=retry` it is done again where the disk refuses."""
        for seconds in RETRY_SECONDS if self._tries_again else ():
            try:
                return work()
            except OSError as error:
                log.warning("saving failed: %s; trying again in %g s", error, seconds)
                time.sleep(seconds)
        return work()

    def explain(self, error: Exception) -> str:
        """What to tell other ranks of an error in this one's part of a save."""
        if isinstance(error, CheckpointError):
            return str(error)
        if not isinstance(error, OSError):
            log.error("this rank could not do its part of a save", exc_info=error)
            return f"rank {self._rank} could not do its part of a save: {error!r}"
        try:
            free = f"{shutil.disk_usage(self._run_dir).free:,}"
        except OSError:
            free = "an unknown number"
        return (
            f"rank {self._rank} could not write a checkpoint: {error}. It takes {self._num_bytes:,} bytes, the disk "
            f"has {free} free"
        )
