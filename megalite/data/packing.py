"""Packings: the documents of a store laid out in rows of S tokens, computed once and kept beside the store.

`documents`: every document begins a row of its own, padded at its end. `best_fit`: whole documents share rows, laid out
by best-fit decreasing (Ding et al. 2024, "Fewer Truncations Improve Language Modeling"). In both, a document longer
than S tokens is cut into pieces of S tokens and a rest, and no other is cut at all.

A packing of the store `books` for S = 2048 is the directory `books.packing/best_fit-2048`; the store stays as it is:

    packing.json   the counts, the store's digest, and the size and xxh3_128 digest of the other files
    starts.bin     uint64 [pieces]: where each piece starts in the store's stream of tokens; row after row
    lengths.bin    uint32 [pieces]: its tokens
    rows.bin       uint64 [rows + 1]: the first piece of each row; then the number of pieces
"""

import dataclasses
import json
from collections import defaultdict, deque
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from megalite.config.loader import load_config
from megalite.config.schema import Packing
from megalite.data.files import digest_file, new_directory, write_synced
from megalite.data.format import TokenStore
from megalite.data.manifest import FileRecord
from megalite.data.mapped import MappedFile
from megalite.errors import ConfigError, DataError

FORMAT_VERSION = 1
MANIFEST = "packing.json"
_DTYPES: Final[dict[str, np.dtype[Any]]] = {
    "starts.bin": np.dtype("<u8"),
    "lengths.bin": np.dtype("<u4"),
    "rows.bin": np.dtype("<u8"),
}

_I64 = NDArray[np.int64]


@dataclass(frozen=True, kw_only=True)
class PackingManifest:
    """The content of packing.json."""

    format_version: int
    packing: Packing
    sequence_length: int
    store: str  # the digest of the store that the rows are made of
    num_tokens: int
    num_pieces: int
    num_rows: int
    files: tuple[FileRecord, ...]  # in the order of `_DTYPES`

    @property
    def fill(self) -> float:
        """The share of the rows' positions that hold tokens; the rest is padding."""
        return self.num_tokens / max(self.num_rows * self.sequence_length, 1)


class PackedRows:
    """A packing opened for reading; its files are mapped."""

    def __init__(self, path: Path, manifest: PackingManifest):
        """Use `PackedRows.open`. Raises `DataError` for a file that is missing or of another size."""
        self.path, self.manifest = path, manifest
        self._files = [MappedFile(path / record.file, record.bytes, _DTYPES[record.file]) for record in manifest.files]

    @classmethod
    def open(cls, store: TokenStore, packing: Packing, sequence_length: int) -> "PackedRows":
        """The packing of `store`; raises `DataError` when there is none, or one of another content of the store."""
        path = packing_path(store.path, packing, sequence_length)
        again = f"`megalite data pack store={store.path} packing={packing} sequence_length={sequence_length}`"
        try:
            values = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
            if not isinstance(values, dict) or values.get("format_version") != FORMAT_VERSION:
                raise DataError(f"{path / MANIFEST} is of another format version than {FORMAT_VERSION}: {again} anew")
            manifest = load_config(PackingManifest, values)
        except (FileNotFoundError, NotADirectoryError):
            raise DataError(f"data.packing={packing}: {store.path} is not packed yet; {again} does it") from None
        except (ValueError, RecursionError, ConfigError) as error:
            raise DataError(f"{path / MANIFEST} is damaged: {error}; remove {path}, then {again}") from None
        if manifest.store != store.digest:
            raise DataError(f"{path} was made of another content of {store.path}; {again} overwrite=true makes it anew")
        sizes = (manifest.num_pieces, manifest.num_pieces, manifest.num_rows + 1)
        expected = [(name, size * dtype.itemsize) for (name, dtype), size in zip(_DTYPES.items(), sizes, strict=True)]
        if [(record.file, record.bytes) for record in manifest.files] != expected:
            raise DataError(f"{path / MANIFEST} is damaged: its files do not match its counts; remove {path}, {again}")
        return cls(path, manifest)

    @property
    def num_rows(self) -> int:
        """Rows of S positions."""
        return self.manifest.num_rows

    def pieces(self, row: int) -> list[tuple[int, int]]:
        """What a row is made of, in order: (first token, number of tokens) in the store's stream."""
        for file in self._files:
            file.check()
        starts, lengths, rows = (file.values for file in self._files)
        first, last = int(rows[row]), int(rows[row + 1])
        return list(zip(starts[first:last].tolist(), lengths[first:last].tolist(), strict=True))

    def rows_of(self, start: int, stop: int) -> _I64:
        """The rows that hold tokens of `start` .. `stop` of the stream; looks at every piece."""
        starts, lengths, rows = (file.values.astype(np.int64) for file in self._files)
        pieces = np.flatnonzero((starts < stop) & (starts + lengths > start))
        return np.unique(np.searchsorted(rows, pieces, side="right") - 1)


