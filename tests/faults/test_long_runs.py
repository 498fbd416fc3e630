"""R10: the same seed, the same numbers. R17: a run holds as many files, threads and bytes at its end as before."""

import json
import os
import threading
from pathlib import Path

import pytest

from megalite.guard import vitals
from megalite.launch.spawn import spawn_ranks
from megalite.preflight import preflight
from megalite.train import train
from tests.faults.supervisor import outcome, run_once
from tests.runs import tiny_config, write_store

SMALL = {"num_layers": 1, "hidden_size": 32, "num_attention_heads": 2, "vocab_size": 300, "max_sequence_length": 64}


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> Path:
    return write_store(tmp_path_factory.mktemp("stores") / "words")


LONG = pytest.mark.slow


@pytest.mark.parametrize(
    ("ranks", "steps"), [(1, 50), pytest.param(1, 200, marks=LONG), pytest.param(2, 200, marks=LONG)]
)
def test_the_same_seed_gives_the_same_losses(ranks, steps, store, tmp_path):
    def losses(name, seed=7, stop_after=None):
        (tmp_path / name).mkdir()
        config = tiny_config(
            tmp_path / name / "run",
            store,
            model=SMALL | {"dropout": 0.1},
            parallel={"tensor": ranks},
            trainer={"steps": steps, "global_batch_size": 2, "stop_after": stop_after},
        )
        object.__setattr__(config, "seed", seed)
        assert run_once(config, ranks) == 0, (tmp_path / name / "stderr.txt").read_text()
        return outcome(tmp_path / name / "run")

    first = losses("first")
    assert len(first[0]) == steps
    assert losses("second") == first
    assert losses("another", seed=8, stop_after=1)[0][1] != first[0][1]


def watch(config, every: int) -> list[list[dict[str, int]]]:
    """Train on two ranks; returns what each of them held at the begin of each `every`th step."""
    folder = Path(config.run_dir).parent

    def rank_main(place):
        enter, samples = vitals.Vitals.enter, []

        def watched(self, section, detail="", step=None):
            enter(self, section, detail, step)
            if step and step % every == 0:
                samples.append({"step": step, **held(Path(config.run_dir))})
                (folder / f"held_{place.rank}.json").write_text(json.dumps(samples))

        vitals.Vitals.enter = watched
        train(preflight(config), place)

    assert spawn_ranks(rank_main, 2) == 0
    return [json.loads((folder / f"held_{rank}.json").read_text()) for rank in range(2)]


def held(run_dir: Path) -> dict[str, int]:
    """By this process: open files, threads, resident bytes, children; and the files of the run's logs."""
    status = Path("/proc/self/status").read_text()
    return {
        "files": len(os.listdir("/proc/self/fd")),
        "threads": len(os.listdir("/proc/self/task")),
        "python threads": threading.active_count(),
        "bytes": 1024 * int(status.partition("VmRSS:")[2].split()[0]),
        "children": sum(
            len(Path(f"/proc/self/task/{t}/children").read_text().split()) for t in os.listdir("/proc/self/task")
        ),
        "log files": sum(
            1 for path in (run_dir / "logs").rglob("*") if path.is_file() and not path.name.endswith(".tmp")
        ),
    }


FLAT = ("files", "threads", "python threads", "children", "log files")


def config_of(folder: Path, store: Path, steps: int, every: int):
    """A run that saves, asynchronously, and evaluates all the time."""
    folder.mkdir()
    return tiny_config(
        folder / "run",
        store,
        model=SMALL,
        parallel={"tensor": 2},
        trainer={"steps": steps, "global_batch_size": 2, "eval_every": every},
        data={"train": str(store), "validation": str(store), "sequence_length": 32},
        checkpoint={"save_every": every, "asynchronous": True},
    )


@pytest.mark.parametrize("every", [4, pytest.param(10, marks=LONG)])
def test_nothing_piles_up_in_fifteen_times(every, store, tmp_path):
    ranks = watch(config_of(tmp_path / "some", store, 15 * every, 2 * every), every)
    for samples in ranks:
        # Between the first evaluation, which opens its store, and the last step, which ends the reading ahead. The
        # least of each half: a save on its way holds a file more.
        halves = samples[2:8], samples[8:14]
        early, late = ({name: min(s[name] for s in half) for name in FLAT} for half in halves)
        assert late == early
    assert ranks[0][0]["children"] == 1, "the monitor"


@pytest.mark.soak
def test_nothing_piles_up_in_twenty_thousand_steps(store, tmp_path):
    """Bar: resident bytes rise by 1 % in ten thousand steps at most, by least squares after the first 2000."""
    every = 1000
    ranks = watch(config_of(tmp_path / "many", store, 20_000, every), 100)
    for rank, samples in enumerate(ranks):
        settled = [sample for sample in samples if sample["step"] > 2000]
        print(f"rank {rank}: first {settled[0]}, last {settled[-1]}", flush=True)
        between = [sample for sample in settled if sample["step"] % every == every // 2]
        for name in FLAT:
            assert len({sample[name] for sample in between}) == 1, (rank, name, between)
        mean_step = sum(sample["step"] for sample in settled) / len(settled)
        mean_bytes = sum(sample["bytes"] for sample in settled) / len(settled)
        slope = sum((s["step"] - mean_step) * (s["bytes"] - mean_bytes) for s in settled)
        slope /= sum((s["step"] - mean_step) ** 2 for s in settled)
        print(
            f"rank {rank}: {10_000 * slope / mean_bytes:+.3%} of {mean_bytes / 1e6:.0f} MB in 10,000 steps", flush=True
        )
        assert 10_000 * slope <= 0.01 * mean_bytes
