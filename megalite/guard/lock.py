"""One process at a time trains in a run directory."""

import fcntl
import os
import socket
from pathlib import Path

from megalite.errors import ResourceError

LOCK_FILE = "run.lock"


class RunLock:
    """Holds `run_dir/run.lock` until closed or until the process ends, however it ends: the kernel lets go."""

    def __init__(self, run_dir: Path):
        """Take the lock, making the directory if needed. Raises `ResourceError` when another process holds it."""
        path = run_dir / LOCK_FILE
        try:
            run_dir.mkdir(parents=True, exist_ok=True)
            self._file = open(path, "a+", encoding="utf-8")  # noqa: SIM115  held open on purpose
        except OSError as error:
            raise ResourceError(f"run_dir: {run_dir} cannot be used as a directory to write in: {error}") from None
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            self._file.seek(0)
            holder = self._file.read().strip() or "unknown"
            self._file.close()
            raise ResourceError(
                f"run_dir: {run_dir} is in use by another training ({holder}); wait for it, or choose another run_name"
            ) from None
        self._file.truncate(0)
        self._file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        self._file.flush()

    def close(self) -> None:
        """Let go."""
        self._file.close()
