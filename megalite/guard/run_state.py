"""What became of a run: one small file in its directory, for people, tables and launchers to read."""

import json
import os
import socket
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Any

from megalite.config.place import own_job
from megalite.errors import EXIT_FAILURE, EXIT_OK, EXIT_REQUEUE, MegaliteError, Preempted
from megalite.guard.lock import is_locked
from megalite.redaction import redact_text

STATE_FILE = "state.json"


@dataclass(frozen=True)
class RunState:
    """How the last life of a run stands (one life is one start of the command)."""

    # running; finished (at its last step); stopped (at trainer.stop_after); preempted (by a signal, saved); failed;
    # died (what `read_state` makes of running when nobody is there any more)
    state: str
    started: float  # seconds since 1970
    changed: float
    world_size: int
    host: str  # of rank 0
    pid: int
    job: str = ""  # of Slurm: its number, with _TASK in an array
    step: int = 0
    last_step: int = 0  # where it is to end; 0: not known yet
    exit_code: int | None = None
    error: str = ""


class LifeRecord:
    """Keeps the file of a life, as a context: whatever ends the block is written down. For rank 0, under its lock."""

    def __init__(self, run_dir: Path, world_size: int):
        """The run is `running`."""
        now = time.time()
        self._path = run_dir / STATE_FILE
        self._ends_as = "finished"
        self._state = RunState("running", now, now, world_size, socket.gethostname(), os.getpid(), own_job())

    def __enter__(self) -> "LifeRecord":
        self._write()
        return self

    def stands(self, step: int, last_step: int, steps: int) -> None:
        """The run stands at `step` and this life ends at `last_step`, of `steps` in all."""
        self._state = replace(self._state, step=step, last_step=last_step)
        self._ends_as = "finished" if last_step == steps else "stopped"

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self.end(error)

    def end(self, error: BaseException | None) -> None:
        """The life ends with `error`, or well."""
        if error is None:
            self._write(state=self._ends_as, exit_code=EXIT_OK)
        elif isinstance(error, Preempted):
            self._write(state="preempted", exit_code=EXIT_REQUEUE)
        else:
            code = error.exit_code if isinstance(error, MegaliteError) else EXIT_FAILURE
            self._write(state="failed", exit_code=code, error=redact_text(f"{type(error).__name__}: {error}"))

    def _write(self, **changes: Any) -> None:
        self._state = replace(self._state, changed=time.time(), **changes)
        temporary = self._path.with_suffix(".tmp")
        try:
            temporary.write_text(json.dumps(asdict(self._state)) + "\n", encoding="utf-8")
            temporary.replace(self._path)
        except OSError:
            pass  # a full disk is told by what matters more; training goes on


def read_state(run_dir: Path) -> RunState | None:
    """The state of the run in `run_dir`; None where there is none, or no readable one."""
    try:
        state = RunState(**json.loads((run_dir / STATE_FILE).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError, RecursionError):
        return None
    return replace(state, state="died") if state.state == "running" and not is_locked(run_dir) else state


def read_life_since(before: RunState | None, run_dir: Path) -> RunState | None:
    """The state of a life that began after `before` was read; None: none has begun."""
    state = read_state(run_dir)
    return None if state is None or (before is not None and state.started == before.started) else state
