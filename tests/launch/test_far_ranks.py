"""Ranks that are no processes below the command, found by their mark. Here pdsh runs its command on this host."""

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from megalite.launch.far_ranks import MARK, FarRanks, tell
from megalite.launch.supervise import catches, supervise

OWN, OTHER = "0123abcd", "4567cdef"
RANK = "import signal, sys, time; signal.signal(signal.SIGUSR1, lambda *_: {}); time.sleep(60)"
OBEDIENT, STUBBORN = RANK.format("sys.exit(75)"), RANK.format("None")


@pytest.fixture
def lab(tmp_path):
    """Starts processes that are no children of the command, and end with the test."""
    started = []
    folder = tmp_path / "bin"
    folder.mkdir()
    # The word after -w is the hosts, the last one is the command.
    (folder / "pdsh").write_text('#!/bin/sh\nfor last; do true; done\nexec sh -c "$last"\n')
    (folder / "ssh").write_text("#!/bin/sh\nsleep $2\nexit\n")  # HOST SECONDS
    for program in folder.iterdir():
        program.chmod(0o755)

    class Lab:
        environment = os.environ | {"PATH": f"{folder}{os.pathsep}{os.environ['PATH']}"}

        def rank(self, code: str, mark: str = OWN) -> "subprocess.Popen[bytes]":
            started.append(subprocess.Popen([sys.executable, "-c", code], env=os.environ | {MARK: mark}))
            while "SIGUSR1" in code and not catches(started[-1].pid, signal.SIGUSR1):
                time.sleep(0.01)
            return started[-1]

        def supervise(self, code: str, grace: float, is_training: bool = True) -> int:
            """A launcher with this code, whose ranks are those that were started."""
            environment, hosts = self.environment, ("one", "two")
            command = [sys.executable, "-c", code, *hosts]  # pdsh names them too
            return supervise(
                command, environment, grace, lambda child: FarRanks(child, hosts, OWN, environment, lambda: is_training)
            )

    yield Lab()
    for process in started:
        process.kill()
        process.wait()


def waits_for(path: Path) -> str:
    """A launcher that ends with 75 when a file is there, and takes no notice of signals."""
    return (
        "import os, signal, sys, time; signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
        f"while not os.path.exists({str(path)!r}): time.sleep(0.1)\nsys.exit(75)"
    )


def signal_me(*after: float) -> None:
    for seconds in after:
        threading.Timer(seconds, os.kill, (os.getpid(), signal.SIGTERM)).start()


def test_a_stop_is_for_the_ranks_of_this_start_that_listen(lab, tmp_path):
    ranks = [lab.rank(OBEDIENT), lab.rank(OBEDIENT), lab.rank("import time; time.sleep(60)")]
    stranger = lab.rank(OBEDIENT, OTHER)
    signal_me(1.0)
    threading.Thread(target=lambda: ranks[0].wait() == 75 and (tmp_path / "ended").touch()).start()
    assert lab.supervise(waits_for(tmp_path / "ended"), grace=20) == 75
    assert [rank.wait(10) for rank in ranks] == [75, 75, -signal.SIGKILL], "and nobody outlives the command"
    assert stranger.poll() is None


@pytest.mark.parametrize("signals", [(1.0,), (1.0, 2.5)])
def test_after_the_grace_or_at_a_second_signal_all_are_ended(signals, lab, tmp_path):
    rank, stranger = lab.rank(STUBBORN), lab.rank(STUBBORN, OTHER)
    signal_me(*signals)
    began = time.monotonic()
    assert lab.supervise(waits_for(tmp_path / "never"), grace=2.0 if len(signals) == 1 else 60) == 143
    assert time.monotonic() - began < 15
    assert (rank.wait(10), stranger.poll()) == (-signal.SIGKILL, None)


def test_a_host_without_ranks_is_named_and_the_others_are_ended(lab, tmp_path, capfd):
    rank = lab.rank(STUBBORN)
    start = "subprocess.Popen(['ssh', 'one', '60']); subprocess.Popen(['ssh', 'two', '2'])"
    code = f"import subprocess\n{start}\n{waits_for(tmp_path / 'never')}"
    assert lab.supervise(code, grace=1.0) == 128 + signal.SIGKILL, "nobody asked: ranks may be started again"
    assert "all ranks on two are gone" in capfd.readouterr().err
    assert rank.wait(10) == -signal.SIGKILL


def test_a_host_that_is_done_before_another_is_not_waited_for_by_anybody(lab):
    ends = "first = subprocess.Popen(['ssh', 'one', '4']); subprocess.call(['ssh', 'two', '1']); first.wait()"
    assert lab.supervise(f"import subprocess, sys; {ends}; sys.exit(75)", grace=1.0, is_training=False) == 75


def test_hosts_that_cannot_be_told_are_named(lab, tmp_path, capfd):
    (tmp_path / "bin/pdsh").write_text("#!/bin/sh\necho 'two: no route' >&2\nexit 255\n")
    assert lab.supervise("import sys; sys.exit(3)", grace=1.0) == 3
    assert "SIGKILL did not reach all of one, two: two: no route" in capfd.readouterr().err


def test_no_other_process_has_the_mark(lab):
    lab.rank(STUBBORN)
    assert tell("0" + OWN, signal.SIGKILL) == 0
    assert tell(OWN, signal.SIGKILL) == 1
