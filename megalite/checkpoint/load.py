"""Loading logical tensors into an engine of any layout, or into a bare model."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from megalite.checkpoint.agreement import on_rank_0
from megalite.checkpoint.counters import Counters
from megalite.checkpoint.engine_state import create_moments, set_loss_scaler, set_tensor
from megalite.checkpoint.hosts import agree_among_hosts
from megalite.checkpoint_folder import choose_checkpoint
from megalite.checkpoint_format import KINDS, Manifest, read_manifest
from megalite.engine import Engine
from megalite.errors import CheckpointError
from megalite.log import get_logger
from megalite.mesh import Mesh
from megalite.models import named_logical_parameters
from megalite.resuming import check_resume, draws_alike, world_size_note
from megalite.sharing import Sharing

log = get_logger(__name__)


def agree_on_checkpoint(
    resume: str, run_dir: Path, sharing: Sharing | None = None, moves: Callable[[], None] = lambda: None
) -> Path | None:
    """`choose_checkpoint` for all ranks: rank 0 looks and verifies, the others are told.

    With run directories that are several, of which `sharing` tells, as `agree_among_hosts` does. Raises
    `CheckpointError` on every rank alike.
    """
    if sharing and not sharing.is_whole:
        return agree_among_hosts(resume, run_dir, sharing, moves)
    return on_rank_0("read", lambda: choose_checkpoint(resume, run_dir))


def load_checkpoint(engine: Engine, folder: Path) -> Counters:
    """Fill weights and moments of `engine` from a verified checkpoint; returns how far the run was.

    Raises `CheckpointError` as `check_resume` does: it may be an older checkpoint than the one preflight looked at.
    """
    manifest = read_manifest(folder)
    notes = check_resume(engine.config, manifest)
    for note in notes + world_size_note(engine.config, manifest, engine.mesh.world_size):
        log.info("continuing from %s with %s", folder.name, note)
    reader = TensorReader(folder, manifest)
    create_moments(engine, manifest.optimizer_step)
    kinds = KINDS if manifest.stores else ("weight",)  # imported weights have no moments: they stay zero
    for name, parameter in engine.parameters():
        for kind in kinds:
            full = reader.read(kind, name, parameter.shard.shape)  # type: ignore[attr-defined]
            local = parameter.shard.slice(full, engine.mesh.tensor.rank, engine.mesh.tensor.size)  # type: ignore[attr-defined]
            set_tensor(engine, parameter, kind, local)
    set_loss_scaler(engine, manifest.loss_scaler)
    counters = Counters(**{field.name: getattr(manifest, field.name) for field in dataclasses.fields(Counters)})
    if not draws_alike(engine.config, manifest):
        counters.data_since_step, counters.data_since_sample = counters.step, counters.samples_consumed
    return counters


def load_model(model: torch.nn.Module, folder: Path, mesh: Mesh) -> Manifest:
    """Fill the weights of a materialized model without an engine, as evaluation and generation need it."""
    manifest = read_manifest(folder)
    reader = TensorReader(folder, manifest)
    for name, parameter in named_logical_parameters(model):
        full = reader.read("weight", name, parameter.shard.shape)  # type: ignore[attr-defined]
        parameter.data.copy_(parameter.shard.slice(full, mesh.tensor.rank, mesh.tensor.size))  # type: ignore[attr-defined]
    return manifest


class TensorReader:
    """Reads tensors of a checkpoint one by one, mapped from disk."""

    def __init__(self, folder: Path, manifest: Manifest):
        self._folder = folder
        self._manifest = manifest
        self._open: dict[str, Any] = {}

    def read(self, kind: str, name: str, shape: tuple[int, ...]) -> torch.Tensor:
        """One logical CPU tensor, fp32 or wider. Raises `CheckpointError` for one missing or of another shape."""
        file = self._manifest.location(kind, name)
        try:
            if file not in self._open:
                self._open[file] = safe_open(self._folder / file, framework="pt")
            tensor = self._open[file].get_tensor(name)
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{self._folder / file}: {name} cannot be read: {error}") from None
        if tuple(tensor.shape) != tuple(shape):
            raise CheckpointError(
                f"{self._folder / file}: {name} is {tuple(tensor.shape)}, the model has {tuple(shape)}"
            )
        return tensor
