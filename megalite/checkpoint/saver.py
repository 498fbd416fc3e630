"""Saving: every rank takes part in gathering, files are spread over all ranks, rank 0 commits.

Each rank has one thread that digests, writes, syncs and reads back its files while the next tensors are gathered; on
rank 0 it commits what all ranks have written. Asynchronously, training goes on meanwhile, and the thread works from
copies in host memory. Then the steps' own collectives tell when no rank has anything to wait for.
"""

import math
import shutil
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch

import megalite
from megalite.checkpoint.agreement import gather_lists, on_rank_0
from megalite.checkpoint.counters import Counters
from megalite.checkpoint.engine_state import get_loss_scaler, get_tensor, link_moments, optimizer_step
from megalite.checkpoint_folder import commit, create_temporary, prune
from megalite.checkpoint_format import KINDS, FileEntry, Manifest, verify_file
from megalite.config.compose import config_values
from megalite.data.files import naming
from megalite.data.format import TokenStore
from megalite.engine import Engine
from megalite.errors import CheckpointError
from megalite.failpoints import failpoint
from megalite.log import get_logger
from megalite.models import gather_parameter
from megalite.tensor_file import TensorFileWriter

FILE_BYTES = 512 << 20  # a file is closed when the next tensor would take it above this
RETRY_SECONDS = (1.0, 5.0, 25.0)  # between the tries of checkpoint.on_save_error=retry

log = get_logger(__name__)
T = TypeVar("T")


@dataclass
class _Pending:
    """A checkpoint on its way: first all ranks' files are written, then rank 0 commits it."""

    temporary: Path
    state: dict[str, Any]  # of the manifest, without the files
    files: list[Future[FileEntry]]
    committed: Future[Path] | None = None


class Saver:
    """Writes the checkpoints of one run. What says "collective" is called by all ranks at the same step."""

    def __init__(self, engine: Engine, run_dir: Path):
        """For the run in `run_dir`, whose `checkpoint` settings say how."""
        self._engine, self._folder = engine, run_dir / "checkpoints"
        self._config = engine.config.checkpoint
        self._num_bytes = checkpoint_bytes(engine)
        self._thread = ThreadPoolExecutor(1, "save")
        self._pending: _Pending | None = None
        self.saved_step = 0  # the last that is committed; 0: none

    @property
    def is_pending(self) -> bool:
        """Whether a checkpoint is not committed yet; the same on every rank."""
        return self._pending is not None

    @property
    def is_busy(self) -> bool:
        """Whether `advance` would wait for this rank's thread."""
        if self._pending is None:
            return False
        work = [self._pending.committed] if self._pending.committed else self._pending.files
        return not all(future.done() for future in work)

    def save(self, counters: Counters, evaluation: dict[str, float], ephemeral: bool = False) -> None:
        """Save what the engine holds as step `counters.step`; nothing may be pending. Collective.

        Memory on a rank: at once, two files (`FILE_BYTES`, or one larger tensor); asynchronously, its share of all.
        Raises as `finish` does.
        """
        assert self._pending is None, "call finish first: it tells what became of the save before"
        engine, rank, asynchronous = self._engine, self._engine.mesh.rank, self._config.asynchronous
        temporary = on_rank_0("write", lambda: self._create(counters.step))
        link_moments(engine)
        parameters = dict(engine.parameters())
        files: list[Future[FileEntry]] = []
        for number, (kind, names) in enumerate(_plan(engine)):
            writes = number % engine.mesh.world_size == rank
            tensors = {}
            for name in names:
                full = gather_parameter(get_tensor(engine, parameters[name], kind), parameters[name], engine.mesh)
                if writes:
                    tensors[name] = _to_host(full, asynchronous)
            if writes:
                if engine.mesh.device.type == "cuda":
                    torch.cuda.current_stream().synchronize()  # the copies to the host
                if files and not asynchronous:
                    files[-1].exception()  # waits
                file = f"{kind}-{number:05d}.safetensors"
                files.append(self._thread.submit(self._write, temporary, file, kind, tensors))
        self._pending = _Pending(temporary, _state(engine, counters, evaluation, ephemeral), files)
        if not asynchronous:
            self.finish()

    def finish(self) -> None:
        """Wait until what is pending is committed; without anything pending do nothing. Collective.

        Raises `CheckpointError` on every rank when any rank could not write or a tensor holds inf or nan; the
        checkpoints already there are untouched.
        """
        while self._pending:
            self.advance()

    def advance(self) -> None:
        """Take what is pending one stage further; waits only where a rank `is_busy`. Collective; raises as `finish`."""
        pending, self._pending = self._pending, None
        if pending is None:
            return
        if pending.committed is None:
            entries = self._gather(pending)
            if self._engine.mesh.rank == 0:
                pending.committed = self._thread.submit(self._commit, pending, entries)
            else:
                pending.committed = Future()
                pending.committed.set_result(pending.temporary)  # rank 0 alone has to wait
            self._pending = pending
            return
        log.info("saved %s", on_rank_0("write", pending.committed.result))
        self.saved_step = pending.state["step"]

    def _create(self, step: int) -> Path:
        try:
            return self._retrying(lambda: create_temporary(self._folder, step))
        except OSError as error:
            raise CheckpointError(self._explain(error)) from None

    def _retrying(self, work: Callable[[], T]) -> T:
        """What `work` returns; with `checkpoint.on_save_error=retry` it is done again where the disk refuses."""
        for seconds in RETRY_SECONDS if self._config.on_save_error == "retry" else ():
            try:
                return work()
            except OSError as error:
                log.warning("saving failed: %s; trying again in %g s", error, seconds)
                time.sleep(seconds)
        return work()

    def _explain(self, error: OSError) -> str:
        try:
            free = f"{shutil.disk_usage(self._folder.parent).free:,}"
        except OSError:
            free = "an unknown number"
        return (
            f"rank {self._engine.mesh.rank} could not write a checkpoint: {error}. It takes {self._num_bytes:,} bytes, "
            f"the disk has {free} free"
        )

    def close(self) -> None:
        """End the thread when it is done with what it was given."""
        self._thread.shutdown()

    def _gather(self, pending: _Pending) -> list[FileEntry]:
        """What the manifest says of all ranks' files."""
        entries, problem = [], None
        for file in pending.files:
            try:
                entries.append(file.result())
            except CheckpointError as error:
                problem = str(error)
            except OSError as error:
                problem = self._explain(error)
        try:
            return gather_lists(entries, problem)
        except CheckpointError:
            if self._engine.mesh.rank == 0:
                shutil.rmtree(pending.temporary, ignore_errors=True)
            raise

    def _write(self, folder: Path, name: str, kind: str, tensors: dict[str, torch.Tensor]) -> FileEntry:
        """In the thread: one file, and what the manifest says of it."""
        bad = [key for key, tensor in tensors.items() if not torch.isfinite(tensor).all()]
        if bad:
            raise CheckpointError(f"not saved: {kind} of {', '.join(bad[:3])} of {len(bad)} tensors holds inf or nan")
        failpoint("before file")
        entry = self._retrying(lambda: _write_tensors(folder, name, kind, tensors))
        self._retrying(lambda: verify_file(folder, entry))  # before any older checkpoint is removed for it
        failpoint("after file")
        return entry

    def _commit(self, pending: _Pending, entries: list[FileEntry]) -> Path:
        """In rank 0's thread."""
        try:
            entries = sorted(entries, key=lambda entry: entry.name)
            final = self._retrying(lambda: commit(pending.temporary, Manifest(**pending.state, files=entries)))
        except OSError as error:
            problem = self._explain(error)
            shutil.rmtree(pending.temporary, ignore_errors=True)
            raise CheckpointError(problem) from None
        failpoint("after commit")
        prune(self._folder, self._config)
        return final


