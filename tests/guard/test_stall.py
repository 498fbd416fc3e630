"""Who is to blame, by tables of records; how long a section may be quiet, by what was seen before."""

import dataclasses
import json
import os
import socket

import pytest

from megalite.guard.observer import MonitorSettings, Observer
from megalite.guard.proc import GONE, read_stat
from megalite.guard.reach import describe_cut
from megalite.guard.report import Sighting, build_report
from megalite.guard.stall import Limits, Patience, Record, Verdict, judge, name_ranks, parse_record

ANYONE = Record(
    rank=0,
    world_size=4,
    host="node1",
    machine="node1",
    pid=1,
    start=1,
    token="a",
    signal=42,
    own_signal=43,
    launchers=(),
    phase="step",
    step=7,
    num_steps=7,
    num_phases=1,
    progress=20,
    published=30,
)
ALL_REDUCE = [(8, "all_reduce"), (9, "all_reduce")]


def ranks(*changes):
    return {rank: dataclasses.replace(ANYONE, rank=rank, token=str(rank), **c) for rank, c in enumerate(changes)}


def collectives(**groups):
    return {"collectives": {group: list(entries) for group, entries in groups.items()}}


def numbered(number, operation="all_reduce"):
    return [(number - 1, "all_reduce"), (number, operation)]


