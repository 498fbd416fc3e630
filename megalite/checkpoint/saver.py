"""Saving: every rank sends its fragments to those that write, files are spread over all ranks, rank 0 commits.

While a rank digests, writes, syncs and reads back one file it receives the next. Asynchronously all of that is done by
a thread, from copies of the fragments in host memory, which are all that training waits for; the steps' own collectives
tell when no rank has anything to wait for. Then rank 0 commits.
"""

import itertools
import math
import shutil
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch

import megalite
from megalite.checkpoint.agreement import gather_lists, on_rank_0
from megalite.checkpoint.counters import Counters
from megalite.checkpoint.engine_state import get_fragment, get_loss_scaler, link_moments, optimizer_step
from megalite.checkpoint.fragments import Exchange, Fragments, Places
from megalite.checkpoint_folder import commit, create_temporary, prune
from megalite.checkpoint_format import KINDS, FileEntry, Manifest, verify_file
from megalite.config.compose import config_values
from megalite.data.files import naming
from megalite.data.format import TokenStore
from megalite.engine import Engine
from megalite.errors import CheckpointError
from megalite.failpoints import failpoint
from megalite.log import get_logger
from megalite.tensor_file import TensorFileWriter

FILE_BYTES = 512 << 20  # a file is closed when the next tensor would take it above this
RETRY_SECONDS = (1.0, 5.0, 25.0)  # between the tries of checkpoint.on_save_error=retry

log = get_logger(__name__)
T = TypeVar("T")


@dataclass(frozen=True)
class _File:
    """One to write: what it holds, and whose it is."""

    name: str
    kind: str
    names: tuple[str, ...]  # of tensors
    writer: int


@dataclass
class _Pending:
    """A checkpoint on its way: first all ranks' files are written, then rank 0 commits it."""

    temporary: Path
    state: dict[str, Any]  # of the manifest, without the files
    written: Future[tuple[list[FileEntry], str | None]]  # this rank's, and what went wrong
    committed: Future[Path] | None = None


