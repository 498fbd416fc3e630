"""A small configuration for training on one GPU, with heads that the fused attention kernels take."""

from pathlib import Path
from typing import Any

import torch

from megalite.config.loader import load_config
from megalite.config.schema import TrainConfig

VOCAB, LENGTH, BATCH = 500, 64, 8


def small_config(run_dir: Path | str = "unused", store: Path | str = "unused", **groups: dict[str, Any]) -> TrainConfig:
    """Two layers of width 128 with heads of 32; `groups` override single keys, `engine={"zero_stage": 2}`."""
    values: dict[str, dict[str, Any]] = {
        "model": {"vocab_size": VOCAB, "max_sequence_length": LENGTH, "num_layers": 2, "hidden_size": 128},
        "trainer": {"steps": 20, "global_batch_size": BATCH, "micro_batch_size": BATCH // 2, "log_every": 1},
        "parallel": {},
        "engine": {"precision": "bf16"},
        "objective": {},
        "optimizer": {"lr": 1e-3},
        "schedule": {"name": "constant"},
        "data": {"train": str(store), "sequence_length": LENGTH},
        "checkpoint": {},
        "launch": {},
        "logging": {},
    }
    for group, changes in groups.items():
        values[group] = values[group] | changes
    return load_config(TrainConfig, {"run_name": "small", "run_dir": str(run_dir), "seed": 7, **values})


def samples(step: int) -> torch.Tensor:
    """The global batch of a step, [BATCH, LENGTH + 1]: sequences that count upwards, so that there is much to learn."""
    starts_B = torch.randint(VOCAB, (BATCH,), generator=torch.Generator().manual_seed(step))
    return (starts_B[:, None] + torch.arange(LENGTH + 1)) % VOCAB
