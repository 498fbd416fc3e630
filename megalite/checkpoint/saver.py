"""Saving: every rank does its part of writing files, then rank 0 commits.

Asynchronously files are written by a thread, from copies of the fragments in host memory, which are all that training
waits for; the steps' own collectives tell when no rank has anything to wait for.
"""

import math
import shutil
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import megalite
from megalite.checkpoint.agreement import gather_lists, on_rank_0
from megalite.checkpoint.counters import Counters
from megalite.checkpoint.disk import Disk
from megalite.checkpoint.engine_state import get_fragment, get_loss_scaler, link_moments, optimizer_step
from megalite.checkpoint.fragments import Fragments
from megalite.checkpoint.writing import FileWriter, PlannedFile
from megalite.checkpoint_folder import commit, create_temporary, prune
from megalite.checkpoint_format import KINDS, FileEntry, Manifest
from megalite.config.compose import config_values
from megalite.data.format import TokenStore
from megalite.engine import Engine
from megalite.errors import CheckpointError
from megalite.failpoints import failpoint
from megalite.log import get_logger

log = get_logger(__name__)


@dataclass
class _Pending:
    """A checkpoint on its way: first all ranks' files are written, then rank 0 commits it."""

    temporary: Path
    state: dict[str, Any]  # of the manifest, without the files
    written: Future[tuple[list[FileEntry], str | None]]  # this rank's, and what went wrong
    committed: Future[Path] | None = None


class Saver:
    """Writes the checkpoints of one run. What says "collective" is called by all ranks at the same step."""

    def __init__(self, engine: Engine, run_dir: Path, writers: Sequence[int] = ()):
        """For the run in `run_dir`, whose `checkpoint` settings say how. Collective.

        `writers`: the ranks that see rank 0's `run_dir`, itself among them; where none are given all do.
        """
        self._engine, self._folder = engine, run_dir / "checkpoints"
        self._config, rank = engine.config.checkpoint, engine.mesh.rank
        self._disk = Disk(run_dir, rank, checkpoint_bytes(engine), self._config.on_save_error == "retry")
        self._files = FileWriter(engine, self._disk, writers or range(engine.mesh.world_size))
        # Now: a disk of stores that is gone later must not take what was learned with it.
        self._stores = [TokenStore.open(store.path).digest for store in engine.config.data.train]
        self._copies: dict[str, torch.Tensor] = {}  # file -> this rank's fragments of it, of the last save
        self._thread = ThreadPoolExecutor(1, "save")
        # While the first steps run: fresh memory takes as long as eight copies, and the first save is not to hold up
        # training longer than the next ones.
        self._room = self._thread.submit(self._make_room) if self._config.asynchronous else None
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
        return not (self._pending.committed or self._pending.written).done()

    def save(self, counters: Counters, evaluation: dict[str, float], ephemeral: bool = False) -> None:
        """Save what the engine holds as step `counters.step`; nothing may be pending. Collective.

        Memory on a rank: two files (`writing.FILE_BYTES`, or one larger tensor); besides, asynchronously, its share of
        all, which it keeps from the start to the end; on a GPU at once, its share of as many files as there are
        writers. Raises as `finish` does.
        """
        assert self._pending is None, "call finish first: it tells what became of the save before"
        temporary = on_rank_0("write", lambda: self._create(counters.step))
        link_moments(self._engine)
        state = {**_state(self._engine, counters, evaluation, ephemeral), "stores": self._stores}
        if self._config.asynchronous:
            if self._room:
                self._room.result()
            copies = {file.name: self._copy(file) for file in self._files.plan}
            self._wait_for_device()
            written = self._thread.submit(self._files.write, temporary, lambda file: copies[file.name])
            self._pending = _Pending(temporary, state, written)
            return
        written = Future()
        written.set_result(self._files.write(temporary, self._borrow))
        self._pending = _Pending(temporary, state, written)
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
            return self._disk.retrying(lambda: create_temporary(self._folder, step))
        except OSError as error:
            raise CheckpointError(self._disk.explain(error)) from None

    def close(self) -> None:
        """End the thread when it is done with what it was given, and leave the ranks' group."""
        self._thread.shutdown()
        self._files.close()

    def _gather(self, pending: _Pending) -> list[FileEntry]:
        """What the manifest says of all ranks' files."""
        try:
            return gather_lists(*pending.written.result())
        except CheckpointError:
            self._files.renew()
            if self._engine.mesh.rank == 0:
                shutil.rmtree(pending.temporary, ignore_errors=True)
            raise

    def _fragments(self, file: PlannedFile) -> Fragments:
        parameters = dict(self._engine.parameters())
        return {name: get_fragment(self._engine, parameters[name], file.kind)[1] for name in file.names}

    def _copy(self, file: PlannedFile) -> Fragments:
        """This rank's fragments of a file in host memory of their own; a GPU's are there after `_wait_for_device`."""
        fragments = self._fragments(file)
        sizes = [len(fragment) for fragment in fragments.values()]
        if file.name not in self._copies:
            self._copies[file.name] = self._empty(sum(sizes))
        copies = dict(zip(fragments, self._copies[file.name].split(sizes), strict=True))
        for name, fragment in fragments.items():
            copies[name].copy_(fragment, non_blocking=True)
        return copies

    def _make_room(self) -> None:
        """Memory for `_copy`, which the system gives when it is written to; moments lie as their weights do."""
        parameters = dict(self._engine.parameters())
        for file in self._files.plan:
            sizes = [len(get_fragment(self._engine, parameters[name], "weight")[1]) for name in file.names]
            self._copies[file.name] = self._empty(sum(sizes)).zero_()

    def _empty(self, size: int) -> torch.Tensor:
        return torch.empty(size, pin_memory=self._engine.mesh.device.type == "cuda")

    def _borrow(self, file: PlannedFile) -> Fragments:
        """This rank's fragments of a file on the host, which stay as they are while no step is taken."""
        fragments = self._fragments(file)
        if all(fragment.device.type == "cpu" and fragment.dtype == torch.float32 for fragment in fragments.values()):
            return fragments
        copies = self._copy(file)
        self._wait_for_device()
        del self._copies[file.name]
        return copies

    def _wait_for_device(self) -> None:
        if self._engine.mesh.device.type == "cuda":
            torch.cuda.current_stream().synchronize()

    def _commit(self, pending: _Pending, entries: list[FileEntry]) -> Path:
        """In rank 0's thread."""
        try:
            entries = sorted(entries, key=lambda entry: entry.name)
            final = self._disk.retrying(lambda: commit(pending.temporary, Manifest(**pending.state, files=entries)))
        except OSError as error:
            problem = self._disk.explain(error)
            shutil.rmtree(pending.temporary, ignore_errors=True)
            raise CheckpointError(problem) from None
        failpoint("after commit")
        prune(self._folder, self._config)
        return final


def checkpoint_bytes(engine: Engine) -> int:
    """How much disk a checkpoint takes, but for a few kB."""
    shapes = [parameter.shard.shape for _, parameter in engine.parameters()]  # type: ignore[attr-defined]
    return len(KINDS) * sum(4 * math.prod(shape) for shape in shapes)


def _state(engine: Engine, counters: Counters, evaluation: dict[str, float], ephemeral: bool) -> dict[str, Any]:
    """The manifest's values but for the files and the stores."""
    return {
        **vars(counters),
        "optimizer_step": optimizer_step(engine),
        "loss_scaler": get_loss_scaler(engine),
        "seed": engine.config.seed,
        "config": config_values(engine.config),
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
