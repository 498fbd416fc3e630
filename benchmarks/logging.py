"""What a tracker costs a step: `python -m benchmarks.logging --output FILE`.

One rank, a row at every step: with TensorBoard, and with wandb where its server cannot be reached so that it logs
offline after the start. Within each training the tracker takes the rows of ten steps and misses those of the next ten,
its process and threads at hand all the time: two trainings differ by more than a tracker costs. The figures are the
median time of a step, its row included, with the tracker over that without, which "none" shows the noise of, and the
time of the tracker's own calls over that of a step.
"""

import argparse
import dataclasses
import json
import os
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from benchmarks.checkpoint import make_config
from benchmarks.data.loading import facts
from megalite.config.loader import load_config
from megalite.config.schema import LoggingConfig, TrainConfig
from megalite.engine import preload
from megalite.launch.spawn import spawn_ranks
from megalite.metrics import recorder, sinks
from megalite.metrics.base import Row, Sink
from megalite.metrics.jsonl import read_metrics
from megalite.preflight import preflight
from megalite.train import train

TRACKERS = {
    "none": {},
    "tensorboard": {"tensorboard": True},
    "wandb, no server": {"wandb": {"mode": "online", "project": "benchmark"}},
}
CALLS = "calls.json"
_WARM_UP, _BLOCK = 10, 10


class InTurns:
    """A tracker that takes the rows of a block of steps, and misses those of the next."""

    def __init__(self, sink: Sink, run_dir: Path):
        """Of `sink`; the seconds of its calls are written into `run_dir` in the end."""
        self._sink, self._file, self._seconds = sink, run_dir / CALLS, []

    def log(self, step: int, row: Row) -> None:
        """As a sink does."""
        if is_on(step):
            began = time.perf_counter()
            self._sink.log(step, row)
            self._seconds.append(time.perf_counter() - began)

    def close(self) -> None:
        """As a sink does."""
        self._file.write_text(json.dumps(self._seconds))
        self._sink.close()


def in_turns(built: list[Sink], run_dir: Path) -> list[Sink]:
    """All but the first, metrics.jsonl, which is part of every run."""
    return [one if i == 0 else InTurns(one, run_dir) for i, one in enumerate(built)]


def is_on(step: int) -> bool:
    """Whether the tracker takes the row of a step."""
    return step // _BLOCK % 2 == 0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    # Nobody listens on the discard port; with a key, wandb tries to reach the server.
    os.environ |= {"WANDB_BASE_URL": "http://127.0.0.1:9", "WANDB_API_KEY": 40 * "0", "OMP_NUM_THREADS": "1"}
    build = sinks.build_sinks
    recorder.build_sinks = lambda *given: in_turns(build(*given), given[1])
    ratios: dict[str, list[float]] = {name: [] for name in TRACKERS}
    seconds: dict[str, list[float]] = {name: [] for name in TRACKERS}
    calls: dict[str, list[float]] = {name: [] for name in TRACKERS}
    with tempfile.TemporaryDirectory(prefix="megalite-logging-") as scratch:
        config = small(make_config(Path(scratch)), arguments.steps)
        preload()
        for repeat in range(arguments.repeats):
            for name, values in TRACKERS.items():
                run_dir = Path(scratch) / f"{name} {repeat}"
                logging = load_config(LoggingConfig, values)
                one = preflight(dataclasses.replace(config, run_dir=str(run_dir), logging=logging))
                assert spawn_ranks(lambda place, one=one: train(one, place), 1) == 0
                off, on = medians(read_metrics(run_dir / sinks.METRICS_FILE))
                ratios[name].append(on / off)
                seconds[name].append(off)
                if (run_dir / CALLS).exists():
                    calls[name].append(statistics.median(json.loads((run_dir / CALLS).read_text())) / off)
    for name, values in ratios.items():
        spread = ", ".join(f"{value:.4f}" for value in sorted(values))
        step = 1e3 * statistics.median(seconds[name])
        own = statistics.median(calls[name] or [0.0])
        print(
            f"{name:<20}{step:10.3f} ms a step, its calls {own:8.5f} of it, {statistics.median(values):.4f} ({spread})"
        )
    if arguments.output:
        result = {
            "facts": facts(),
            "settings": vars(arguments) | {"output": None},
            "seconds": seconds,
            "ratios": ratios,
            "calls": calls,
        }
        arguments.output.write_text(json.dumps(result, indent=1) + "\n")


def medians(rows: Sequence[Row]) -> tuple[float, float]:
    """Seconds of a step without and with the tracker.

    From each row to the next, as the trainer counts them: the row before is written within, and the first step of a
    block still has to do with the block before.
    """
    blocks: tuple[list[float], list[float]] = ([], [])
    for row in rows:
        before = int(row["step"]) - 1
        if before > _WARM_UP and before % _BLOCK:
            blocks[is_on(before)].append(float(row["step_seconds"]))
    return statistics.median(blocks[0]), statistics.median(blocks[1])


def small(config: TrainConfig, steps: int) -> TrainConfig:
    """A step of some tenths of a second, and a row for each."""
    model = dataclasses.replace(config.model, hidden_size=256, num_layers=4, num_attention_heads=4)
    trainer = dataclasses.replace(config.trainer, steps=steps, log_every=1)
    checkpoint = dataclasses.replace(config.checkpoint, save_every=0)
    return dataclasses.replace(config, model=model, trainer=trainer, checkpoint=checkpoint)


if __name__ == "__main__":
    main()
