"""A finished or stopped run, opened for evaluation and generation: its configuration, tokenizer, checkpoint, model."""

from dataclasses import dataclass
from pathlib import Path

import torch

from megalite.checkpoint import load_model
from megalite.checkpoint_folder import require_checkpoint
from megalite.checkpoint_format import read_manifest
from megalite.config.loader import load_config
from megalite.config.schema import ParallelConfig, TrainConfig
from megalite.mesh import Mesh, build_mesh
from megalite.models import Decoder, build_model, materialize


@dataclass(frozen=True)
class LoadedRun:
    """A model with the weights of one checkpoint, on one device, whatever layout trained it."""

    config: TrainConfig
    mesh: Mesh
    model: Decoder
    step: int


def load_run(run_dir: str, checkpoint: str | None) -> LoadedRun:
    """Open a run directory. `checkpoint` is a path, or None for the newest.

    The model is the one that the checkpoint's own manifest describes, whatever has become of the run directory. Raises
    `CheckpointError` when there is no checkpoint.
    """
    device = torch.device("cuda") if torch.cuda.is_available() else torch.device("cpu")
    mesh = build_mesh(ParallelConfig(), device)
    folder = require_checkpoint(checkpoint, Path(run_dir))
    config = load_config(TrainConfig, read_manifest(folder).config)
    model = build_model(config.model, mesh)
    materialize(model, mesh, config.seed)
    manifest = load_model(model, folder, mesh)
    return LoadedRun(config, mesh, model.eval(), manifest.step)
