import contextlib
import os
import signal
import subprocess
import sys
import time
from multiprocessing.context import ForkProcess
from pathlib import Path

import psutil
import pytest

from megalite.config.place import Place
from megalite.errors import EXIT_REQUEUE, ConfigError, DataError
from megalite.launch import spawn
from megalite.launch.spawn import spawn_ranks


@pytest.fixture(autouse=True)
def _no_process_is_left_and_signals_are_as_before():
    children = set(psutil.Process().children(recursive=True))  # other tests' pools keep a helper process
    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    yield
    assert set(psutil.Process().children(recursive=True)) <= children
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == handlers


def sleep_unless(rank, action):
    """A rank function: `action` on one rank while the others wait, as they would in a collective."""

    def target(place):
        if place.rank == rank:
            action()
        time.sleep(60)

    return target


def fail(error):
    def action():
        raise error

    return action


def test_ranks_know_their_place(tmp_path):
    def target(place):
        (tmp_path / str(place.rank)).write_text(repr(place))

    assert spawn_ranks(target, 3) == 0
    places = [eval(file.read_text(), {"Place": Place}) for file in sorted(tmp_path.iterdir())]  # noqa: S307
    assert [(p.rank, p.local_rank, p.world_size, p.local_world_size) for p in places] == [
        (r, r, 3, 3) for r in range(3)
    ]
    assert len({p.init_method for p in places}) == 1
    store = Path(places[0].init_method.removeprefix("file://"))
    assert not store.parent.exists(), "the meeting place is cleared away"


@pytest.mark.parametrize(
    ("action", "code"),
    [
        (fail(ConfigError("x")), 2),
        (fail(DataError("x")), 3),
        (fail(RuntimeError("x")), 1),
        (lambda: sys.exit(7), 7),
        (lambda: sys.exit("words"), 1),
        (lambda: os._exit(9), 9),
        (lambda: os.kill(os.getpid(), signal.SIGKILL), 137),
        (lambda: os.kill(os.getpid(), signal.SIGUSR1), 138),
    ],
)
def test_the_first_failure_ends_the_others_and_gives_the_code(action, code):
    started = time.monotonic()
    assert spawn_ranks(sleep_unless(1, action), 3) == code
    assert time.monotonic() - started < 10


def test_exit_zero_of_one_waits_for_the_others(tmp_path):
    def target(place):
        if place.rank == 1:
            time.sleep(0.3)
            (tmp_path / "done").touch()

    assert spawn_ranks(target, 2) == 0
    assert (tmp_path / "done").exists()


def test_a_users_error_has_no_traceback_and_a_bug_has(capfd):
    spawn_ranks(sleep_unless(1, fail(ConfigError("seed: found -1"))), 2)
    assert capfd.readouterr().err == "rank 1: ConfigError: seed: found -1\n"
    spawn_ranks(sleep_unless(1, fail(ValueError("a bug"))), 2)
    err = capfd.readouterr().err
    assert err.startswith("rank 1:\nTraceback")
    assert "ValueError: a bug" in err
    assert "in action" in err


def all_speak(folder, words):
    """A rank function: all three fail, once all are there, and none is silenced by the failure of the first."""

    def target(place):
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        (folder / str(place.rank)).touch()
        wait_until(lambda: len(list(folder.iterdir())) == 3)
        raise ConfigError(words(place.rank))

    return target


def test_what_all_ranks_say_is_said_once(capfd, tmp_path):
    assert spawn_ranks(all_speak(tmp_path, lambda rank: "the same words"), 3) == 2
    (line,) = capfd.readouterr().err.splitlines()
    assert line in [f"rank {rank}: ConfigError: the same words" for rank in range(3)]


def test_different_words_are_all_said(capfd, tmp_path):
    assert spawn_ranks(all_speak(tmp_path, lambda rank: f"words of {rank}"), 3) == 2
    assert sorted(capfd.readouterr().err.splitlines()) == [f"rank {r}: ConfigError: words of {r}" for r in range(3)]


def test_death_by_a_signal_is_reported(capfd):
    spawn_ranks(sleep_unless(1, lambda: os.kill(os.getpid(), signal.SIGKILL)), 2)
    assert "rank 1 was ended by signal 9 (SIGKILL): perhaps for want of memory" in capfd.readouterr().err


