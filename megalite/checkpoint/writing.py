"""The files of a save: every rank sends its fragments to those that write, and each of these writes its share of files.

While a rank digests, writes, syncs and reads back one file it receives the next.
"""

import itertools
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch

from megalite.checkpoint.disk import Disk
from megalite.checkpoint.fragments import Exchange, Fragments, Places
from megalite.checkpoint_format import KINDS, FileEntry, verify_file
from megalite.data.files import naming
from megalite.engine import Engine
from megalite.errors import CheckpointError
from megalite.failpoints import failpoint
from megalite.tensor_file import TensorFileWriter

FILE_BYTES = 512 << 20  # a file is closed when the next tensor would take it above this

T = TypeVar("T")


@dataclass(frozen=True)
class PlannedFile:
    """One to write: what it holds, and whose it is."""

    name: str
    kind: str
    names: tuple[str, ...]  # of tensors
    writer: int


class FileWriter:
    """Makes files of what all ranks hold."""

    def __init__(self, engine: Engine, disk: Disk, writers: Sequence[int]):
        """`writers`: the ranks among which files are spread; they see one directory. Collective."""
        self.plan = list(_plan(engine, writers))  # the same on every rank
        self._rank, self._round, self._disk = engine.mesh.rank, len(writers), disk
        self._exchange = Exchange(engine)

    def renew(self) -> None:
        """Collective: after a `write` that some rank broke off."""
        self._exchange.renew()

    def close(self) -> None:
        """Leave the ranks' group."""
        self._exchange.close()

    def write(self, folder: Path, own: Callable[[PlannedFile], Fragments]) -> tuple[list[FileEntry], str | None]:
        """Send fragments to those that write, write this rank's files; what the manifest says of them, what went wrong.

        `own`: this rank's fragments of a file. All ranks do this at once. One that cannot write still sends, and still
        takes what is sent: others wait for it.
        """
        problems: list[str] = []
        files: list[Future[FileEntry]] = []

        def tried(work: Callable[[], T]) -> T | None:
            try:
                return work()
            except Exception as error:
                problems.append(self._disk.explain(error))
                return None

        def write_all(thread: ThreadPoolExecutor) -> None:
            for first in range(0, len(self.plan), self._round):
                for file, places in self._exchange_files(self.plan[first : first + self._round], own, tried):
                    if files:
                        files[-1].exception()  # waits
                    files.append(thread.submit(self._write, folder, file, places))

        with ThreadPoolExecutor(1, "write") as thread:
            tried(partial(write_all, thread))
        entries = [entry for file in files if (entry := tried(file.result))]
        return entries, problems[0] if problems else None

    def _exchange_files(
        self,
        files: list[PlannedFile],
        own: Callable[[PlannedFile], Fragments],
        tried: Callable[[Callable[[], Any]], Any],
    ) -> Iterator[tuple[PlannedFile, Places]]:
        """Send this rank's fragments of `files`, each of another writer, and receive the one that it writes, if any."""
        fragments = {file.writer: tried(partial(own, file)) for file in files}
        sent = []
        for file in files:
            if file.writer != self._rank:
                sent += self._exchange.send(file.names, fragments[file.writer], file.writer)
        for file in files:
            if file.writer == self._rank:
                mine = fragments[self._rank]
                places = None if mine is None else tried(partial(self._exchange.make_room, file.names, mine))
                self._exchange.receive(file.names, places)
                if places is not None:
                    yield file, places
        for message in sent:
            message.wait()

    def _write(self, folder: Path, file: PlannedFile, places: Places) -> FileEntry:
        """In a thread: one file, and what the manifest says of it."""
        tensors = {name: self._exchange.whole(name, places.pop(name)) for name in file.names}
        bad = [name for name, tensor in tensors.items() if not torch.stack(tensor.aminmax()).isfinite().all()]
        if bad:
            raise CheckpointError(
                f"not saved: {file.kind} of {', '.join(bad[:3])} of {len(bad)} tensors holds inf or nan"
            )
        failpoint("before file")
        entry = self._disk.retrying(lambda: _write_tensors(folder, file.name, file.kind, tensors))
        self._disk.retrying(lambda: verify_file(folder, entry))  # before any older checkpoint is removed for it
        failpoint("after file")
        return entry


def _plan(engine: Engine, writers: Sequence[int]) -> Iterator[PlannedFile]:
    """The files to write, spread over `writers`; as many in a row as there are of these are each of another one."""
    numbers = itertools.count()

    def file(kind: str, names: list[str]) -> PlannedFile:
        number = next(numbers)
        return PlannedFile(f"{kind}-{number:05d}.safetensors", kind, tuple(names), writers[number % len(writers)])

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