def checkpoint_bytes(engine: Engine) -> int:
    """How much disk a checkpoint takes, but for a few kB."""
    shapes = [parameter.shard.shape for _, parameter in engine.parameters()]  # type: ignore[attr-defined]
    return len(KINDS) * sum(4 * math.prod(shape) for shape in shapes)


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


def _to_host(tensor: torch.Tensor, keep: bool) -> torch.Tensor:
    """`tensor` on the host, contiguous; with `keep`, what the next step does to it is not seen."""
    if tensor.device.type == "cpu":
        return tensor.clone() if keep else tensor.contiguous()
    host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    return host.copy_(tensor, non_blocking=True)


def _write_tensors(folder: Path, name: str, kind: str, tensors: dict[str, torch.Tensor]) -> FileEntry:
    shapes = {key: tuple(tensor.shape) for key, tensor in tensors.items()}
    announced = {key: ("F32", shape) for key, shape in shapes.items()}
    with naming(folder / name), TensorFileWriter(folder / name, announced) as file:
        for tensor in tensors.values():
            file.write(tensor.numpy().data.cast("B"))
    return FileEntry(name, kind, file.num_bytes, file.digest, {key: list(shape) for key, shape in shapes.items()})


def _state(engine: Engine, counters: Counters, evaluation: dict[str, float], ephemeral: bool) -> dict[str, Any]:
    """The manifest's values but for the files."""
    return {
        **vars(counters),
        "optimizer_step": optimizer_step(engine),
        "loss_scaler": get_loss_scaler(engine),
        "seed": engine.config.seed,
        "config": config_values(engine.config),
        "stores": [TokenStore.open(store.path).digest for store in engine.config.data.train],
        "topology": {
            "world_size": engine.mesh.world_size,
            "tensor": engine.mesh.tensor.size,
            "context": engine.mesh.context.size,
            "data": engine.mesh.data.size,
            "zero_stage": engine.zero_stage,
            "precision": engine.precision,
            "device": engine.mesh.device.type,
        },
        "versions": {
            "megalite": megalite.__version__,
            "torch": torch.__version__,
            "deepspeed": engine.deepspeed.__version__,
        },
        "evaluation": evaluation,
        "ephemeral": ephemeral,
    }
