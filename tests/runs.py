"""Small runs for tests: a token store of random text-like ids, a configuration, and a trainer on forked ranks."""

from pathlib import Path
from typing import Any

import numpy as np

from megalite.config.loader import load_config
from megalite.config.schema import TrainConfig
from megalite.data.writer import StoreWriter
from megalite.launch.spawn import spawn_ranks
from megalite.metrics.jsonl import read_metrics
from megalite.preflight import preflight
from megalite.train import train

VOCAB = 300


def write_store(path: Path, num_documents: int = 60, seed: int = 0) -> Path:
    """Documents whose next token is mostly a function of the last, so that there is something to learn."""
    random = np.random.default_rng(seed)
    successor = random.permutation(VOCAB - 1)
    with StoreWriter(path, vocab_size=VOCAB, end_of_document=VOCAB - 1, source=path.name) as writer:
        for _ in range(num_documents):
            tokens = [int(random.integers(VOCAB - 1))]
            for _ in range(int(random.integers(20, 90))):
                tokens.append(int(successor[tokens[-1]] if random.random() < 0.8 else random.integers(VOCAB - 1)))
            writer.add_document(np.array(tokens), num_bytes=3 * len(tokens))
    return path


def tiny_config(run_dir: Path | str, store: Path | str = "unused", **groups: dict[str, Any]) -> TrainConfig:
    """A 4-layer model of width 128; `groups` override single keys, `trainer={"steps": 20}`."""
    values: dict[str, dict[str, Any]] = {
        "model": {"vocab_size": VOCAB, "max_sequence_length": 64},
        "trainer": {"steps": 50, "global_batch_size": 8, "micro_batch_size": 2, "log_every": 1},
        "parallel": {},
        "engine": {"precision": "fp32"},
        "objective": {},
        "optimizer": {"lr": 3e-4},
        "schedule": {},
        "data": {"train": str(store), "sequence_length": 32},
        "checkpoint": {},
        "guard": {},
        "launch": {},
        "logging": {},
    }
    for group, changes in groups.items():
        values[group] = values[group] | changes
    return load_config(TrainConfig, {"run_name": "tiny", "run_dir": str(run_dir), "seed": 7, **values})


def train_on_ranks(config: TrainConfig, world_size: int) -> list[dict[str, Any]]:
    """Train in fresh processes, as `megalite train` does; returns the rows of metrics.jsonl."""
    config = preflight(config)
    code = spawn_ranks(lambda place: train(config, place), world_size)
    assert code == 0, f"training ended with exit code {code}"
    return read_metrics(Path(config.run_dir) / "metrics.jsonl")
