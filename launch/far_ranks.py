"""Ranks on the other side of ssh: found there by a mark in their environment, asked to stop, and ended.

DeepSpeed's runner starts ranks through pdsh, so they are no processes below ours; and it ends them by the name of its
launcher, which all runs on those hosts share. `python -m megalite.launch.far_ranks MARK SIGNAL` is what each host runs.
"""

import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path

import psutil

from .supervise import LAST_SECONDS, Tree, catches, is_alive

MARK = "MEGALITE_START"  # the variable; its value no other start of any run has
_CONNECT_SECONDS, _ANSWER_SECONDS = 10, 20
_POLL_SECONDS = 0.05


class FarRanks(Tree):
    """pdsh and its connections, which are processes below a child, and what they started on `hosts`."""

    def __init__(
        self,
        child: "subprocess.Popen[bytes]",
        hosts: Sequence[str],
        mark: str,
        environment: Mapping[str, str],
        is_training: Callable[[], bool],
    ):
        """`mark`: the value that the far processes have; `environment`: the one in which pdsh reaches `hosts`.

        `is_training`: whether some rank is where it needs all others, as far as that is known.
        """
        super().__init__(child)
        self._hosts, self._mark, self._environment = list(hosts), mark, environment
        self._is_training, self._all_stood = is_training, False

    def deserted(self) -> str:
        """A host whose ranks have died leaves the others waiting, perhaps for good: pdsh waits for all."""
        words = {word for process in self._known for word in _words_of_ssh(process)}
        gone = [host for host in self._hosts if host.rpartition("@")[2] not in words]
        self._all_stood |= not gone
        is_missed = gone and self._all_stood and self._is_training()
        return f"all ranks on {', '.join(gone)} are gone" if is_missed else ""

    def ask(self) -> bool:
        """SIGUSR1 to the ranks on all hosts; one is enough, for they agree on a step to stop at."""
        return self._tell(signal.SIGUSR1) > 0

    def end(self) -> None:
        """KILL: DeepSpeed's runner answers TERM by ending other runs on the hosts too."""
        self.look()
        self.send(signal.SIGKILL)
        self._child.kill()
        self._child.wait()
        psutil.wait_procs(self._known, timeout=LAST_SECONDS)
        self._tell(signal.SIGKILL)

    def _tell(self, number: int) -> int:
        """Have the hosts send a signal; returns to how many processes. Says so where a host does not answer."""
        path = os.pathsep.join(filter(None, (os.getcwd(), os.environ.get("PYTHONPATH"))))  # as the runner has it
        words = [f"PYTHONPATH={path}", sys.executable, "-m", "megalite.launch.far_ranks", self._mark, str(int(number))]
        command = [
            "pdsh", "-S", "-N", "-f", str(len(self._hosts)), "-t", str(_CONNECT_SECONDS), "-u", str(_ANSWER_SECONDS),
            "-w", ",".join(self._hosts), f"env {shlex.join(words)}".replace("%", "%%"),
        ]  # fmt: skip
        done = subprocess.run(
            command, env={**self._environment, "PDSH_RCMD_TYPE": "ssh"}, stdin=subprocess.DEVNULL, capture_output=True,
            text=True, check=False,
        )  # fmt: skip
        if done.returncode:
            name = signal.Signals(number).name
            print(f"{name} did not reach all of {', '.join(self._hosts)}: {done.stderr.strip()}", file=sys.stderr)
        return sum(int(line) for line in done.stdout.splitlines() if line.strip().isdigit())


def _words_of_ssh(process: psutil.Process) -> list[str]:
    """The command line of a connection; of pdsh's own, which names all hosts, nothing."""
    with suppress(psutil.Error):
        return process.cmdline() if process.name() == "ssh" else []
    return []


def tell(mark: str, number: int) -> int:
    """Send a signal to the processes of this host that have the mark; returns to how many.

    SIGKILL to all, and wait for their end; others to those that have a handler for it, as ranks have once they stand.
    """
    found = [process for process in psutil.process_iter() if _is_marked(process, mark)]
    if number != signal.SIGKILL:
        found = [process for process in found if catches(process.pid, number)]
    for process in found:
        with suppress(psutil.Error):
            process.send_signal(number)
    if number == signal.SIGKILL:
        deadline = time.monotonic() + LAST_SECONDS
        while any(is_alive(process) for process in found) and time.monotonic() < deadline:
            time.sleep(_POLL_SECONDS)
    return len(found)


def _is_marked(process: psutil.Process, mark: str) -> bool:
    try:
        environment = Path(f"/proc/{process.pid}/environ").read_bytes()
    except OSError:  # it has ended, or is another user's
        return False
    return f"{MARK}={mark}".encode() in environment.split(b"\0")


if __name__ == "__main__":
    print(tell(sys.argv[1], int(sys.argv[2])))
