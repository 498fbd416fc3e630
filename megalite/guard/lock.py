"""One process at a time works in a directory."""

import fcntl
import os
import socket
import time
from pathlib import Path
from typing import IO

from megalite.errors import ResourceError

LOCK_FILE = "run.lock"
_TRIES, _TRY_SECONDS = 6, 0.05


class RunLock:
    """Holds `directory/run.lock` until closed or until the process ends, however it ends: the kernel lets go."""

    def __init__(
        self,
        directory: Path,
        key: str = "run_dir",
        work: str = "training",
        advice: str = "run_name",
        *,
        shared: bool = False,
    ):
        """Take the lock, making the directory if needed. Raises `ResourceError` when another process holds it.

        The message names the configuration's `key` for the directory, what `work` is done there, and the key of
        another name to choose. `shared`: with others who share it, and with nobody who does not.
        """
        path = directory / LOCK_FILE
        try:
            directory.mkdir(parents=True, exist_ok=True)
            self._file = open(path, "a+", encoding="utf-8")  # noqa: SIM115  held open on purpose
        except OSError as error:
            raise ResourceError(f"{key}: {directory} cannot be used as a directory to write in: {error}") from None
        try:
            _take(self._file, fcntl.LOCK_SH if shared else fcntl.LOCK_EX)
        except BlockingIOError:
            self._file.seek(0)
            holder = self._file.read().strip() or "unknown"
            self._file.close()
            raise ResourceError(
                f"{key}: {directory} is in use by another {work} ({holder}); wait for it, or choose another {advice}"
            ) from None
        except OSError as error:
            self._file.close()
            raise ResourceError(
                f"{key}: the disk of {directory} takes no locks ({error}), which keep two of one {work} apart; choose "
                "another disk, or have it mounted with locks (Lustre: -o flock)"
            ) from None
        try:
            self._file.truncate(0)
            self._file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
            self._file.flush()
        except OSError as error:
            raise ResourceError(f"{key}: nothing can be written in {directory}: {error}. Is the disk full?") from None

    def close(self) -> None:
        """Let go."""
        self._file.close()


def _take(file: IO[str], kind: int) -> None:
    """Raises `BlockingIOError` where another process holds the lock; one that only asks (`is_locked`) soon lets go."""
    for _ in range(_TRIES):
        try:
            return fcntl.flock(file, kind | fcntl.LOCK_NB)
        except BlockingIOError:
            time.sleep(_TRY_SECONDS)
    fcntl.flock(file, kind | fcntl.LOCK_NB)


def is_locked(directory: Path) -> bool:
    """Whether a process works in `directory` now."""
    try:
        with open(directory / LOCK_FILE, encoding="utf-8") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False
    return False
