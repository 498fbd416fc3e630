"""R5: a signal to any one process ends the run at the next step, saved, with the requeue code; a second one at once."""

import os
import random
import signal
import time

import pytest

from megalite import failpoints
from megalite.checkpoint_format import read_manifest
from megalite.errors import EXIT_REQUEUE
from megalite.launch.spawn import spawn_ranks
from megalite.metrics.jsonl import read_metrics
from megalite.preflight import preflight
from megalite.train import train
from tests.faults.supervisor import final_digests, run_once
from tests.runs import tiny_config, write_store

SMALL = {"num_layers": 2, "hidden_size": 32, "num_attention_heads": 4, "vocab_size": 300, "max_sequence_length": 64}


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return write_store(tmp_path_factory.mktemp("stores") / "words")


def config(run_dir, store, **changes):
    groups = {
        "model": SMALL,
        "parallel": {"tensor": 2},
        "trainer": {"steps": 8, "micro_batch_size": 4, "log_every": 3, "eval_every": 4},
        "data": {"train": str(store), "validation": str(store), "sequence_length": 32},
        "checkpoint": {"save_every": 100},
    }
    return tiny_config(run_dir, **{name: group | changes.get(name, {}) for name, group in groups.items()})


def run_and_signal(config, phase, rank, number, again=0.0):
    """Two ranks; the signal comes when `rank` (None: rank 0, for the launcher) enters `phase` of step 5 or later."""

    def rank_main(place):
        from megalite.guard import vitals

        enter = vitals.Vitals.enter
        seen = {"step": 0, "sent": False}

        def watched(self, section, detail="", step=None):
            enter(self, section, detail, step)
            seen["step"] = step or seen["step"]
            wanted = (section == phase or detail == phase) and (seen["step"] >= 3 or phase == "weights")
            if wanted and place.rank == (rank or 0) and not seen["sent"]:
                seen["sent"] = True
                target = os.getppid() if rank is None else os.getpid()
                os.kill(target, number)
                time.sleep(0.05)
                if again:
                    time.sleep(again)
                    os.kill(target, number)
                    time.sleep(60)

        vitals.Vitals.enter = watched
        train(preflight(config), place)

    return spawn_ranks(rank_main, 2)


DRAWS = [
    (phase, rank, number)
    for phase in ("weights", "data", "step", "evaluate", "save")
    for rank in (None, 0, 1)
    for number in (signal.SIGTERM, signal.SIGUSR1)
]


@pytest.fixture(scope="module")
def straight(store, tmp_path_factory):
    folder = tmp_path_factory.mktemp("straight")
    assert run_once(config(folder / "run", store), 2) == 0
    return folder / "run"


def check(draw, store, straight, folder, capfd):
    phase, rank, number = draw
    save = {"checkpoint": {"save_every": 2}} if phase == "save" else {}
    made = config(folder / "run", store, **save)
    code = run_and_signal(made, phase, rank, number)
    assert code == EXIT_REQUEUE, capfd.readouterr().err
    manifests = [read_manifest(path) for path in (folder / "run/checkpoints").glob("step_????????")]
    stopped = max(manifests, key=lambda manifest: manifest.step)
    assert stopped.step < 8
    assert f"stopped by a signal at step {stopped.step} of 8" in capfd.readouterr().err
    assert stopped.evaluation_due == (stopped.step == 4)
    assert stopped.step == 4 or phase != "evaluate"
    assert run_once(made, 2) == 0, (folder / "stderr.txt").read_text()
    assert final_digests(folder / "run") == final_digests(straight)
    same = ("step", "loss", "grad_norm", "eval/words/loss")
    rows, expected = (read_metrics(path / "metrics.jsonl") for path in (folder / "run", straight))
    assert [[row.get(key) for key in same] for row in rows] == [[row.get(key) for key in same] for row in expected]


@pytest.mark.parametrize("draw", [random.Random(5).choice(DRAWS), ("evaluate", 1, signal.SIGTERM)])
def test_a_signal_stops_saves_and_the_same_command_ends_with_the_same_bits(draw, store, straight, tmp_path, capfd):
    check(draw, store, straight, tmp_path, capfd)


@pytest.mark.slow
@pytest.mark.parametrize("draw", DRAWS)
def test_a_signal_at_any_phase_to_any_process(draw, store, straight, tmp_path, capfd):
    check(draw, store, straight, tmp_path, capfd)


def test_a_second_signal_ends_the_run_at_once(store, tmp_path):
    began = time.monotonic()
    code = run_and_signal(config(tmp_path / "run", store), "data", 1, signal.SIGTERM, again=1.2)
    assert code == 128 + signal.SIGTERM
    assert time.monotonic() - began < 60
    assert failpoints.on_failpoint is None
