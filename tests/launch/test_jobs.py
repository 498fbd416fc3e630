"""The table of runs, over directories of every kind."""

import json
import os
import socket
import subprocess
import time

import pytest

from megalite.config.compose import compose_train
from megalite.config.frozen import save_config
from megalite.config.schema_monitor import JobsConfig
from megalite.config.validate_commands import validate_jobs
from megalite.errors import ConfigError
from megalite.guard.lock import RunLock
from megalite.launch.monitor.jobs import jobs, look, to_json, to_table
from megalite.launch.slurm.queue import Queue, ask_squeue
from tests.launch.run_folders import NOW, row, write_heartbeat, write_log, write_run


@pytest.fixture(autouse=True)
def no_slurm(monkeypatch, tmp_path_factory):
    """A PATH without squeue."""
    folder = tmp_path_factory.mktemp("bin")
    monkeypatch.setenv("PATH", str(folder))
    return folder


def fake_squeue(folder, text, code=0):
    """A squeue that says `text`, and writes down what it was asked."""
    path = folder / "squeue"
    (folder / "said").write_text(text + "\n")
    script = f'#!/bin/sh\necho "$@" >> {folder}/asked\nwhile read -r line; do echo "$line"; done < {folder}/said\n'
    path.write_text(f"{script}echo slurm_load_jobs error >&2\nexit {code}\n")
    path.chmod(0o755)


def found_in(folder):
    return {run.run: run for run in look(folder).runs}


def test_the_state_of_every_run(tmp_path):
    for number, state in enumerate(("finished", "stopped", "preempted", "failed")):
        write_run(tmp_path / state, state, step=40, started=NOW - 1000 - number)
    write_run(tmp_path / "died", "running", started=NOW - 500)
    write_run(tmp_path / "imported", None)
    write_run(tmp_path / "old", None, rows=[row(100)])
    write_run(tmp_path / "old and unfinished", None, rows=[row(60)])
    write_run(tmp_path / "going", "running", started=NOW - 1)
    lock = RunLock(tmp_path / "going")
    states = {name: run.state for name, run in found_in(tmp_path).items()}
    lock.close()
    assert states == {
        "finished": "finished",
        "stopped": "stopped",
        "preempted": "preempted",
        "failed": "failed",
        "died": "died",
        "imported": "new",
        "old": "finished",
        "old and unfinished": "unknown",
        "going": "running",
    }
    assert found_in(tmp_path)["stopped"].step == 40
    order = [run.run for run in look(tmp_path).runs if run.run in ("finished", "stopped", "preempted", "died")]
    assert order == ["died", "finished", "stopped", "preempted"], "the newest first"


@pytest.mark.parametrize(
    ("locked", "heard", "host", "state"),
    [
        (True, 1, "elsewhere", "running"),
        (True, 300, "elsewhere", "running?"),  # held, but nobody moves
        (True, None, "elsewhere", "running"),  # no watchdog: nothing contradicts the lock
        (False, 1, "elsewhere", "running?"),  # a file system whose locks other hosts do not see
        (False, 300, "elsewhere", "died"),
        (False, 1, socket.gethostname(), "died"),  # here the lock is the truth
        (True, 5000, "elsewhere", "running"),  # the heartbeat of an earlier life
    ],
)
def test_a_lock_and_signs_of_life_that_contradict_each_other(tmp_path, locked, heard, host, state):
    write_run(tmp_path / "run", "running", host=host, started=NOW - 1000)
    if heard is not None:
        write_heartbeat(tmp_path / "run", 0, heard, now=time.time())  # NOW may be minutes ago
    lock = RunLock(tmp_path / "run") if locked else None
    assert found_in(tmp_path)["run"].state == state
    if lock:
        lock.close()