def test_a_rank_that_ignores_the_polite_signal_is_killed(monkeypatch):
    monkeypatch.setattr(spawn, "_GRACE_SECONDS", 0.3)

    def target(place):
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        if place.rank == 1:
            time.sleep(0.2)
            raise ConfigError("x")
        time.sleep(60)

    started = time.monotonic()
    assert spawn_ranks(target, 3) == 2
    assert time.monotonic() - started < 10


PARENT = """
import os, signal, sys, time
from multiprocessing.context import ForkProcess as Process
from pathlib import Path
from megalite.launch.spawn import spawn_ranks
folder = Path(sys.argv[1])

def target(place):
    def note(number, frame):
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # the parent's, once the other rank has ended
        (folder / f"signal-{place.rank}").write_text(str(number))
        os._exit(75)
    if sys.argv[2] == "catch":
        signal.signal(signal.SIGTERM, note)
        signal.signal(signal.SIGINT, note)
    (folder / f"{place.rank}.tmp").write_text(str(os.getpid()))
    (folder / f"{place.rank}.tmp").rename(folder / f"pid-{place.rank}")
    time.sleep(60)

def start_and_be_told(process, start=Process.start):
    start(process)
    os.kill(os.getpid(), signal.SIGTERM)

if sys.argv[2] == "early":
    Process.start = start_and_be_told
sys.exit(spawn_ranks(target, 2))
"""


@contextlib.contextmanager
def parent(folder, mode):
    """A process that spawns two sleeping ranks; gives it and the ranks' process ids."""
    with subprocess.Popen([sys.executable, "-c", PARENT, folder, mode], stderr=subprocess.PIPE, text=True) as process:
        try:
            wait_until(lambda: len(list(folder.glob("pid-*"))) == 2)
            yield process, [int((folder / f"pid-{rank}").read_text()) for rank in range(2)]
        finally:
            process.kill()


def wait_until(condition, seconds=30):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.02)


def is_gone(pid):
    with contextlib.suppress(psutil.NoSuchProcess):
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    return True


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signals_are_passed_on_to_the_ranks(tmp_path, number):
    with parent(tmp_path, "catch") as (process, pids):
        process.send_signal(number)
        assert process.wait(20) == 75
        assert [(tmp_path / f"signal-{rank}").read_text() for rank in range(2)] == [str(int(number))] * 2
        wait_until(lambda: all(map(is_gone, pids)))


def test_ranks_that_do_not_listen_yet_have_begun_nothing(tmp_path):
    with parent(tmp_path, "plain") as (process, pids):
        process.send_signal(signal.SIGTERM)
        assert process.wait(20) == EXIT_REQUEUE
        wait_until(lambda: all(map(is_gone, pids)))


def test_a_signal_between_the_starts_of_two_ranks_is_passed_on(tmp_path):
    (tmp_path / "tmp").mkdir()
    done = subprocess.run(
        [sys.executable, "-c", PARENT, tmp_path, "early"], env=os.environ | {"TMPDIR": str(tmp_path / "tmp")},
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (EXIT_REQUEUE, "")
    assert list((tmp_path / "tmp").iterdir()) == []
    assert all(is_gone(int(path.read_text())) for path in tmp_path.glob("pid-*"))


def test_ranks_that_cannot_all_be_started_are_an_error_and_none_stays(monkeypatch):
    def start(process, start=ForkProcess.start):
        if process.name == "rank 1":
            raise OSError("no more processes")
        start(process)

    monkeypatch.setattr(ForkProcess, "start", start)
    blocked = signal.pthread_sigmask(signal.SIG_BLOCK, ())
    with pytest.raises(OSError, match="no more processes"):
        spawn_ranks(sleep_unless(2, None), 2)
    assert signal.pthread_sigmask(signal.SIG_BLOCK, ()) == blocked


def test_ranks_die_with_a_parent_that_is_killed(tmp_path):
    with parent(tmp_path, "plain") as (process, pids):
        assert not any(map(is_gone, pids))
        process.kill()
        wait_until(lambda: all(map(is_gone, pids)), seconds=5)
