"""The logs of ranks by time, and what went wrong first."""

import os

import pytest

from megalite.config.schema_monitor import LogsConfig
from megalite.config.validate_commands import validate_logs
from megalite.errors import ConfigError
from megalite.guard.lock import RunLock
from megalite.guard.run_state import read_state
from megalite.launch.monitor.first_error import find_first_error
from megalite.launch.monitor.log_entries import merge, rank_logs, read_rank
from megalite.launch.monitor.logs import logs
from megalite.launch.tail import TAIL_BYTES, tail_lines
from tests.launch.run_folders import NOW, stamp, write_heartbeat, write_log, write_run

LOST = "RuntimeError: Read error [127.0.0.1]:6571: Connection reset by peer"


def first_of(run, **more):
    return find_first_error(run, read_state(run), **more)


def texts(entries):
    return [entry.lines[0] for entry in entries]


@pytest.fixture
def run(tmp_path):
    return write_run(tmp_path / "run", "failed", error=LOST, step=7)


def test_the_earliest_error_of_all_ranks_with_what_stands_around_it(run):
    write_log(run, 0, (9, "INFO", "step 6"), (3, "ERROR", LOST))
    before = [(8 - n / 10, "INFO", f"line {n}") for n in range(9)]
    write_log(run, 3, *before, (5, "ERROR", "DataError: shard 3 is cut\nnext line of it"), (4, "INFO", "closing"))
    write_heartbeat(run, 3, phase="end", host="node9")
    first = first_of(run)
    assert (first.who, first.text, first.host) == ("rank 3", "DataError: shard 3 is cut", "node9")
    assert first.time == pytest.approx(NOW - 5, abs=0.01)
    assert texts(first.context) == ["line 5", "line 6", "line 7", "line 8", first.text, "closing"]
    assert first.entry.lines == ("DataError: shard 3 is cut", "next line of it")
    assert first_of(run, ranks=(0,)).who == "rank 0"


def test_errors_of_earlier_lives_do_not_count(run):
    write_log(run, 0, (500, "ERROR", "DataError: of an earlier life"), (3, "ERROR", "ConfigError: of this one"))
    assert first_of(run).text == "ConfigError: of this one"
    write_run(run, "finished", started=NOW - 1)
    assert first_of(run) is None


@pytest.mark.parametrize("state", ["failed", "died", "running"])
def test_a_rank_that_was_killed_comes_before_those_that_lost_it(run, state):
    write_run(run, "running" if state == "died" else state)
    write_log(run, 0, (3, "ERROR", LOST))
    write_heartbeat(run, 0, phase="end", before=3)
    write_heartbeat(run, 1, phase="step", before=3.5, step=6)
    if state == "running":
        lock = RunLock(run)
        assert first_of(run).who == "rank 0", "a rank at work has closed nothing yet"
        lock.close()
        return
    first = first_of(run)
    assert (first.who, first.host) == ("rank 1", "node2")
    assert "killed" in first.text
    assert "in step 6 (step)" in first.notes[0]
    assert "rank 0: RuntimeError: Read error" in first.notes[1]


def test_an_error_of_its_own_comes_before_ranks_that_its_launcher_killed(run):
    write_log(run, 0, (3, "ERROR", "DataError: shard 3 is cut"))
    write_heartbeat(run, 1, phase="step", before=2)
    first = first_of(run)
    assert first.headline == "rank 0: DataError: shard 3 is cut"
    assert first.notes[0].startswith("rank 1 on node2 ended without a word")


def test_killed_all_at_once(run):
    write_run(run, "running", world_size=2)
    for rank in range(3):  # the third is left from a larger start
        write_heartbeat(run, rank, before=3)
    assert first_of(run).who == "ranks 0, 1"
    write_heartbeat(run, 1, before=300)  # of an earlier life
    assert first_of(run).who == "rank 0"


