"""The table sums to the wall time of all lives, and what was done twice is lost work."""

import json
import time

import pytest

from megalite.guard.goodput import GoodputClock, Life, format_goodput, goodput_table, process_started, read_lives


def test_lives_sum_to_the_wall_time_and_lost_work_is_found():
    lives = [
        Life(1000.0, 1100.0, 0, 40, {"start": 20.0, "step": 80.0}),  # killed at 40, saved at 30
        Life(1130.0, 1160.0, 30, 31, {"start": 25.0, "step": 5.0}),  # killed at 31: all of it lost
        Life(1160.0, 1260.0, 20, 60, {"start": 20.0, "step": 60.0, "save": 20.0}),  # 30 was damaged: back to 20
    ]
    table = goodput_table(lives)
    assert sum(table.values()) == pytest.approx(260.0)
    assert table["step"] == pytest.approx(80 * 20 / 40 + 0 + 60)
    assert table["lost work"] == pytest.approx(80 * 20 / 40 + 5)
    assert table["down"] == 30.0
    assert table["start"] == 65.0
    lines = format_goodput(table).splitlines()
    assert "step            100.0 s   38.5%" in lines
    assert lines[-1] == "all             260.0 s"


def test_a_clock_counts_by_section_and_is_there_after_a_kill(tmp_path):
    path = tmp_path / "goodput.jsonl"
    first = GoodputClock(time.time() - 3.0, path)
    first.begin(0)
    first.enter("step")
    time.sleep(0.05)
    first.enter("save")
    first.mark(7)
    time.sleep(0.05)  # not written down: the process is killed here
    [life] = read_lives(path)
    assert (life.first_step, life.last_step) == (0, 7)
    assert 3.0 <= life.seconds["start"] < 3.1
    assert 0.05 <= life.seconds["step"] < 0.15
    assert life.ended - life.started == pytest.approx(sum(life.seconds.values()))
    second = GoodputClock(time.time(), path)
    second.begin(5)
    second.mark(6)
    assert len(read_lives(path)) == 2
    table = second.table()
    assert table["down"] >= 0.04
    assert table["lost work"] == pytest.approx(life.seconds["step"] * 2 / 7)
    assert sum(table.values()) == pytest.approx(read_lives(path)[1].ended - life.started, abs=1e-6)


def test_a_torn_file_does_not_stop_a_run(tmp_path):
    path = tmp_path / "goodput.jsonl"
    GoodputClock(time.time(), path).mark(1)
    path.write_bytes(path.read_bytes() + b'{"started": 1.0, "en' + b"\0" * 30 + b'\n[1]\n{"a": 2}\n')
    assert len(read_lives(path)) == 1


def test_without_a_file_nothing_is_written(tmp_path):
    clock = GoodputClock(time.time())
    clock.mark(3)
    assert list(tmp_path.iterdir()) == []
    assert json.dumps(clock.table())


def test_the_start_of_this_process_lies_in_the_past():
    assert 0 < time.time() - process_started() < 36_000