def test_figures_and_time_left(tmp_path):
    rows = [row(step, step_seconds=50.0 if step in (1, 30) else 2.0) for step in range(1, 31)]
    rows += [row(31, loss="nan"), {"step": 31, "eval/x/loss": 3.0}]
    write_run(tmp_path / "run", "running", rows=rows)
    os.utime(tmp_path / "run" / "metrics.jsonl", (time.time() - 8, time.time() - 8))
    with open(tmp_path / "run" / "metrics.jsonl", "a") as file:
        file.write('{"step": 32, "lo')  # torn
    os.utime(tmp_path / "run" / "metrics.jsonl", (time.time() - 8, time.time() - 8))
    lock = RunLock(tmp_path / "run")
    run = found_in(tmp_path)["run"]
    assert (run.step, run.steps, run.tokens_per_second) == (31, 100, 2000.0)
    assert run.loss != run.loss
    assert run.row_age_seconds == pytest.approx(8, abs=1)
    assert run.eta_seconds == pytest.approx(69 * 2 - 8, abs=1), "the median of the last steps"
    write_run(tmp_path / "run", "running", stop_after=41)
    assert found_in(tmp_path)["run"].eta_seconds == pytest.approx(10 * 2 - 8, abs=1)
    lock.close()
    assert found_in(tmp_path)["run"].eta_seconds is None, "only of a run at work"


def test_only_the_end_of_a_huge_file_is_read(tmp_path):
    run = write_run(tmp_path / "run", "finished", rows=[row(1)], step=100)
    with open(run / "metrics.jsonl", "r+b") as file:
        file.seek(1 << 34)  # 16 GiB, of which the disk holds nothing
        file.write(b"\n" + json.dumps(row(100)).encode() + b"\n")
    assert found_in(tmp_path)["run"].loss == 4.0


def test_sweeps_nest_and_what_lies_in_a_run_is_no_run(tmp_path):
    write_run(tmp_path / "sweeps" / "lr" / "0", "finished")
    write_run(tmp_path / "sweeps" / "lr" / "1" / "checkpoints" / "inner", "finished")
    write_run(tmp_path / "sweeps" / "lr" / "1", "finished")
    write_run(tmp_path / "a/b/c/d/e/f/g", "finished")  # too deep
    write_run(tmp_path / ".hydra", "finished")
    (tmp_path / "sweeps" / "again").symlink_to(tmp_path)
    assert sorted(found_in(tmp_path)) == ["sweeps/lr/0", "sweeps/lr/1"]
    assert sorted(found_in(tmp_path / "sweeps/lr/0")) == ["0"], "the folder itself may be a run"