def test_what_the_watchdog_found_comes_before_the_ranks_that_it_killed(run):
    write_run(run, "running")
    write_heartbeat(run, 0, before=3)
    (run / "logs" / "stall_1.txt").write_text(
        "stall: rank 1 is stopped\nno rank has moved for 60 s\n\n> rank 1, host a\n"
    )
    first = first_of(run)
    assert first.headline == "watchdog: stall: rank 1 is stopped"
    assert "> rank 1, host a" in first.entry.lines
    os.utime(run / "logs" / "stall_1.txt", (NOW - 500, NOW - 500))  # of an earlier life
    assert first_of(run).who == "rank 0"


def test_before_the_ranks_have_logs(run, tmp_path):
    assert first_of(run).headline == f"rank 0: {LOST}"
    new = write_run(tmp_path / "new", None)
    assert first_of(new) is None
    (new / "logs").mkdir()
    text = "job 7, start 1: step 0, on a\nDataError: in life 1\njob 7, start 2: step 0, on a\nslurmstepd: error: oom\n"
    (new / "logs" / "slurm_7.log").write_text(text)
    assert first_of(new).headline == "slurm_7.log: slurmstepd: error: oom"


OF_SLURM = "srun: error: nodea: task 0: Exited with exit code 5"
MISSING = "ResourceError: 1 of 2 hosts came within launch.start_timeout=5 s: nodea; missing: nodeb"
AGAIN = "ranks died (exit code 137): starting them again from step 5"
TOO_SHORT = "ResourceError: the time limit came before a step was saved"


@pytest.mark.parametrize(
    ("state", "lines", "headline"),
    [
        ("failed", [OF_SLURM, MISSING], f"slurm_7.log: {MISSING}"),
        ("died", ["rank 3 (pid 4) was ended by SIGKILL at 10:00:00", OF_SLURM], "rank 0: killed"),
        ("died", [OF_SLURM, TOO_SHORT], f"slurm_7.log: {TOO_SHORT}"),
        ("failed", [OF_SLURM, "rank 3 (pid 4) ended with exit code 1 at 10:00:00"], "slurm_7.log: rank 3 (pid 4) "),
        ("preempted", [OF_SLURM], None),
        ("preempted", [TOO_SHORT], f"slurm_7.log: {TOO_SHORT}"),
        ("finished", [OF_SLURM], None),
        ("failed", [MISSING, AGAIN, OF_SLURM], f"slurm_7.log: {OF_SLURM}"),
    ],
)  # fmt: skip
def test_of_what_a_jobs_log_says_the_drivers_own_word_comes_first(tmp_path, state, lines, headline):
    found = write_run(tmp_path / "run", state, job="7")
    write_heartbeat(found, 0, before=50.0, phase="step" if state == "died" else "end")
    (found / "logs/slurm_7.log").write_text("\n".join(["job 7, start 1: step 0, on nodea", *lines]) + "\n")
    first = first_of(found)
    assert (first is None) == (headline is None)
    assert headline is None or first.headline.startswith(headline)


def test_ranks_are_merged_by_time_and_say_the_same_once(run):
    write_log(run, 0, (9, "INFO", "one"), (7, "WARNING", "both say it"), (5, "INFO", "three\n  of two lines"))
    write_log(run, 1, (8, "INFO", "two"), (6.9, "WARNING", "both say it"), (3, "WARNING", "both say it"))
    entries = merge([read_rank(rank, path) for rank, path in rank_logs(run / "logs").items()], 50)
    assert texts(entries) == ["one", "two", "both say it", "three", "both say it"]
    assert [entry.ranks for entry in entries] == [(0,), (1,), (0, 1), (0,), (1,)]
    assert entries[3].lines == ("three", "  of two lines")
    parts = [read_rank(rank, path) for rank, path in rank_logs(run / "logs").items()]
    assert texts(merge(parts, 3)) == ["three", "both say it"]
    assert texts(merge(parts, 1)) == ["both say it"], "a part never takes away what is newer"
    assert texts(merge(parts, 50, ("WARNING",))) == ["both say it", "both say it"]


