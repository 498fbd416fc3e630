"""Saving: every rank takes part in gathering, files are spread over all ranks, rank 0 commits."""

from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors.torch import save as serialize

import megalite
from megalite.checkpoint.agreement import gather_lists, on_rank_0
from megalite.checkpoint.counters import Counters
from megalite.checkpoint.engine_state import get_loss_scaler, get_tensor, link_moments, optimizer_step
from megalite.checkpoint_format import KINDS, FileEntry, Manifest, commit, create_temporary, prune, write_file
from megalite.config.compose import config_values
from megalite.data.format import TokenStore
from megalite.engine import Engine
from megalite.models import gather_parameter

FILE_BYTES = 512 << 20  # a file is closed when the next tensor would take it above this


def save_checkpoint(engine: Engine, run_dir: Path, counters: Counters) -> Path:
    """Write `run_dir/checkpoints/step_<counters.step>` from all ranks together; returns its path.

    Memory on a rank: one file (`FILE_BYTES`, or one larger tensor) and its serialized copy. Raises `CheckpointError` on
    every rank when any rank could not write; the checkpoints already there are untouched.
    """
    checkpoints = run_dir / "checkpoints"
    rank = engine.mesh.rank
    temporary = on_rank_0("write", lambda: create_temporary(checkpoints, counters.step))
    link_moments(engine)
    parameters = dict(engine.parameters())
    entries: list[FileEntry] = []
    error: str | None = None
    for number, (kind, names) in enumerate(_plan(engine)):
        writes = number % engine.mesh.world_size == rank
        tensors = {}
        for name in names:
            full = gather_parameter(get_tensor(engine, parameters[name], kind), parameters[name], engine.mesh)
            if writes:
                tensors[name] = full.cpu().contiguous()
        if writes and error is None:
            try:
                entries.append(_write(temporary, f"{kind}-{number:05d}.safetensors", kind, tensors))
            except OSError as problem:
                error = f"rank {rank} could not write a checkpoint file: {problem}"
    manifest = _manifest(engine, counters, gather_lists(entries, error))
    return on_rank_0("write", lambda: _publish(temporary, manifest, engine.config.checkpoint.keep))


def _publish(temporary: Path, manifest: Manifest, keep: int) -> Path:
    final = commit(temporary, manifest)
    prune(temporary.parent, keep)
    return final


def _plan(engine: Engine) -> Iterator[tuple[str, list[str]]]:
    """The files to write as (kind, names of tensors), the same on every rank."""
    for kind in KINDS:
        names: list[str] = []
        size = 0
        for name, parameter in engine.parameters():
            num_bytes = 4 * torch.Size(parameter.shard.shape).numel()  # type: ignore[attr-defined]
            if names and size + num_bytes > FILE_BYTES:
                yield kind, names
                names, size = [], 0
            names.append(name)
            size += num_bytes
        yield kind, names


def _write(folder: Path, name: str, kind: str, tensors: dict[str, torch.Tensor]) -> FileEntry:
    content = serialize(tensors)
    digest = write_file(folder, name, content)
    shapes = {key: list(tensor.shape) for key, tensor in tensors.items()}
    return FileEntry(name=name, kind=kind, num_bytes=len(content), digest=digest, tensors=shapes)


def _manifest(engine: Engine, counters: Counters, files: list[FileEntry]) -> Manifest:
    return Manifest(
        step=counters.step,
        samples_consumed=counters.samples_consumed,
        tokens_seen=counters.tokens_seen,
        skipped_steps=counters.skipped_steps,
        skipped_in_a_row=counters.skipped_in_a_row,
        optimizer_step=optimizer_step(engine),
        loss_scaler=get_loss_scaler(engine),
        seed=engine.config.seed,
        config=config_values(engine.config),
        stores=[TokenStore.open(store.path).digest for store in engine.config.data.train],
        topology={
            "world_size": engine.mesh.world_size,
            "tensor": engine.mesh.tensor.size,
            "context": engine.mesh.context.size,
            "data": engine.mesh.data.size,
            "zero_stage": engine.zero_stage,
            "precision": engine.precision,
            "device": engine.mesh.device.type,
        },
        versions={
            "megalite": megalite.__version__,
            "torch": torch.__version__,
            "deepspeed": engine.deepspeed.__version__,
        },
        files=sorted(files, key=lambda entry: entry.name),
    )