BROKEN = {
    "empty files": {"state.json": "", "config.yaml": ""},
    "no JSON, no YAML": {"state.json": "{", "config.yaml": "a: [b"},
    "foreign": {"state.json": '{"version": 4}', "config.yaml": "hello: world"},
    "lists": {"state.json": "[1]", "config.yaml": "- 1"},
    "deep": {"state.json": "[" * 100_000, "config.yaml": "[" * 3000},
    "binary": {"state.json": "\x00\x01", "config.yaml": "\x00\x01"},
    "wrong types": {
        "state.json": json.dumps(
            {"state": 7, "started": "x", "changed": None, "world_size": [], "host": 1, "pid": 2, "step": "many"}
        ),
        "config.yaml": "trainer: 7",
    },
    "no finite time": {
        "state.json": '{"state": "failed", "started": NaN, "changed": 1, "world_size": 1, "host": "h", "pid": 1}'
    },
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_directory_that_only_looks_like_a_run(tmp_path, name):
    folder = tmp_path / "out" / "broken"
    folder.mkdir(parents=True)
    for file, text in BROKEN[name].items():
        (folder / file).write_text(text)
    (folder / "metrics.jsonl").write_text('[]\n{"step": true}\n{"step": "1"}\n\udcff\n', errors="surrogateescape")
    write_run(folder / "whole", "finished")
    found = look(tmp_path / "out")
    states = {run.run: run.state for run in found.runs}
    assert states == {"broken": "unreadable", "broken/whole": "finished"}, "it is looked into"
    assert "1 unreadable" in to_table(tmp_path, found, 100).plain
    json.loads(to_json(tmp_path, found))


def test_damage_beside_what_is_whole(tmp_path):
    run = write_run(tmp_path / "run", None, rows=[row(5, loss=[1], tokens_per_second={"a": 1}, step_seconds="x")])
    (run / "state.json").mkdir()
    os.mkfifo(run / "job.txt")
    found = found_in(tmp_path)["run"]
    assert (found.state, found.step, found.loss, found.tokens_per_second) == ("unknown", 5, None, None)


@pytest.mark.parametrize("odd", [{"step": 10**400}, {"last_step": -(10**400)}, {"started": 1e18}, {"started": 10**400}])
def test_numbers_out_of_this_world_spoil_one_run_alone(tmp_path, odd, capsys):
    write_run(tmp_path / "whole", "finished", step=100, last_step=100)
    write_run(tmp_path / "odd", "running")
    path = tmp_path / "odd/state.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | odd))
    states = {name: run.state for name, run in found_in(tmp_path).items()}
    assert states["whole"] == "finished"
    assert states["odd"] != "running"
    to_table(tmp_path, look(tmp_path), 100)
    assert json.loads(to_json(tmp_path, look(tmp_path)))


def test_the_first_error_of_a_run_that_failed(tmp_path):
    run = write_run(tmp_path / "run", "failed", error="RuntimeError: Connection reset by peer")
    write_log(run, 0, (3, "ERROR", "RuntimeError: Connection reset by peer"))
    write_log(run, 1, (4, "ERROR", "DataError: shard 3\x1b[31m is cut"))
    assert found_in(tmp_path)["run"].error == "rank 1: DataError: shard 3 is cut"
    for width in (80, 120, 10_000):
        table = to_table(tmp_path, look(tmp_path), width).plain.splitlines()
        assert all(len(line) <= width for line in table[:-1])
        assert "DataError" in table[1]


def test_figures_are_never_cut_for_long_names_and_errors(tmp_path):
    run = write_run(tmp_path / ("name" * 30), "failed", rows=[row(99)], error="x" * 900, step=99)
    lines = to_table(tmp_path, look(run.parent), 80).plain.splitlines()
    assert lines[1].split()[1:5] == ["failed", "99/100", "4.0100", "2k"]
    assert lines[1].startswith("namename")
    assert len(lines[1]) <= 80


def test_json_is_one_document(tmp_path, capsys):
    write_run(tmp_path / "run", "finished", rows=[row(100, loss="nan")], step=100)
    save_config(compose_train(["data.train=store", "run_name=r", "trainer.steps=123"]), tmp_path / "run/config.yaml")
    assert jobs([f"folder={tmp_path}", "format=json"]) == 0
    text = capsys.readouterr().out
    (run,) = json.loads(text, parse_constant=pytest.fail)["runs"]
    assert (run["run"], run["state"], run["loss"], run["step"], run["steps"]) == ("run", "finished", "nan", 100, 123)


def test_what_slurm_says(tmp_path, no_slurm):
    write_run(tmp_path / "waits", None, steps=None).joinpath("job.txt").write_text("11\n")
    write_run(tmp_path / "begins", None, steps=None).joinpath("job.txt").write_text("12\n")
    write_run(tmp_path / "again", "preempted", job="13")
    write_run(tmp_path / "task", "failed", job="14_2")
    write_run(tmp_path / "over", "finished", job="15")
    write_run(tmp_path / "gone", "finished", job="16")
    fake_squeue(
        no_slurm,
        "11|PENDING|Resources\n12|RUNNING|None\n13|PENDING|BeginTime\n14_1|RUNNING|None\n14_2|PENDING|Priority\n"
        "15|COMPLETING|None",
    )
    runs = found_in(tmp_path)
    assert {name: (run.state, run.job_state) for name, run in runs.items()} == {
        "waits": ("pending", "pending (Resources)"),
        "begins": ("starting", "running"),
        "again": ("pending", "pending (BeginTime)"),
        "task": ("pending", "pending (Priority)"),
        "over": ("finished", "completing"),
        "gone": ("finished", ""),
    }
    asked = (no_slurm / "asked").read_text().splitlines()
    assert len(asked) == 1, "one question for all"
    assert "--jobs=11,12,13,14,15,16,11" in asked[0]
    assert "11 pending (Resources)" in to_table(tmp_path, look(tmp_path), 200).plain


def test_what_slurm_does_not_have_any_more_has_ended(tmp_path, no_slurm):
    """A job that failed before its ranks began, one that left nothing at all, and one that was killed a moment ago."""
    for name, number in {"failed": 11, "silent": 12}.items():
        write_run(tmp_path / name, None, steps=None).joinpath("job.txt").write_text(f"{number}\n")
    (tmp_path / "failed/logs").mkdir()
    (tmp_path / "failed/logs/slurm_11.log").write_text("line 4: env/bin/activate: No such file or directory\n")
    killed = write_run(tmp_path / "killed", "running", job="13")
    write_heartbeat(killed, 0, before=5.0, now=time.time())
    unasked = {name: run.state for name, run in found_in(tmp_path).items()}
    assert unasked == {"failed": "new", "silent": "new", "killed": "running?"}, "without Slurm nobody knows"
    fake_squeue(no_slurm, "")
    runs = found_in(tmp_path)
    assert (runs["failed"].state, runs["silent"].state, runs["killed"].state) == ("failed", "failed", "died")
    assert runs["failed"].error == "line 4: env/bin/activate: No such file or directory"
    assert "job 12 ended and left no log" in runs["silent"].error


def test_a_later_submission_counts(tmp_path):
    run = write_run(tmp_path / "run", "preempted", job="20")
    (run / "job.txt").write_text("21\n")
    assert found_in(tmp_path)["run"].job == "21"
    os.utime(run / "job.txt", (NOW - 500, NOW - 500))
    assert found_in(tmp_path)["run"].job == "20"


def test_slurm_that_gives_no_answer_is_a_note(tmp_path, no_slurm, monkeypatch):
    write_run(tmp_path / "run", "finished", job="13")
    fake_squeue(no_slurm, "", code=1)
    assert look(tmp_path).notes == ["squeue: slurm_load_jobs error"]

    def run(*arguments, timeout, **_):
        raise subprocess.TimeoutExpired("squeue", timeout)

    monkeypatch.setattr(subprocess, "run", run)
    assert look(tmp_path).notes == ["squeue gives no answer"]
    assert look(tmp_path).runs[0].state == "finished"


def test_slurm_is_not_asked_for_nothing(no_slurm):
    fake_squeue(no_slurm, "1|RUNNING|None")
    assert ask_squeue(set()) == ask_squeue({"no number"}) == Queue()
    assert not (no_slurm / "asked").exists()


def test_watching_draws_again_until_it_is_ended(tmp_path, monkeypatch, capsys):
    run = write_run(tmp_path / "run", "finished", step=1)
    naps = []

    def sleep(seconds):
        naps.append(seconds)
        if len(naps) == 2:
            raise KeyboardInterrupt
        write_run(run, "failed", step=2)

    monkeypatch.setattr(time, "sleep", sleep)
    assert jobs([f"folder={tmp_path}", "watch=2"]) == 0
    assert naps == [2.0, 2.0]
    assert "failed  2/100" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"watch": 0.1}, "watch: found 0.1"),
        ({"watch": float("nan")}, "watch: found nan"),
        ({"watch": 2.0, "format": "json"}, "watch: found 2.0, but format=json"),
        ({"folder": ""}, "folder: is empty"),
    ],
)
def test_settings_that_cannot_work(settings, message):
    with pytest.raises(ConfigError, match=message):
        validate_jobs(JobsConfig(**settings))


def test_a_folder_that_is_not_there():
    with pytest.raises(ConfigError, match="folder: nowhere is no directory"):
        jobs(["folder=nowhere"])


def test_an_empty_folder(tmp_path):
    assert to_table(tmp_path, look(tmp_path), 80).plain == f"no runs in {tmp_path}"