# name: records, states, silent ranks, who is blamed, what the reason says
CASES = {
    "one rank has not entered the phase": (ranks({}, {"phase": "data", "num_phases": 0}, {}), {}, [], (1,), "data"),
    "one rank is a step behind": (ranks({}, {}, {"step": 6, "num_phases": 3}), {}, [], (2,), "still at step 6"),
    "extra phases in an earlier step do not count": (
        ranks({"progress": 90}, {"phase": "data", "num_phases": 0, "progress": 99}, {}),
        *({}, [], (1,), "ranks 0, 2 reached step 7, step"),
    ),
    "all at one place": (ranks({}, {}), {}, [], (0, 1), "no rank is behind another"),
    "alone": (ranks({}), {}, [], (0,), "not moving on from: step 7, step"),
    "alone with its lock held": (ranks({}), {0: "S"}, [0], (0,), "GIL"),
    "gone before everything": (
        ranks({}, {"step": 1}, {}),
        *({0: "S", 1: "T", 2: GONE}, [1, 2], (2,), "gone"),
    ),
    "stopped before silent": (ranks({}, {}, {"step": 1}), {0: "S", 1: "T", 2: "S"}, [1, 2], (1,), "stopped"),
    "a disk does not answer": (ranks({}, {}), {0: "D", 1: "S"}, [], (0,), "uninterruptible"),
    "silent": (ranks({}, {}, {}), {0: "S", 1: "R", 2: "S"}, [1], (1,), "GIL"),
    "silent on a machine without news": (ranks({}, {}, {}), {0: "S", 1: "R"}, [2], (2,), "sign of life"),
    "all silent tells nothing": (ranks({}, {"step": 6}), {0: "S", 1: "S"}, [0, 1], (1,), "step 6"),
    "who has ended is late for nobody": (ranks({"phase": "end", "step": 3}, {}, {"step": 6}), {}, [], (2,), "step 6"),
    "not started": (
        ranks(*[{"phase": "start: process group", "step": 0, "num_steps": 0}] * 3),
        *({}, [], (3,), "not started"),
    ),
    "seen elsewhere once the group stands": (
        ranks({"phase": "start: engine", "step": 0}, {"phase": "start: engine", "step": 0}),
        *({}, [], (0, 1), "start: engine"),
    ),
    # Of four ranks two are on a host with another run directory: they are not taken for dead, nor for late.
    "all that are seen wait for others": (
        ranks(*[collectives(world=ALL_REDUCE)] * 2),
        *({0: "S", 1: "S"}, [], (0, 1), "not moving on from: step 7, step (no rank is behind another)"),
    ),
    "one of those that are seen is gone": (
        ranks(*[collectives(world=ALL_REDUCE)] * 2),
        *({0: "S", 1: GONE}, [1], (1,), "gone"),
    ),
    "one has not called": (
        ranks(*[collectives(world=numbered(n)) for n in (9, 8, 9)]),
        *({}, [], (1,), "not yet in collective 9 (all_reduce) of group world, in which ranks 0, 2 wait"),
    ),
    "called nothing yet": (
        ranks(collectives(world=numbered(1)), collectives(world=[])),
        *({}, [], (1,), "not yet in collective 1"),
    ),
    # Rank 1 sleeps before a collective with rank 0; ranks 2 and 3 went on, to wait for rank 0 and for rank 1.
    "victims of victims": (
        ranks(
            collectives(tensor01=numbered(6), data02=numbered(1)),
            collectives(tensor01=numbered(5), data13=numbered(1)),
            collectives(tensor23=numbered(6), data02=numbered(2)),
            collectives(tensor23=numbered(6), data13=numbered(2)),
        ),
        *({}, [], (1,), "not yet in"),
    ),
    "two groups in another order": (
        ranks(collectives(a=numbered(5), b=numbered(4)), collectives(a=numbered(4), b=numbered(5))),
        *({}, [], (0, 1), "waiting in one process group for a rank that waits in another"),
    ),
    "another operation": (
        ranks(*[collectives(world=numbered(9, name)) for name in ("all_reduce", "all_reduce", "broadcast")]),
        *({}, [], (2,), "collective 9 of group world: ranks 0, 1 called all_reduce; rank 2 called broadcast"),
    ),
    "another operation, as many on either side": (
        ranks(*[collectives(world=numbered(9, name)) for name in ("all_reduce", "broadcast")]),
        *({}, [], (0, 1), "rank 0 called all_reduce; rank 1 called broadcast"),
    ),
    # The source of a broadcast does not wait: it went on to the next collective.
    "another operation, a collective ago": (
        ranks(
            collectives(world=ALL_REDUCE),
            collectives(world=[(9, "broadcast"), (10, "all_reduce")]),
            collectives(world=ALL_REDUCE),
        ),
        *({}, [], (1,), "rank 1 called broadcast"),
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_judge_blames_the_right_rank(name):
    records, states, silent, blamed, reason = CASES[name]
    verdict = judge(records, states, silent, {})
    assert verdict.ranks == blamed
    assert reason in verdict.reason


@pytest.mark.parametrize(("blamed", "told"), [((0, 1), True), ((2, 3), False)])
def test_a_report_names_the_ranks_that_were_never_seen_unless_it_blames_them(blamed, told):
    seen = {rank: Sighting(record, "S", 9.0, "") for rank, record in ranks({}, {}).items()}
    head, lines, *_ = build_report(Verdict(blamed, "late"), seen, 9.0, 8.0, "step")
    assert ("of ranks 2, 3 nothing was ever seen here: " in head) == told
    assert len(lines.splitlines()) == 2


def test_judge_blames_the_ranks_of_a_host_that_is_cut_off_unless_a_process_is_gone():
    records = ranks(collectives(world=ALL_REDUCE), collectives(world=ALL_REDUCE), {}, {})
    cut = {2: "cut off from node1:29400", 3: "cut off from node1:29400"}
    verdict = judge(records, {}, (), cut)
    assert (verdict.ranks, verdict.reason) == ((2, 3), "cut off from node1:29400")
    assert judge(records, {1: GONE}, (), cut).ranks == (1,)


def test_a_host_is_cut_off_when_nobody_answers_and_not_when_somebody_says_no(monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        assert describe_cut(f"127.0.0.1:{port}") == ""
    assert describe_cut(f"127.0.0.1:{port}") == "", "refused"
    assert describe_cut("") == ""

    def unreachable(*_, **__):
        raise TimeoutError("timed out")

    monkeypatch.setattr(socket, "create_connection", unreachable)
    assert describe_cut("node1:29400") == "cut off from node1:29400, where ranks met: timed out"


def test_a_rank_that_has_published_nothing_since_its_start_does_not_keep_the_job_there():
    patience = Patience(Limits(timeout=7.0, start=900.0))
    mute = dataclasses.replace(ANYONE, phase="start: weights", num_steps=0)
    others = [dataclasses.replace(ANYONE, rank=1, phase="step", num_steps=number) for number in (2, 3)]
    assert patience.section([mute, others[1]]) == "step"
    assert patience.section([mute, others[0]]) == "start"


def test_ranks_are_named_and_many_are_counted():
    assert name_ranks([3]) == "rank 3"
    assert name_ranks(range(10)) == "ranks 0, 1, 2, 3, 4, 5, 6, 7 and 2 more"


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '{"rank": 0}'])
def test_a_record_that_was_cut_is_none(text):
    assert parse_record(text) is None


def test_limits_are_learned_from_quiet_times():
    patience = Patience(Limits(floor=60.0, factor=10.0, first=900.0, start=1800.0))
    assert patience.seconds("start") == 1800.0
    assert patience.seconds("step") == patience.seconds("save") == 900.0
    patience.learn("step", 1.0)
    assert patience.seconds("step") == 60.0
    assert patience.seconds("save") == 900.0
    for quiet in [20.0] * 198 + [500.0]:
        patience.learn("step", quiet)
    assert patience.seconds("step") == 200.0, "one outlier in two hundred is beyond the 99th percentile"
    patience.learn("save", 100.0)
    assert patience.seconds("save") == 1000.0
    for _ in range(500):
        patience.learn("step", 2.0)
    assert patience.seconds("step") == 60.0, "old times are forgotten"


def test_a_timeout_replaces_what_is_learned_but_not_the_start():
    patience = Patience(Limits(timeout=5.0, start=77.0))
    patience.learn("step", 100.0)
    assert [patience.seconds(section) for section in ("start", "step", "save")] == [77.0, 5.0, 5.0]


@pytest.mark.parametrize(
    ("phases", "steps", "section"),
    [
        (["start: engine", "start"], [0, 0], "start"),
        (["step", "step"], [1, 1], "start"),
        (["data", "other"], [2, 2], "step"),
        (["step", "save"], [2, 2], "save"),
        (["save", "save: files"], [2, 2], "save: files"),
        (["end", "other: closing"], [2, 2], "other: closing"),
        (["step", "step"], [1, 2], "start"),
    ],
)
def test_the_section_is_the_one_that_may_take_longest(phases, steps, section):
    records = [dataclasses.replace(ANYONE, phase=p, num_steps=n) for p, n in zip(phases, steps, strict=True)]
    patience = Patience(Limits(start=3000.0, first=2000.0))
    patience.learn("step", 1.0)
    if section != "save":
        patience.learn("save", 1.0)
    assert patience.section(records) == section


def test_very_large_jobs_publish_less_often():
    assert [Limits().period(size) for size in (1, 256, 1024)] == [1.0, 1.0, 4.0]


def test_the_observers_clock_stands_still_while_its_process_does(tmp_path, monkeypatch):
    clock = [100.0]
    monkeypatch.setattr("megalite.guard.observer.time.monotonic", lambda: clock[0])
    observer = Observer(MonitorSettings(str(tmp_path), 0, 1, "here", Limits(interval=1.0)))
    clock[0] += 1.5
    observer.tick()
    assert observer.now == 1.5
    clock[0] += 3600.0  # a laptop that slept, a network file system that hung
    observer.tick()
    assert observer.now == 3.5


def test_a_rank_of_a_second_job_in_the_same_directory_is_not_taken_for_ours(tmp_path):
    """It takes no lock, its rank 0 does; it may publish before that has refused."""
    observer = Observer(MonitorSettings(str(tmp_path), 0, 2, "here", Limits()))
    observer.folder.mkdir()
    start = read_stat(os.getpid()).start

    def publish(rank, token, launcher):
        record = dataclasses.replace(
            ANYONE, rank=rank, machine="here", pid=os.getpid(), start=start, token=token, launchers=((launcher, 1),)
        )
        (observer.folder / f"rank_{rank:05d}.json").write_text(json.dumps(dataclasses.asdict(record)))
        observer.read()

    publish(0, "a", 10)
    publish(1, "b", 11)
    assert list(observer.records) == [0]
    publish(1, "c", 10)
    assert observer.records[1].token == "c"
    publish(1, "d", 11)
    assert observer.records[1].token == "c"
