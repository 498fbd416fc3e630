"""What a life leaves in state.json, however it ends."""

import json
import os
import signal
import time

import pytest

from megalite.errors import EXIT_DATA, EXIT_FAILURE, EXIT_REQUEUE, DataError, Preempted
from megalite.guard.lock import RunLock, is_locked
from megalite.guard.run_state import STATE_FILE, LifeRecord, read_life_since, read_state


@pytest.mark.parametrize(
    ("error", "state", "code", "told"),
    [
        (None, "finished", 0, ""),
        (Preempted("saved"), "preempted", EXIT_REQUEUE, ""),
        (DataError("shard 3 is cut"), "failed", EXIT_DATA, "DataError: shard 3 is cut"),
        (KeyError("x"), "failed", EXIT_FAILURE, "KeyError: 'x'"),
        (KeyboardInterrupt(), "failed", EXIT_FAILURE, "KeyboardInterrupt: "),
        (ValueError("https://me:canary@host"), "failed", EXIT_FAILURE, "ValueError: https://***@host"),
    ],
)
def test_how_a_life_ends(tmp_path, error, state, code, told):
    def live():
        with LifeRecord(tmp_path, 4) as life:
            assert json.loads((tmp_path / STATE_FILE).read_text())["state"] == "running"
            life.stands(7, 9, 9)
            if error:
                raise error

    if error:
        with pytest.raises(type(error)):
            live()
    else:
        live()
    found = read_state(tmp_path)
    assert (found.state, found.exit_code, found.error) == (state, code, told)
    assert (found.step, found.last_step, found.world_size, found.pid) == (7, 9, 4, os.getpid())


def test_a_run_that_was_told_to_stop_before_its_end_is_stopped(tmp_path):
    with LifeRecord(tmp_path, 1) as life:
        life.stands(5, 5, 9)
    assert read_state(tmp_path).state == "stopped"


def test_a_life_that_began_since(tmp_path):
    assert read_life_since(None, tmp_path) is None
    with LifeRecord(tmp_path, 1):
        pass
    first = read_life_since(None, tmp_path)
    assert first is not None
    assert read_life_since(first, tmp_path) is None, "it is the one that was there before"
    with LifeRecord(tmp_path, 1):
        assert read_life_since(first, tmp_path).started > first.started


def test_running_without_a_lock_is_died(tmp_path):
    with LifeRecord(tmp_path, 1):
        assert read_state(tmp_path).state == "died"
        lock = RunLock(tmp_path)
        assert read_state(tmp_path).state == "running"
        lock.close()


def test_a_killed_run_died(tmp_path):
    if (pid := os.fork()) == 0:
        lock = RunLock(tmp_path)
        with LifeRecord(tmp_path, 1):
            (tmp_path / "ready").touch()
            time.sleep(60)
        lock.close()
        os._exit(0)
    while not (tmp_path / "ready").exists():
        time.sleep(0.01)
    assert (read_state(tmp_path).state, is_locked(tmp_path)) == ("running", True)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    assert (read_state(tmp_path).state, is_locked(tmp_path)) == ("died", False)


@pytest.mark.parametrize(
    ("variables", "job"),
    [
        ({}, ""),
        ({"SLURM_JOB_ID": "12"}, "12"),
        ({"SLURM_JOB_ID": "15", "SLURM_ARRAY_JOB_ID": "12", "SLURM_ARRAY_TASK_ID": "3"}, "12_3"),
    ],
)
def test_the_job_that_slurm_gave(tmp_path, monkeypatch, variables, job):
    for name in ("SLURM_JOB_ID", "SLURM_ARRAY_JOB_ID", "SLURM_ARRAY_TASK_ID"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with LifeRecord(tmp_path, 1):
        pass
    assert read_state(tmp_path).job == job


@pytest.mark.parametrize("text", ["", "{", "[]", "7", '{"state": "running"}', '{"foreign": 1}', "\udcff"])
def test_what_is_no_record_is_none(tmp_path, text):
    (tmp_path / STATE_FILE).write_text(text, errors="surrogateescape")
    assert read_state(tmp_path) is None
    assert read_state(tmp_path / "nowhere") is None


def test_a_disk_that_takes_no_record_ends_no_run(tmp_path):
    with LifeRecord(tmp_path / "gone", 1) as life:
        life.stands(1, 1, 1)
    assert read_state(tmp_path / "gone") is None
