"""Signals are noted, the scheduler's echo counts as one, a second one ends the process even in C code."""

import ctypes
import os
import signal
import time

import pytest

from megalite.errors import EXIT_REQUEUE
from megalite.guard import signals
from megalite.guard.signals import SIGNALS, StopSignals, ending_at_once


def wait_for(condition):
    for _ in range(500):
        if condition():
            return
        time.sleep(0.01)
    raise AssertionError("it never came")


@pytest.mark.parametrize("number", SIGNALS)
def test_the_first_signal_is_noted_and_what_was_there_before_comes_back(number):
    before = [signal.getsignal(number) for number in SIGNALS]
    stop = StopSignals()
    assert stop.received is None
    os.kill(os.getpid(), number)
    os.kill(os.getpid(), signal.SIGTERM)  # the echo, within a second
    wait_for(lambda: stop.received)
    time.sleep(0.05)
    assert stop.received == signal.Signals(number).name
    stop.close()
    assert [signal.getsignal(number) for number in SIGNALS] == before


def fork(life) -> int:
    pid = os.fork()
    if pid == 0:
        try:
            life()
        finally:
            os._exit(99)
    return pid


def test_a_second_signal_ends_a_process_that_sits_in_c_code(tmp_path, monkeypatch):
    monkeypatch.setattr(signals, "TOGETHER_SECONDS", 0.1)

    def life():
        stop = StopSignals()
        (tmp_path / "ready").touch()
        pause = ctypes.CDLL(None).usleep  # restarted by nothing, returns to no interpreter in between
        while True:
            if stop.received and not (tmp_path / "noted").exists():
                (tmp_path / "noted").touch()
            pause(50_000)

    pid = fork(life)
    wait_for((tmp_path / "ready").exists)
    os.kill(pid, signal.SIGUSR1)
    wait_for((tmp_path / "noted").exists)
    time.sleep(0.2)
    os.kill(pid, signal.SIGTERM)
    _, status = os.waitpid(pid, 0)
    assert os.waitstatus_to_exitcode(status) == 128 + signal.SIGTERM


def test_a_second_signal_ends_a_process_whose_main_thread_never_comes_back(tmp_path, monkeypatch):
    monkeypatch.setattr(signals, "TOGETHER_SECONDS", 0.1)
    read, write = os.pipe()

    def life():
        StopSignals()
        (tmp_path / "ready").touch()
        libc = ctypes.CDLL(None)
        buffer = ctypes.create_string_buffer(1)
        while True:
            libc.read(read, buffer, 1)  # releases the GIL and waits for ever, as a collective does without its peer

    pid = fork(life)
    wait_for((tmp_path / "ready").exists)
    os.kill(pid, signal.SIGTERM)
    time.sleep(0.3)
    assert os.waitpid(pid, os.WNOHANG) == (0, 0), "the first one is only noted"
    os.kill(pid, signal.SIGTERM)
    _, status = os.waitpid(pid, 0)
    assert os.waitstatus_to_exitcode(status) == 128 + signal.SIGTERM
    os.close(read)
    os.close(write)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_before_training_begins_ends_the_command_with_the_requeue_code(number, monkeypatch, capfd):
    """Here while the configuration is composed; by hand, while torch is imported."""
    from megalite.launch import training

    monkeypatch.setattr(training, "compose_train", lambda overrides: os.kill(os.getpid(), number))
    pid = os.fork()
    if pid == 0:
        try:
            training.train([])
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == EXIT_REQUEUE
    assert f"stopped by {number.name} before training began" in capfd.readouterr().err


def test_after_the_block_signals_do_what_they_did():
    before = [signal.getsignal(number) for number in SIGNALS]
    with ending_at_once(75):
        assert signal.getsignal(signal.SIGTERM) != before[0]
    assert [signal.getsignal(number) for number in SIGNALS] == before
