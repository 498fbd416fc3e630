"""Another project's launcher as a child: signals reach its ranks, and nothing of it outlives the command."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil

from megalite.errors import EXIT_OK, EXIT_REQUEUE
from megalite.guard.signals import SIGNALS, TOGETHER_SECONDS

_POLL_SECONDS = 0.1
_LAST_SECONDS = 5.0  # between TERM and KILL for a launcher whose ranks are gone


def supervise(command: Sequence[str], environment: Mapping[str, str], grace: float) -> int:
    """Run `command` to its end; returns its exit code as a shell would (128 + the number of the signal that ended it).

    SIGTERM, SIGUSR1 or SIGINT to this process reach every process below it as SIGUSR1, which ranks save at and
    launchers ignore; a second one, or `grace` seconds, ends them all. A launcher whose ranks have all gone gets as long
    to notice: cut off from the other hosts, torchrun was seen to wait for minutes and to ignore SIGTERM.
    """
    ignored = signal.signal(signal.SIGUSR1, signal.SIG_IGN)  # inherited, also by what the child executes
    child = subprocess.Popen(list(command), env=dict(environment))
    signal.signal(signal.SIGUSR1, ignored)
    tree = _Tree(child)
    with _signals() as received:
        asked = deadline = alone = None
        while child.poll() is None:
            tree.look()
            now = time.monotonic()
            if received and asked is None:
                # Where nobody listens ranks have not begun, and there is nothing to save.
                asked, deadline = now, now + (grace if tree.listens else 0.0)
                tree.send(signal.SIGUSR1)
            elif asked is not None and len(received) > 1 and received[-1] - received[0] > TOGETHER_SECONDS:
                deadline = now
            alone = None if tree.works or not tree.has_worked else alone or now
            if alone is not None and now > alone + grace:
                print(f"all ranks are gone, but {command[0]} has waited for {grace:.0f} s: ending it", file=sys.stderr)
                deadline = now
            if deadline is not None and now >= deadline:
                tree.end()
                break
            time.sleep(_POLL_SECONDS)
        code = child.wait()
        tree.end()
    if received and code not in (EXIT_OK, EXIT_REQUEUE):
        return 128 + signal.SIGTERM  # it was asked to end: whatever it took, that is no failure of the ranks
    return code if code >= 0 else 128 - code


class _Tree:
    """The processes below a child. What was seen once is known also when its parent has gone."""

    def __init__(self, child: "subprocess.Popen[bytes]"):
        self._child, self._root = child, psutil.Process(child.pid)
        self._known: set[psutil.Process] = set()
        self.has_worked = False

    def look(self) -> None:
        with suppress(psutil.Error):
            self._known |= set(self._root.children(recursive=True))
        self._known = {process for process in self._known if _is_alive(process)}
        self.has_worked |= bool(self._known)

    @property
    def works(self) -> bool:
        """Whether the child has children."""
        return bool(self._known)

    @property
    def listens(self) -> bool:
        """Whether any of them has a handler for SIGUSR1, as ranks have once they stand."""
        return any(_catches(process.pid, signal.SIGUSR1) for process in self._known)

    def send(self, number: int) -> None:
        for process in self._known:
            with suppress(psutil.Error):
                process.send_signal(number)

    def end(self) -> None:
        """TERM and, a little later, KILL for all that is left."""
        self.look()
        for number in (signal.SIGTERM, signal.SIGKILL):
            self.send(number)
            self._child.send_signal(number)  # nothing happens where it has ended
            with suppress(subprocess.TimeoutExpired):
                self._child.wait(_LAST_SECONDS)
            _, left = psutil.wait_procs(self._known, timeout=_LAST_SECONDS)
            self._known = set(left)


def _catches(pid: int, number: int) -> bool:
    with suppress(OSError):
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            if line.startswith("SigCgt:"):
                return bool(int(line.split()[1], 16) & 1 << number - 1)
    return False


def _is_alive(process: psutil.Process) -> bool:
    with suppress(psutil.Error):
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    return False


@contextmanager
def _signals() -> Iterator[list[float]]:
    """The times at which this process was asked to stop."""
    received: list[float] = []
    before = {number: signal.signal(number, lambda *_: received.append(time.monotonic())) for number in SIGNALS}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def clean_environment() -> dict[str, str]:
    """This process's variables without those that tell a rank where it stands: the child is to set its own."""
    places = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    return {name: value for name, value in os.environ.items() if name not in places}