class Saver:
    """Writes the checkpoints of one run. What says "collective" is called by all ranks at the same step."""

    def __init__(self, engine: Engine, run_dir: Path):
        """For the run in `run_dir`, whose `checkpoint` settings say how. Collective."""
        self._engine, self._folder = engine, run_dir / "checkpoints"
        self._config = engine.config.checkpoint
        self._num_bytes = checkpoint_bytes(engine)
        self._plan = list(_plan(engine))
        self._exchange = Exchange(engine)
        self._copies: dict[str, torch.Tensor] = {}  # file -> this rank's fragments of it, of the last save
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
        return not (self._pending.committed or self._pending.written).done()

    def save(self, counters: Counters, evaluation: dict[str, float], ephemeral: bool = False) -> None:
        """Save what the engine holds as step `counters.step`; nothing may be pending. Collective.

        Memory on a rank: two files (`FILE_BYTES`, or one larger tensor); besides, asynchronously, its share of all,
        which it keeps for the next save, since fresh memory takes as long as eight copies; on a GPU at once, its share
        of as many files as there are ranks. Raises as `finish` does.
        """
        assert self._pending is None, "call finish first: it tells what became of the save before"
        temporary = on_rank_0("write", lambda: self._create(counters.step))
        link_moments(self._engine)
        state = _state(self._engine, counters, evaluation, ephemeral)
        if self._config.asynchronous:
            copies = {file.name: self._copy(file) for file in self._plan}
            self._wait_for_device()
            written = self._thread.submit(self._collect, temporary, lambda file: copies[file.name])
            self._pending = _Pending(temporary, state, written)
            return
        written = Future()
        written.set_result(self._collect(temporary, self._borrow))
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

    def _explain(self, error: Exception) -> str:
        """What to tell other ranks of it."""
        if isinstance(error, CheckpointError):
            return str(error)
        if not isinstance(error, OSError):
            log.error("this rank could not do its part of a save", exc_info=error)
            return f"rank {self._engine.mesh.rank} could not do its part of a save: {error!r}"
        try:
            free = f"{shutil.disk_usage(self._folder.parent).free:,}"
        except OSError:
            free = "an unknown number"
        return (
            f"rank {self._engine.mesh.rank} could not write a checkpoint: {error}. It takes {self._num_bytes:,} bytes, "
            f"the disk has {free} free"
        )

    def close(self) -> None:
        """End the thread when it is done with what it was given, and leave the ranks' group."""
        self._thread.shutdown()
        self._exchange.close()

    def _gather(self, pending: _Pending) -> list[FileEntry]:
        """What the manifest says of all ranks' files."""
        try:
            return gather_lists(*pending.written.result())
        except CheckpointError:
            self._exchange.renew()
            if self._engine.mesh.rank == 0:
                shutil.rmtree(pending.temporary, ignore_errors=True)
            raise

    def _fragments(self, file: _File) -> Fragments:
        parameters = dict(self._engine.parameters())
        return {name: get_fragment(self._engine, parameters[name], file.kind)[1] for name in file.names}

    def _copy(self, file: _File) -> Fragments:
        """This rank's fragments of a file in host memory of their own; a GPU's are there after `_wait_for_device`."""
        fragments = self._fragments(file)
        sizes = [len(fragment) for fragment in fragments.values()]
        if file.name not in self._copies:
            self._copies[file.name] = torch.empty(sum(sizes), pin_memory=self._engine.mesh.device.type == "cuda")
        copies = dict(zip(fragments, self._copies[file.name].split(sizes), strict=True))
        for name, fragment in fragments.items():
            copies[name].copy_(fragment, non_blocking=True)
        return copies

    def _borrow(self, file: _File) -> Fragments:
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

    def _collect(self, temporary: Path, own: Callable[[_File], Fragments]) -> tuple[list[FileEntry], str | None]:
        """Send fragments to those that write, write this rank's files; what the manifest says of them, what went wrong.

        All ranks do this at once. One that cannot write still sends, and still takes what is sent: others wait for it.
        """
        problems: list[str] = []

        def tried(work: Callable[[], T]) -> T | None:
            try:
                return work()
            except Exception as error:
                problems.append(self._explain(error))
                return None

        world_size, files = self._engine.mesh.world_size, list[Future[FileEntry]]()

        def write_all(thread: ThreadPoolExecutor) -> None:
            for first in range(0, len(self._plan), world_size):
                for file, places in self._exchange_files(self._plan[first : first + world_size], own, tried):
                    if files:
                        files[-1].exception()  # waits
                    files.append(thread.submit(self._write, temporary, file, places))

        with ThreadPoolExecutor(1, "write") as thread:
            tried(partial(write_all, thread))
        entries = [entry for file in files if (entry := tried(file.result))]
        return entries, problems[0] if problems else None

    def _exchange_files(
        self, files: list[_File], own: Callable[[_File], Fragments], tried: Callable[[Callable[[], Any]], Any]
    ) -> Iterator[tuple[_File, Places]]:
        """Send this rank's fragments of `files`, each of another writer, and receive the one that it writes, if any."""
        fragments = {file.writer: tried(partial(own, file)) for file in files}
        rank, sent = self._engine.mesh.rank, []
        for file in files:
            if file.writer != rank:
                sent += self._exchange.send(file.names, fragments[file.writer], file.writer)
        for file in files:
            if file.writer == rank:
                mine = fragments[rank]
                places = None if mine is None else tried(partial(self._exchange.make_room, file.names, mine))
                self._exchange.receive(file.names, places)
                if places is not None:
                    yield file, places
        for message in sent:
            message.wait()

    def _write(self, folder: Path, file: _File, places: Places) -> FileEntry:
        """In a thread: one file, and what the manifest says of it."""
        tensors = {name: self._exchange.whole(name, places.pop(name)) for name in file.names}
        bad = [name for name, tensor in tensors.items() if not torch.stack(tensor.aminmax()).isfinite().all()]
        if bad:
            raise CheckpointError(
                f"not saved: {file.kind} of {', '.join(bad[:3])} of {len(bad)} tensors holds inf or nan"
            )
        failpoint("before file")
        entry = self._retrying(lambda: _write_tensors(folder, file.name, file.kind, tensors))
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


def _plan(engine: Engine) -> Iterator[_File]:
    """The files to write, the same on every rank."""
    numbers = itertools.count()

    def file(kind: str, names: list[str]) -> _File:
        number = next(numbers)
        return _File(f"{kind}-{number:05d}.safetensors", kind, tuple(names), number % engine.mesh.world_size)

    for kind in KINDS:
        names: list[str] = []
        size = 0
        for name, parameter in engine.parameters():
            num_bytes = 4 * torch.Size(parameter.shard.shape).numel()  # type: ignore[attr-defined]
            if names and size + num_bytes > FILE_BYTES:
                yield file(kind, names)
                names, size = [], 0
            names.append(name)
            size += num_bytes
        yield file(kind, names)


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
