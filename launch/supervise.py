"""Another project's launcher as a child: signals reach its ranks, and nothing of it outlives the command."""

import ctypes
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil

from megalite.config.place import PLACES
from megalite.errors import EXIT_OK, EXIT_REQUEUE
from megalite.guard.signals import SIGNALS, TOGETHER_SECONDS

_POLL_SECONDS = 0.1
LAST_SECONDS = 5.0  # between TERM and KILL for a launcher whose ranks are gone
ENDED = 128 + signal.SIGTERM  # the exit code of what was asked to end and did not save
_PR_SET_PDEATHSIG = 1


def supervise(
    command: Sequence[str],
    environment: Mapping[str, str],
    grace: float,
    follow: "Callable[[subprocess.Popen[bytes]], Tree] | None" = None,
    save_seconds: float = 0.0,
) -> int:
    """Run `command` to its end; returns its exit code as a shell would (128 + the number of the signal that ended it).

    SIGTERM, SIGUSR1, SIGINT or SIGHUP to this process reach every process below it as SIGUSR1, which ranks save at and
    launchers ignore; a second one ends them all, or `grace` seconds, if `save_seconds` are no more. A launcher whose
    ranks have all gone gets `grace` to notice: cut off from the other hosts, torchrun was seen to wait for minutes and
    to ignore SIGTERM.

    The child has a session of its own: a terminal sends Ctrl-C to all of its processes, and launchers end ranks at it.
    `follow`: gives the child's ranks where these are no processes below it.
    """
    ignored = signal.signal(signal.SIGUSR1, signal.SIG_IGN)  # inherited, also by what the child executes
    child = subprocess.Popen(
        list(command), env=dict(environment), stdin=subprocess.DEVNULL, start_new_session=True,
        preexec_fn=None if follow else _end_with_parent,
    )  # fmt: skip
    signal.signal(signal.SIGUSR1, ignored)
    tree = follow(child) if follow else Tree(child)
    with _signals() as received:
        try:
            has_ranks = _follow(child, tree, received, command[0], grace, max(grace, save_seconds))
        finally:
            tree.end()
        code = child.wait()
    if received and not has_ranks and code != EXIT_OK:
        return EXIT_REQUEUE  # nothing has begun that could be lost
    if received and code not in (EXIT_OK, EXIT_REQUEUE):
        return ENDED  # it was asked to end: whatever it took, that is no failure of the ranks
    return code if code >= 0 else 128 - code


def _follow(
    child: "subprocess.Popen[bytes]", tree: "Tree", received: list[float], name: str, grace: float, save_seconds: float
) -> bool:
    """Until the child has ended, or is to be ended; returns False where it was asked to before any rank stood."""
    asked = deadline = alone = None
    has_ranks = True
    while child.poll() is None and (deadline is None or time.monotonic() < deadline):
        tree.look()
        now = time.monotonic()
        if received and asked is None:
            # Where nobody listens ranks have not begun, and there is nothing to save.
            has_ranks = tree.ask()
            asked, deadline = now, now + (save_seconds if has_ranks else 0.0)
        elif asked is not None and len(received) > 1 and received[-1] - received[0] > TOGETHER_SECONDS:
            deadline = now
        who = tree.deserted()
        alone = (alone or now) if who else None
        if alone is not None and now > alone + grace:
            print(f"{who}, but {name} has waited for {grace:.0f} s: ending it", file=sys.stderr)
            deadline = now
        time.sleep(_POLL_SECONDS)
    return has_ranks


def _end_with_parent() -> None:
    """In the child: a session of its own does not hear of what ends ours."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


class Tree:
    """The processes below a child. What was seen once is known also when its parent has gone."""

    def __init__(self, child: "subprocess.Popen[bytes]"):
        """Nothing has been seen yet."""
        self._child, self._root = child, psutil.Process(child.pid)
        self._known: set[psutil.Process] = set()
        self._has_worked = False

    def look(self) -> None:
        """See who is there."""
        with suppress(psutil.Error):
            self._known |= set(self._root.children(recursive=True))
        self._known = {process for process in self._known if is_alive(process)}
        self._has_worked |= bool(self._known)

    def deserted(self) -> str:
        """Who is gone while the child still waits; empty while nobody is."""
        return "all ranks are gone" if self._has_worked and not self._known else ""

    def ask(self) -> bool:
        """Ask ranks to save and to end; False where none has a handler for it, as ranks have once they stand."""
        listens = any(catches(process.pid, signal.SIGUSR1) for process in self._known)
        self.send(signal.SIGUSR1)
        return listens

    def send(self, number: int) -> None:
        """A signal to all processes below the child."""
        for process in self._known:
            with suppress(psutil.Error):
                process.send_signal(number)

    def end(self) -> None:
        """TERM and, a little later, KILL for all that is left, the child included."""
        self.look()
        for number in (signal.SIGTERM, signal.SIGKILL):
            self.send(number)
            self._child.send_signal(number)  # nothing happens where it has ended
            with suppress(subprocess.TimeoutExpired):
                self._child.wait(LAST_SECONDS)
            _, left = psutil.wait_procs(self._known, timeout=LAST_SECONDS)
            self._known = set(left)


def catches(pid: int, number: int) -> bool:
    """Whether a process of this host has a handler for a signal."""
    with suppress(OSError):
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            if line.startswith("SigCgt:"):
                return bool(int(line.split()[1], 16) & 1 << number - 1)
    return False


def is_alive(process: psutil.Process) -> bool:
    """Whether a process still works; one that only waits for its parent to take note of its end does not."""
    with suppress(psutil.Error):
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    return False


@contextmanager
def _signals() -> Iterator[list[float]]:
    """The times at which this process was asked to stop."""
    received: list[float] = []
    numbers = [*SIGNALS, signal.SIGHUP]
    if signal.getsignal(signal.SIGHUP) == signal.SIG_IGN:
        numbers.remove(signal.SIGHUP)  # nohup: the terminal may close
    before = {number: signal.signal(number, lambda *_: received.append(time.monotonic())) for number in numbers}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def clean_environment() -> dict[str, str]:
    """This process's variables without those that tell a rank where it stands: the child is to set its own."""
    return {
        name: value for name, value in os.environ.items() if name not in PLACES and not name.startswith("TORCHELASTIC_")
    }
