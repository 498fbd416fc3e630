"""What a tracker costs a step: `python -m benchmarks.logging --output FILE`.

One rank, a row at every step: without a tracker, with TensorBoard, and with wandb where its server cannot be reached so
that it logs offline after the start. Short trainings take turns, each in processes of its own; the figure is the median
time of a step, its row included, over all of them, and its ratio to that without a tracker.
"""

import argparse
import dataclasses
import json
import os
import statistics
import tempfile
from pathlib import Path

from benchmarks.checkpoint import make_config
from benchmarks.data.loading import facts
from megalite.config.loader import load_config
from megalite.config.schema import LoggingConfig, TrainConfig
from megalite.engine import preload
from megalite.launch.spawn import spawn_ranks
from megalite.metrics import sinks
from megalite.metrics.jsonl import read_metrics
from megalite.preflight import preflight
from megalite.train import train

TRACKERS = {
    "none": {},
    "tensorboard": {"tensorboard": True},
    "wandb, no server": {"wandb": {"mode": "online", "project": "benchmark"}},
}
_WARM_UP = 5


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    # Nobody listens on the discard port; with a key, wandb tries to reach the server.
    os.environ |= {"WANDB_BASE_URL": "http://127.0.0.1:9", "WANDB_API_KEY": 40 * "0", "OMP_NUM_THREADS": "1"}
    seconds: dict[str, list[float]] = {name: [] for name in TRACKERS}
    with tempfile.TemporaryDirectory(prefix="megalite-logging-") as scratch:
        config = small(make_config(Path(scratch)), arguments.steps)
        preload()
        for repeat in range(arguments.repeats):
            for name, values in TRACKERS.items():
                run_dir = Path(scratch) / f"{name} {repeat}"
                logging = load_config(LoggingConfig, values)
                one = preflight(dataclasses.replace(config, run_dir=str(run_dir), logging=logging))
                assert spawn_ranks(lambda place, one=one: train(one, place), 1) == 0
                seconds[name] += intervals(run_dir)
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    ratios = {name: median / medians["none"] for name, median in medians.items()}
    for name, median in medians.items():
        print(f"{name:<20}{1e3 * median:10.3f} ms a step {ratios[name]:8.4f}")
    if arguments.output:
        result = {
            "facts": facts(),
            "settings": vars(arguments) | {"output": None},
            "seconds": medians,
            "ratios": ratios,
        }
        arguments.output.write_text(json.dumps(result, indent=1) + "\n")


def small(config: TrainConfig, steps: int) -> TrainConfig:
    """A step of some tens of milliseconds, and a row for each."""
    model = dataclasses.replace(config.model, hidden_size=256, num_layers=4, num_attention_heads=4)
    trainer = dataclasses.replace(config.trainer, steps=steps, log_every=1)
    checkpoint = dataclasses.replace(config.checkpoint, save_every=0)
    return dataclasses.replace(config, model=model, trainer=trainer, checkpoint=checkpoint)


def intervals(run_dir: Path) -> list[float]:
    """Seconds from each row to the next, as the trainer counts them: the row before is written within."""
    rows = read_metrics(run_dir / sinks.METRICS_FILE)
    return [row["step_seconds"] for row in rows if row["step"] > _WARM_UP]


if __name__ == "__main__":
    main()
