"""A rank's sign of life: where it stands, published outside the process group, for the monitor to read.

In `logs/heartbeats/` stand `rank_00003.json`, the rank's record, written over every second, and `rank_00003.stacks`,
what its threads are at, written when the monitor asks for it by a signal.
"""

import contextlib
import faulthandler
import json
import os
import secrets
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from megalite.errors import EXIT_RESOURCE, ResourceError
from megalite.guard.observer import FOLDER, VERDICT_FILE, MonitorSettings, read_names
from megalite.guard.proc import find_launchers, name_machine, read_stat
from megalite.guard.stall import Limits
from megalite.log import get_logger

log = get_logger(__name__)

Collectives = Callable[[], Mapping[str, Sequence[tuple[int, str]]]]

_BLOCK = 1024  # records are padded to a multiple of it: a short one covers the longer one before
# Not `-m`, and without `site`: starts in half the time, wherever the package is installed and whatever lies in the
# working directory.
_MONITOR = (
    "import sys; sys.path.append(sys.argv[1]); from megalite.guard.monitor import main; sys.exit(main(sys.argv[2]))"
)


class Heartbeat:
    """Tells where this rank stands until closed. On local rank 0 it also starts the machine's monitor."""

    def __init__(
        self,
        logs: Path,
        rank: int,
        local_rank: int,
        world_size: int,
        *,
        limits: Limits | None = None,
        has_launcher: bool = True,
        machine: str | None = None,
        meeting: str = "",
    ):
        """Publish a first record, and start the thread that publishes the next ones.

        `has_launcher`: this rank must not outlive the process that started it (not so for one started from a shell,
        which may be closed). `machine`: names the machine; for tests of several on one. `meeting`: HOST:PORT where
        ranks of several hosts met. Raises `ResourceError` when
        nothing can be written under `logs`.
        """
        limits = limits or Limits()
        self._period = limits.period(world_size)
        # Phase, step, steps, phases of this step, phases: one tuple, so that the thread never reads half a change.
        self._now = ("start", 0, 0, 0, 0)
        self._collectives: Collectives | None = None
        self._published, self._published_progress, self._size = 0, -1, 0
        self._stop = threading.Event()
        folder = logs / FOLDER
        self._path, self._verdict = folder / f"rank_{rank:05d}.json", folder / VERDICT_FILE
        try:
            folder.mkdir(parents=True, exist_ok=True)
            # Not emptied: a second job started here by mistake must not cut off the one that runs.
            self._stacks = open(self._path.with_suffix(".stacks"), "ab", buffering=0)  # noqa: SIM115  held open
            self._signals = _answer_with_stacks(self._stacks.fileno())
            self._identity = _identify(rank, world_size, machine) | {
                "signal": self._signals[0],
                "own_signal": self._signals[1],
                "launchers": find_launchers() if has_launcher else [],
            }
            self._write()
        except OSError as error:
            raise ResourceError(f"run_dir: no heartbeat can be written in {folder}: {error}") from None
        self._thread = threading.Thread(target=self._run, name="heartbeat", daemon=True)
        self._thread.start()
        settings = MonitorSettings(str(logs), rank, world_size, self._identity["machine"], limits, meeting)
        self._monitor = _start_monitor(settings) if local_rank == 0 else None

    def watch_collectives(self, collectives: Collectives) -> None:
        """Publish what `collectives()` gives: process group -> its last few (sequence number, operation), oldest first.

        Called by the heartbeat's thread, and only while the rank does not move: a run that moves pays nothing. A group
        has one name on all its ranks, and an empty list before its first collective. Leave out point-to-point
        operations, whose two sides differ, and on a GPU what waits in the queue and has not started.
        """
        self._collectives = collectives

    def enter(self, phase: str, step: int | None = None) -> None:
        """The rank goes on to `phase`, of `step` if that is another one now; all ranks do in the same order.

        Before the first step phases are called "start: ...", with "start: process group" until that stands; "evaluate"
        and "save" have limits of their own; all others are parts of a step. Entering a phase once more tells that the
        rank moves: after each batch of an evaluation.
        """
        _, last_step, steps, phases, progress = self._now
        if step is None or step == last_step:
            self._now = (phase, last_step, steps, phases + 1, progress + 1)
        else:
            self._now = (phase, step, steps + 1, 0, progress + 1)

    def close(self) -> None:
        """The rank's work is done, and nobody waits for it any more. The monitor ends with the machine's last rank."""
        self._stop.set()
        self._thread.join()
        self._obey()  # what ended this rank's work may be that another one obeyed first
        self.enter("end")
        self._publish()
        for number in self._signals:
            faulthandler.unregister(number)
        self._stacks.close()
        if self._monitor is not None and self._monitor.stdin is not None:
            self._monitor.stdin.close()  # which it notices
            with contextlib.suppress(subprocess.TimeoutExpired):  # it stays with ranks that are still at work
                self._monitor.wait(timeout=2 * self._period)

    def _run(self) -> None:
        while not self._stop.wait(self._period):
            self._publish()
            self._obey()

    def _obey(self) -> None:
        """End when the monitor says so: no exception reaches a main thread that waits in a collective."""
        if self._identity["token"] in read_names(self._verdict):
            os._exit(EXIT_RESOURCE)

    def _publish(self) -> None:
        with contextlib.suppress(OSError):  # the next one may succeed; training does not depend on it
            self._write()

    def _write(self) -> None:
        phase, step, steps, phases, progress = self._now
        quiet, self._published_progress = progress == self._published_progress, progress
        collectives = self._last_collectives() if quiet else {}
        self._published += 1
        values = self._identity | {
            "phase": phase,
            "step": step,
            "num_steps": steps,
            "num_phases": phases,
            "progress": progress,
            "published": self._published,
            "collectives": collectives,
        }
        text = json.dumps(values).encode()
        self._size = max(self._size, -(-len(text) // _BLOCK) * _BLOCK)
        # Opened each time: a network file system shows others what was written when the file is closed.
        file = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            os.pwrite(file, text.ljust(self._size), 0)
        finally:
            os.close(file)

    def _last_collectives(self) -> Mapping[str, Sequence[tuple[int, str]]]:
        if self._collectives is None:
            return {}
        try:
            return self._collectives()
        except Exception as error:
            log.warning("the watchdog does without the ranks' last collectives: %s", error)
            self._collectives = None
            return {}


def _identify(rank: int, world_size: int, machine: str | None) -> dict[str, Any]:
    """The part of a record that names this process."""
    stat = read_stat(os.getpid())
    assert stat is not None, "a process finds itself under /proc"
    return {
        "rank": rank,
        "world_size": world_size,
        "host": os.uname().nodename,
        "machine": machine or name_machine(),
        "pid": os.getpid(),
        "start": stat.start,
        "token": secrets.token_hex(8),
    }


def _answer_with_stacks(file: int) -> tuple[int, int]:
    """The signals on which Python stacks go to `file`: those of all threads, and that of the thread that gets it.

    By handlers in C, so while the GIL is held too.
    """
    # The first real-time signals are used by C libraries.
    free = (n for n in range(signal.SIGRTMIN + 8, signal.SIGRTMAX) if signal.getsignal(n) == signal.SIG_DFL)
    numbers = next(free), next(free)
    for number, all_threads in zip(numbers, (True, False), strict=True):
        faulthandler.register(number, file, all_threads=all_threads)
    return numbers


def _start_monitor(settings: MonitorSettings) -> "subprocess.Popen[bytes] | None":
    package = Path(__file__).parents[2]
    command = [sys.executable, "-S", "-P", "-c", _MONITOR, str(package), json.dumps(asdict(settings))]
    try:
        return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL)
    except OSError as error:
        log.warning("no watchdog on this machine: its process does not start: %s", error)
        return None
