"""Sweeps for tests: over stub trainings, or over real ones of a tiny model."""

import copy
import csv
import functools
import sys
import time
from pathlib import Path

from megalite.config.compose import compose_train, config_values
from megalite.config.loader import load_config
from megalite.config.schema import TrainConfig
from megalite.launch.sweep import run as sweep_run

STUB = Path(__file__).with_name("stub_training.py")
MODEL = [
    "model.num_layers=1", "model.hidden_size=16", "model.num_attention_heads=2", "model.max_sequence_length=32",
    "trainer.global_batch_size=2", "trainer.micro_batch_size=2", "trainer.steps=3", "trainer.log_every=1",
    "engine.precision=fp32",
]  # fmt: skip


QUICK = ("seed", "optimizer.lr", "optimizer.weight_decay", "run_dir", "run_name")


@functools.cache
def compose_once(overrides):
    """What Hydra takes a fifth of a second for."""
    return config_values(compose_train(overrides))


def compose_quickly(overrides):
    """As `compose_train`, for overrides of which those in `QUICK` hold plain values."""
    quick = [line.partition("=") for line in overrides if line.partition("=")[0] in QUICK]
    values = copy.deepcopy(compose_once(tuple(line for line in overrides if line.partition("=")[0] not in QUICK)))
    for key, _, value in quick:
        group, _, name = key.rpartition(".")
        (values[group] if group else values)[name] = value if key.startswith("run_") else float(value)
    return load_config(TrainConfig, values | {"seed": int(values["seed"])})


def use_stub(monkeypatch):
    """Trainings are those of `stub_training.py`, without any of the slow imports."""
    monkeypatch.setattr(sweep_run, "job_command", lambda: [sys.executable, "-S", "-E", str(STUB)])
    monkeypatch.setattr(sweep_run, "_POLL_SECONDS", 0.02)


def read_table(directory):
    """The rows of sweep.csv."""
    with open(directory / "sweep.csv", newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def wait_until(holds, seconds=30):
    """Poll; fails the test when it takes too long."""
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.02)