def test_only_the_end_of_a_huge_log_is_read(run):
    write_log(run, 0, (3, "INFO", "early"))
    with open(run / "logs" / "rank_0.log", "r+b") as file:
        file.seek(1 << 34)
        file.write(f"\n{stamp(NOW)} INFO megalite: late\n".encode())
    assert texts(read_rank(0, run / "logs" / "rank_0.log")) == ["late"]
    assert (run / "logs" / "rank_0.log").stat().st_size > 1000 * TAIL_BYTES


def test_lines_are_whole(tmp_path):
    path = tmp_path / "log"
    assert tail_lines(path) == ([], False)
    path.write_bytes(b"first\nsecond\nthird\n")
    assert tail_lines(path) == (["first", "second", "third"], False)
    assert tail_lines(path, 10) == (["third"], True)


def test_damaged_logs(run):
    (run / "logs").mkdir()
    (run / "logs" / "rank_0.log").write_bytes(b"no date\n9999-99-99 99:99:99,999 ERROR a: b\n\xff\x00\xfe\n")
    (run / "logs" / "rank_1.log").mkdir()
    (run / "logs" / "rank_x.log").touch()
    os.mkfifo(run / "logs" / "rank_2.log")
    (run / "logs" / "heartbeats").mkdir()
    (run / "logs" / "heartbeats" / "rank_00000.json").write_text("[" * 100_000)
    assert list(rank_logs(run / "logs")) == [0]
    assert first_of(run).text == LOST


def test_the_command(run, capsys):
    write_log(run, 0, (9, "INFO", "step 6"), (3, "ERROR", LOST))
    write_log(run, 1, (8, "WARNING", "slow \x1b[31mdisk at https://me:canary@host/x"), (2, "INFO", "last"))
    write_log(run, 10, (4, "ERROR", "DataError: shard 3 is cut"))
    write_heartbeat(run, 10, phase="end", host="node9")
    (run / "logs" / "slurm_7.log").write_text("job 7, start 1: step 0, on node9\nall\x07 of it\n")
    assert logs([f"run_dir={run}"]) == 0
    shown = capsys.readouterr().out
    assert "canary" not in shown
    assert "\x1b" not in shown
    lines = shown.splitlines()
    assert lines[0].startswith(f"{run}: failed, step 7 of 100, last start ")
    assert lines[1].startswith("first error: rank 10 on node9, ")
    assert lines[2].startswith("> ")
    assert lines[2].endswith("rank 10 ERROR DataError: shard 3 is cut")
    order = ["step 6", "slow disk at https://***@host/x", "DataError", "Connection reset", "last", "slurm_7.log", "all"]
    places = [shown.rindex(text) for text in order]
    assert places == sorted(places)
    assert logs([f"run_dir={run}", "errors=true", "ranks=[0,1]", "lines=5"]) == 0
    shown = capsys.readouterr().out
    assert "first error: rank 0" in shown
    assert not [text for text in ("last", "slow", "DataError", "slurm_7") if text in shown.splitlines()[-1]]
    with pytest.raises(ConfigError, match=r"ranks: found \[2, 4\], but .* holds logs of ranks 0-1,10"):
        logs([f"run_dir={run}", "ranks=[2,0,4]"])


def test_a_directory_without_logs(tmp_path, capsys):
    assert logs([f"run_dir={tmp_path}"]) == 0
    assert "nothing in the logs of ranks" in capsys.readouterr().out
    with pytest.raises(ConfigError, match="is no directory"):
        logs([f"run_dir={tmp_path / 'nowhere'}"])


@pytest.mark.parametrize(
    ("settings", "message"), [({"lines": 0}, "lines: found 0"), ({"ranks": (-1,)}, "ranks: found"), ({}, "run_dir: is")]
)
def test_settings_that_cannot_work(settings, message):
    with pytest.raises(ConfigError, match=message):
        validate_logs(LogsConfig(run_dir="x" if settings else "", **settings))