def packing_path(store: Path, packing: Packing, sequence_length: int) -> Path:
    """Where a store's packing lies."""
    return store.with_name(f"{store.name}.packing") / f"{packing}-{sequence_length}"


def write_packing(store: TokenStore, packing: Packing, sequence_length: int, overwrite: bool = False) -> PackedRows:
    """Compute and write a packing; about 40 bytes of memory for each document.

    Raises `ConfigError` for a length below 1 and for `stream`, which needs none; `DataError` when it exists already
    and `overwrite` is false, and for a store without documents.
    """
    if packing == "stream" or sequence_length < 1:
        raise ConfigError(f"packing={packing}, sequence_length={sequence_length}: found nothing to pack")
    if not store.num_documents:
        raise DataError(f"{store.path} holds no documents to pack")
    starts, lengths = cut_documents(store.offsets_of_documents(0, store.num_documents), sequence_length)
    rows = np.arange(len(starts) + 1)
    if packing == "best_fit":
        order, rows = best_fit(lengths, sequence_length)
        starts, lengths = starts[order], lengths[order]
    path = packing_path(store.path, packing, sequence_length)
    with new_directory(path, MANIFEST if overwrite else None) as folder:
        records = []
        for values, (name, dtype) in zip((starts, lengths, rows), _DTYPES.items(), strict=True):
            values.astype(dtype).tofile(folder / name)
            size = (folder / name).stat().st_size
            records.append(FileRecord(file=name, bytes=size, digest=digest_file(folder / name)))
        manifest = PackingManifest(
            format_version=FORMAT_VERSION, packing=packing, sequence_length=sequence_length, store=store.digest,
            num_tokens=int(lengths.sum()), num_pieces=len(starts), num_rows=len(rows) - 1, files=tuple(records),
        )  # fmt: skip
        write_synced(folder / MANIFEST, json.dumps(dataclasses.asdict(manifest), indent=2) + "\n")
    return PackedRows(path, manifest)


def cut_documents(offsets: _I64, length: int) -> tuple[_I64, _I64]:
    """Pieces of at most `length` tokens: where they start, and their tokens, in the documents' order.

    `offsets` [documents + 1]: where each document starts in the stream, and the end.
    """
    documents = np.diff(offsets)
    pieces = -(-documents // length)
    number = np.arange(pieces.sum()) - np.repeat(np.cumsum(pieces) - pieces, pieces)  # of a piece in its document
    starts = np.repeat(offsets[:-1], pieces) + number * length
    return starts, np.minimum(np.repeat(offsets[1:], pieces) - starts, length)


def best_fit(lengths: _I64, capacity: int) -> tuple[_I64, _I64]:
    """Best-fit decreasing: from the longest piece down, each goes to the row with the least room that it fits in.

    `lengths` [n]: 1 .. `capacity`. Returns the pieces in the order of the rows [n], and the first of each row and the
    end [rows + 1]. Ties go to the earlier piece and to the row that came to its room first. Rows are kept by the room
    left in them, and pieces of one length are placed together: a row that takes one takes as many as it has room for,
    since with each it becomes the fullest that the next one fits in.
    """
    order = np.argsort(-lengths, kind="stable")
    row_of = np.empty(len(lengths), np.int64)  # of the pieces in `order`
    by_room: defaultdict[int, deque[_I64]] = defaultdict(deque)
    rooms = 0  # bit r: there are rows with room for r tokens more
    num_rows = done = 0
    sizes, counts = np.unique(lengths, return_counts=True)
    for size, count in zip(sizes[::-1].tolist(), counts[::-1].tolist(), strict=True):
        while count:
            fitting = rooms >> size
            room = size + (fitting & -fitting).bit_length() - 1 if fitting else capacity
            each = room // size
            wanted = -(-count // each)
            if fitting:
                rows = by_room[room].popleft()
                if len(rows) > wanted:
                    by_room[room].appendleft(rows[wanted:])
                    rows = rows[:wanted]
                elif not by_room[room]:
                    rooms ^= 1 << room
            else:
                rows = np.arange(num_rows, num_rows + wanted)
                num_rows += wanted
            placed = min(count, len(rows) * each)
            row_of[done : done + placed] = np.repeat(rows, each)[:placed]
            full, some = divmod(placed, each)
            for left, those in ((room - each * size, rows[:full]), (room - some * size, rows[full : full + 1])):
                if left and len(those):
                    by_room[left].append(those)
                    rooms |= 1 << left
            done, count = done + placed, count - placed
    by_row = np.argsort(row_of, kind="stable")
    return order[by_row], np.concatenate([[0], np.cumsum(np.bincount(row_of))])
