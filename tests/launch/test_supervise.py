"""Another launcher as a child: its exit code, its signals, and nobody left."""

import os
import signal
import subprocess
import sys
import threading
import time

import psutil
import pytest

from megalite.launch.supervise import supervise

# A launcher that ignores SIGUSR1, as it inherits, and ends when its rank has; the rank handles it, as ours do.
RANK = "import signal, sys, time; signal.signal(signal.SIGUSR1, lambda *_: sys.exit(75)); time.sleep(60)"
LAUNCHER = f"import subprocess, sys; sys.exit(subprocess.call([sys.executable, '-c', {RANK!r}]))"

STUBBORN = LAUNCHER.replace("lambda *_: sys.exit(75)", "lambda *_: None")


def run(code: str, grace: float = 20.0) -> int:
    return supervise([sys.executable, "-c", code], os.environ, grace)


def signal_me(*after: float, number: int = signal.SIGTERM) -> None:
    """Send this process signals, after so many seconds each."""
    for seconds in after:
        threading.Timer(seconds, os.kill, (os.getpid(), number)).start()


def test_the_exit_code_is_the_childs():
    assert run("import sys; sys.exit(7)") == 7
    assert run("import os, signal; os.kill(os.getpid(), signal.SIGKILL)") == 128 + signal.SIGKILL


@pytest.fixture
def a_terminal_that_may_close():
    """SIGHUP's action is the one that a shell gives, also where the tests run under nohup."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)


@pytest.mark.usefixtures("a_terminal_that_may_close")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP])
def test_a_signal_reaches_ranks_and_not_the_launcher(number):
    signal_me(2.0, number=number)
    assert run(LAUNCHER) == 75


@pytest.mark.usefixtures("a_terminal_that_may_close")
def test_under_nohup_the_terminal_may_close():
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    signal_me(0.5, number=signal.SIGHUP)
    assert run("import sys, time; time.sleep(1.5); sys.exit(7)") == 7


def test_what_a_terminal_sends_to_all_of_its_processes_does_not_reach_the_launcher():
    assert run("import os, sys; sys.exit(7 if os.getsid(0) == os.getpid() else 0)") == 7


def test_a_launcher_does_not_outlive_the_command(tmp_path):
    launcher = f"import os, pathlib, time; pathlib.Path({str(tmp_path / 'pid')!r}).write_text(str(os.getpid()))"
    words = [sys.executable, "-c", f"{launcher}; time.sleep(60)"]
    code = f"import os; from megalite.launch.supervise import supervise; supervise({words!r}, os.environ, 9.0)"
    command = subprocess.Popen([sys.executable, "-c", code])
    while not (tmp_path / "pid").exists() or not (tmp_path / "pid").read_text():
        time.sleep(0.05)
    process = psutil.Process(int((tmp_path / "pid").read_text()))
    command.kill()
    command.wait()
    assert not psutil.wait_procs([process], timeout=10)[1]


def test_after_the_grace_all_are_ended():
    """The rank takes no notice of SIGUSR1."""
    before = set(psutil.Process().children(recursive=True))  # of other tests in this process
    signal_me(1.5)
    began = time.monotonic()
    assert run(STUBBORN, grace=1.0) == 128 + signal.SIGTERM
    assert time.monotonic() - began < 15
    assert set(psutil.Process().children(recursive=True)) <= before


def test_where_no_rank_listens_yet_there_is_nothing_to_wait_for():
    signal_me(1.0)
    began = time.monotonic()
    assert run(LAUNCHER.replace("lambda *_: sys.exit(75)", "signal.SIG_IGN")) == 75, "and nothing is lost"
    assert time.monotonic() - began < 15


def test_a_second_signal_ends_all_at_once():
    signal_me(1.5, 3.0)
    began = time.monotonic()
    assert run(STUBBORN) == 128 + signal.SIGTERM
    assert time.monotonic() - began < 15


def test_a_launcher_whose_ranks_are_gone_is_not_waited_for(capfd):
    """It ignores SIGTERM besides, as torchrun was seen to when it was cut off from the others."""
    code = (
        "import signal, subprocess, sys, time; signal.signal(signal.SIGTERM, signal.SIG_IGN);"
        "subprocess.call([sys.executable, '-c', 'import time; time.sleep(1)']); time.sleep(60)"
    )
    began = time.monotonic()
    assert run(code, grace=1.0) == 128 + signal.SIGKILL, "nobody asked it to end, so ranks may be started again"
    assert time.monotonic() - began < 20
    assert "all ranks are gone" in capfd.readouterr().err


def test_what_a_dead_launcher_leaves_is_ended():
    sleeper = "subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(61)'])"
    orphan = f"import subprocess, sys, time; {sleeper}; time.sleep(1); sys.exit(3)"
    assert run(orphan) == 3
    left = subprocess.run(["pgrep", "-f", "time.sleep\\(61\\)"], capture_output=True, text=True, check=False)
    assert not left.stdout
