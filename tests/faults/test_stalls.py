"""R6: a rank that holds the others up is named, with what they wait in and what it does; the job ends, and all of it.

Real training on three forked ranks; the stall is put into one of them at its fourth step.
"""

import ctypes
import os
import random
import signal
import time

import pytest
import torch.distributed as dist

from megalite.errors import EXIT_RESOURCE
from megalite.guard import vitals
from megalite.launch.spawn import spawn_ranks
from megalite.preflight import preflight
from megalite.train import train
from tests.runs import tiny_config, write_store

SMALL = {"num_layers": 2, "hidden_size": 48, "num_attention_heads": 3, "vocab_size": 300, "max_sequence_length": 64}


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return write_store(tmp_path_factory.mktemp("stores") / "words")


def hold_the_gil():
    ctypes.PyDLL(None).sleep(300)


def spin():
    while True:
        pass


def mismatch():
    import torch

    dist.broadcast(torch.ones(3), src=dist.get_rank())
    time.sleep(300)


# What the rank does, in which phase, what the report says of it.
STALLS = {
    "stopped": ("step", lambda: os.kill(os.getpid(), signal.SIGSTOP), "stopped"),
    "sleeps before a collective": ("step", lambda: time.sleep(300), "step"),
    "waits for data": ("data", lambda: time.sleep(300), "data"),
    "holds the GIL": ("step", hold_the_gil, "step"),
    "spins": ("step", spin, "step"),
    "another collective": ("step", mismatch, "broadcast"),
    "a save that hangs": ("save", lambda: time.sleep(300), "save"),
    "an evaluation that hangs": ("evaluate", lambda: time.sleep(300), "evaluate"),
}


def check(stall, rank, store, folder, capfd):
    phase, act, says = STALLS[stall]
    config = tiny_config(
        folder / "run",
        store,
        model=SMALL,
        parallel={"tensor": 3} if rank == 1 else {},
        trainer={"steps": 9, "global_batch_size": 6, "eval_every": 4},
        data={"train": str(store), "validation": str(store), "sequence_length": 32},
        checkpoint={"save_every": 4},
        guard={"timeout": 4.0, "start_timeout": 120.0},
    )

    def rank_main(place):
        enter, step = vitals.Vitals.enter, [0]

        def watched(self, section, detail="", new=None, **names):
            new = names.get("step", new)
            enter(self, section, detail, new)
            step[0] = new or step[0]
            if place.rank == rank and section == phase and step[0] == 4:
                step[0] = 5
                act()

        vitals.Vitals.enter = watched
        (folder / f"pid_{place.rank}").write_text(str(os.getpid()))
        train(preflight(config), place)

    began = time.monotonic()
    code = spawn_ranks(rank_main, 3)
    took = time.monotonic() - began
    errors = capfd.readouterr().err
    assert code in (EXIT_RESOURCE, 128 + signal.SIGKILL), errors
    pid = (folder / f"pid_{rank}").read_text()
    reports = list((folder / "run/logs").glob("stall_*.txt"))
    assert len(reports) == 1, errors
    report = reports[0].read_text()
    first = report.splitlines()[0]
    assert f"rank {rank}" in first, report
    assert all(f"rank {other}" not in first for other in range(3) if other != rank), first
    for text in (f"{pid}", os.uname().nodename, "step 4", says):
        assert text in report, (text, report)
    assert first in errors
    for other in range(3):
        assert report.count(f"rank {other}") >= 1
        with pytest.raises(ProcessLookupError):
            os.kill(int((folder / f"pid_{other}").read_text()), 0)
    assert took < 60
    return took


@pytest.mark.parametrize(("stall", "rank"), [("stopped", 0), ("holds the GIL", 2), ("another collective", 1)])
def test_the_culprit_is_named(stall, rank, store, tmp_path, capfd):
    check(stall, rank, store, tmp_path, capfd)


@pytest.mark.soak
@pytest.mark.parametrize("draw", range(40))
def test_forty_stalls(draw, store, tmp_path, capfd):
    source = random.Random(draw)
    check(list(STALLS)[draw % len(STALLS)], source.randrange(3), store, tmp_path, capfd)
