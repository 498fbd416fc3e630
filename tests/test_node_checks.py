"""Ranks look at their hosts together: what is planted on one of them is named, and nothing else."""

import dataclasses
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from megalite import node_checks
from megalite.bandwidth import measure_all_reduce
from megalite.config.place import Place
from megalite.errors import EXIT_CONFIG, EXIT_RESOURCE
from megalite.launch.spawn import spawn_ranks
from megalite.node_checks import Node, find_problems, find_warnings, look_at_nodes, main
from tests.ranks import run_ranks

FIRST = Node(0, 0, "a", "CPU", "eth0", {"torch": "2.13"}, 0.0, 0.0, 0.0, True)
SECOND = dataclasses.replace(FIRST, rank=2, name="b")


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({}, None),
        ({"clock": -1.9}, None),
        ({"clock": -2.5}, "the clock of b is -2.5 s off that of a"),
        ({"versions": {"torch": "2.12"}}, "b has torch 2.12, a has 2.13"),
        ({"versions": {}}, "b has torch None"),
        ({"sees": None, "sees_rename": None}, None),
        ({"sees_rename": None}, "b does not see within"),
        ({"is_kept_out": False}, "b gets a lock"),
        ({"is_kept_out": False, "local_rank": 1}, None),  # its host's first rank says it
    ],
)
def test_problems(changes, told):
    problems = list(find_problems([FIRST, dataclasses.replace(SECOND, **changes)], Path("run")))
    assert len(problems) == (told is not None)
    assert told is None or told in problems[0]


def test_a_directory_of_its_own_is_worth_a_warning():
    blind = dataclasses.replace(SECOND, sees=None, sees_rename=None)
    assert list(find_warnings([FIRST, SECOND], Path("run"))) == []
    (warning,) = find_warnings([FIRST, blind, dataclasses.replace(blind, rank=3, local_rank=1)], Path("run"))
    assert "is not the same directory on b as on a: checkpoints are kept on a" in warning


def test_a_first_host_that_cannot_write_is_the_only_problem():
    nodes = [dataclasses.replace(node, sees=None, is_kept_out=False) for node in (FIRST, SECOND)]
    (problem,) = find_problems(nodes, Path("run"), "No space left on device")
    assert problem.startswith("run_dir: a cannot write, rename and lock")


def look(run_dir, fault):
    """A rank; the second one is on another host, with a fault."""
    rank, named = dist.get_rank(), run_dir
    if rank == 1:
        if fault == "other directory":
            run_dir = run_dir / "another"
        if fault == "clock":
            now = time.time
            time.time = lambda: now() + 60
        if fault == "old data":
            reads = node_checks._reads
            node_checks._reads = lambda path: reads(path) and "first"
        if fault == "no locks":
            node_checks.fcntl.flock = lambda file, kind: None
    node_checks._SEEN_SECONDS = 0.3
    place = Place(rank, 0, dist.get_world_size(), 1, "env://")
    nodes, trouble = look_at_nodes(place, torch.device("cpu"), run_dir)
    return [*find_problems(nodes, named, trouble), *find_warnings(nodes, named, trouble)], nodes


@pytest.mark.parametrize(
    ("fault", "told"),
    [
        (None, None),
        ("other directory", "is not the same directory"),
        ("clock", "+60.0 s off"),
        ("old data", "holds on to old data"),
        ("no locks", "gets a lock"),
        ("not writable", "cannot write, rename and lock"),
    ],
)
def test_ranks_find_the_fault_and_agree(tmp_path, fault, told):
    if fault == "not writable":
        (tmp_path / "run").touch()
    (problems, nodes), (of_the_other, _) = run_ranks(2, look, tmp_path / "run", fault)
    assert problems == of_the_other
    assert len(problems) == (told is not None), problems
    assert told is None or told in problems[0]
    assert [node.rank for node in nodes] == [0, 1]
    if fault is None:
        assert abs(nodes[1].clock) < 1
        assert not list((tmp_path / "run").iterdir()), "nothing is left behind"


def test_an_all_reduce_is_timed_by_its_slowest_rank():
    def measured():
        return measure_all_reduce(1 << 16, torch.device("cpu"))

    first, second = run_ranks(2, measured)
    assert first == second
    assert (first.num_ranks, first.backend, first.num_bytes) == (2, "gloo", 1 << 16)
    assert 0 < first.seconds < 60


def test_the_command(tmp_path, monkeypatch, capfd):
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "SLURM_STEP_NUM_TASKS"):
        monkeypatch.delenv(name, raising=False)
    arguments = [f"run_dir={tmp_path}", "nproc_per_node=2"]

    def rank(_):
        raise SystemExit(main(arguments))

    assert spawn_ranks(rank, 1) == 0
    shown = capfd.readouterr()
    assert "these hosts can train together" in shown.out
    assert "nproc_per_node=2 has no effect here" in shown.err
    arguments[0] = "run_dir=/dev/null"
    assert spawn_ranks(rank, 1) == EXIT_RESOURCE
    assert "failed: run_dir: " in capfd.readouterr().out
    arguments[1] = "size_mib=0"
    assert spawn_ranks(rank, 1) == EXIT_CONFIG
