"""The .idx and .bin of Megatron-LM, read with every number checked before it is believed.

`<prefix>.bin` holds token ids side by side. `<prefix>.idx` cuts them into sequences and sequences into documents. Both
kinds of index that Megatron-LM has written are little endian (from its megatron/core/datasets/indexed_dataset.py, and
megatron/data/indexed_dataset.py before 2023):

    MMIDIDX: 9 bytes b"MMIDIDX\\0\\0", u64 version 1, u8 type code, u64 S sequences, u64 D + 1, i32 [S] tokens of each
        sequence, i64 [S] the byte in .bin where each starts, i64 [D + 1] the sequence where each document starts, then
        the end; in multimodal sets i8 [S] modes follow.
    TNTIDX: 8 bytes b"TNTIDX\\0\\0", u64 version 1, u64 type code, u64 bytes of an id, u64 S, u64 number of sizes,
        u64 D + 1, i64 [S + 1] the size where each sequence's sizes start, i64 [S + 1] the id in .bin where each starts,
        i64 [sizes], i64 [D + 1] as above. Sequences of one dimension have one size.
"""

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from megalite.errors import DataError

MAGIC: Final = b"MMIDIDX\x00\x00"
LEGACY_MAGIC: Final = b"TNTIDX\x00\x00"
VERSION: Final = 1
# Codes 6 and 7 are floating point: no token ids.
DTYPES: Final[dict[int, np.dtype[Any]]] = {
    1: np.dtype("u1"),
    2: np.dtype("i1"),
    3: np.dtype("<i2"),
    4: np.dtype("<i4"),
    5: np.dtype("<i8"),
    8: np.dtype("<u2"),
}
_BLOCK = 1 << 18  # sequences checked at a time


@dataclass(frozen=True)
class MegatronIndex:
    """A checked index: its sequences lie side by side in .bin, from its first byte to its last."""

    prefix: Path
    format: str  # MMIDIDX or TNTIDX
    dtype: np.dtype[Any]
    lengths: NDArray[Any]  # [sequences] tokens of each
    documents: NDArray[np.int64]  # [documents + 1] the first sequence of each, then the number of sequences
    num_tokens: int

    @property
    def num_documents(self) -> int:
        """Documents, empty ones included."""
        return len(self.documents) - 1

    def tokens(self) -> NDArray[Any]:
        """The ids [num_tokens], mapped."""
        if not self.num_tokens:
            return np.empty(0, self.dtype)
        return np.memmap(bin_path(self.prefix), self.dtype, "r", shape=(self.num_tokens,))


def idx_path(prefix: Path) -> Path:
    """The index of the dataset `prefix`."""
    return prefix.with_name(prefix.name + ".idx")


def bin_path(prefix: Path) -> Path:
    """The ids of the dataset `prefix`."""
    return prefix.with_name(prefix.name + ".bin")


def read_index(path: str | Path) -> MegatronIndex:
    """Read and check the index of a dataset, named by its .idx, its .bin or the prefix of both.

    Raises `DataError` that names the file for one that is missing or cut short, another version, byte order, type of
    numbers or kind of data, and for sequences and documents that do not fit each other or the ids.
    """
    prefix = _prefix(Path(path))
    for file in (idx_path(prefix), bin_path(prefix)):
        if not file.is_file():
            raise DataError(f"{file} is missing: a dataset of Megatron is an .idx and a .bin of the same name")
    file = idx_path(prefix)
    size = file.stat().st_size
    data = np.memmap(file, np.uint8, "r") if size else np.empty(0, np.uint8)
    start = data[: len(MAGIC)].tobytes()
    if start == MAGIC:
        index, starts = _read_current(prefix, _Fields(file, data))
    elif start.startswith(LEGACY_MAGIC):
        index, starts = _read_legacy(prefix, _Fields(file, data))
    else:
        raise DataError(f"{file} starts with {start!r}, expected {MAGIC!r} or {LEGACY_MAGIC!r}: no index of Megatron")
    _check_documents(file, index)
    _check_sequences(file, index, starts)
    return index


class _Fields:
    """Takes the fields of an index one after another, none past the end of the file."""

    def __init__(self, file: Path, data: NDArray[np.uint8]):
        self.file = file
        self.size = len(data)
        self._data = data
        self._at = 0

    def skip(self, magic: bytes) -> None:
        self._at += len(magic)

    def numbers(self, layout: str) -> tuple[int, ...]:
        size = struct.calcsize(layout)
        if self._at + size > self.size:
            raise DataError(f"{self.file} ends inside its header, after {self.size} bytes: it was cut short")
        self._at += size
        return struct.unpack(layout, self._data[self._at - size : self._at].tobytes())

    def expect_left(self, fields: list[tuple[int, int]], modes: int = 0) -> None:
        """Check that arrays of these (items, bytes of an item) end the file. `modes`: bytes of a multimodal set."""
        expected = self._at + sum(items * width for items, width in fields)
        if modes and self.size == expected + modes:
            raise DataError(f"{self.file} has a mode for each sequence: multimodal datasets are not supported")
        if self.size != expected:
            raise DataError(
                f"{self.file} has {self.size} bytes, its header's counts make {expected}: it is damaged or cut short"
            )

    def array(self, dtype: str, items: int) -> NDArray[Any]:
        array = np.frombuffer(self._data, dtype, items, self._at) if items else np.empty(0, dtype)
        self._at += array.nbytes
        return array


def _read_current(prefix: Path, fields: _Fields) -> tuple[MegatronIndex, NDArray[np.int64]]:
    """The index and the byte where each sequence starts."""
    fields.skip(MAGIC)
    _check_version(fields)
    (code,) = fields.numbers("<B")
    dtype = _dtype(fields.file, code)
    sequences, documents = fields.numbers("<QQ")
    fields.expect_left([(sequences, 4), (sequences, 8), (documents, 8)], modes=sequences)
    lengths, starts = fields.array("<i4", sequences), fields.array("<i8", sequences)
    index = MegatronIndex(prefix, "MMIDIDX", dtype, lengths, fields.array("<i8", documents), _num_tokens(prefix, dtype))
    return index, starts


def _read_legacy(prefix: Path, fields: _Fields) -> tuple[MegatronIndex, NDArray[np.int64]]:
    """The same of the older kind. Where sequences start is counted in ids there."""
    fields.skip(LEGACY_MAGIC)
    _check_version(fields)
    code, itemsize, sequences, sizes, documents = fields.numbers("<QQQQQ")
    dtype = _dtype(fields.file, code)
    if itemsize != dtype.itemsize:
        raise DataError(f"{fields.file}: ids of {itemsize} bytes, but type code {code} has {dtype.itemsize}")
    if sizes != sequences:
        raise DataError(f"{fields.file}: {sizes} sizes for {sequences} sequences: these are no sequences of tokens")
    fields.expect_left([(sequences + 1, 8), (sequences + 1, 8), (sizes, 8), (documents, 8)])
    first_sizes, starts = fields.array("<i8", sequences + 1), fields.array("<i8", sequences + 1)
    for start in range(0, sequences + 1, _BLOCK):
        part = first_sizes[start : start + _BLOCK]
        if np.any(part != np.arange(start, start + len(part))):
            raise DataError(f"{fields.file}: a sequence has not one size: these are no sequences of tokens")
    lengths = fields.array("<i8", sizes)
    index = MegatronIndex(prefix, "TNTIDX", dtype, lengths, fields.array("<i8", documents), _num_tokens(prefix, dtype))
    if len(starts) and starts[-1] != index.num_tokens:
        raise DataError(f"{fields.file}: ids end at {starts[-1]}, {bin_path(prefix)} holds {index.num_tokens}")
    return index, starts[:-1]


def _check_version(fields: _Fields) -> None:
    (version,) = fields.numbers("<Q")
    if version != VERSION:
        hint = "written big endian" if version == VERSION << 56 else f"version {version}"
        raise DataError(f"{fields.file} is {hint}, this program reads little endian version {VERSION}")


def _dtype(file: Path, code: int) -> np.dtype[Any]:
    if code in (6, 7):
        raise DataError(f"{file}: type code {code} is floating point: these are no token ids")
    if code not in DTYPES:
        raise DataError(f"{file}: type code {code}, known: {', '.join(map(str, DTYPES))}")
    return DTYPES[code]


def _num_tokens(prefix: Path, dtype: np.dtype[Any]) -> int:
    size = bin_path(prefix).stat().st_size
    if size % dtype.itemsize:
        raise DataError(f"{bin_path(prefix)} has {size} bytes, no multiple of an id's {dtype.itemsize}: cut short?")
    return size // dtype.itemsize


def _check_documents(file: Path, index: MegatronIndex) -> None:
    documents, sequences = index.documents, len(index.lengths)
    if not len(documents) or documents[0] != 0 or documents[-1] != sequences:
        found = f"{documents[0]} to {documents[-1]}" if len(documents) else "nothing"
        raise DataError(
            f"{file}: documents span the sequences {found}, the header counts {sequences} sequences: expected "
            f"0 to {sequences}"
        )
    for start in range(0, len(documents), _BLOCK):
        part = documents[start : start + _BLOCK + 1]
        if np.any(part[1:] < part[:-1]):
            at = start + int(np.argmax(part[1:] < part[:-1])) + 1
            raise DataError(f"{file}: document {at} starts at sequence {documents[at]}, before the one before it")


def _check_sequences(file: Path, index: MegatronIndex, starts: NDArray[np.int64]) -> None:
    """Each sequence starts where the one before it ends, and the last ends with the file."""
    unit = 1 if index.format == "TNTIDX" else index.dtype.itemsize
    end = 0  # of the sequence before, in units
    limit = index.num_tokens * unit
    for first in range(0, len(starts), _BLOCK):
        lengths = index.lengths[first : first + _BLOCK].astype(np.int64)
        if np.any((lengths < 0) | (lengths > index.num_tokens)):
            at = int(np.argmax((lengths < 0) | (lengths > index.num_tokens)))
            raise DataError(
                f"{file}: sequence {first + at} has {lengths[at]} tokens, {bin_path(index.prefix)} holds "
                f"{index.num_tokens}"
            )

        ends = end + np.cumsum(lengths * unit)
        expected = np.concatenate([[end], ends[:-1]])
        found = starts[first : first + _BLOCK]
        if np.any(found != expected):
            at = int(np.argmax(found != expected))
            raise DataError(f"{file}: {_misplaced(first + at, int(found[at]), int(expected[at]), limit, index)}")
        if np.any(past := (ends > limit) | (ends < 0)):
            raise DataError(
                f"{file}: sequence {first + int(np.argmax(past))} ends past the end of {bin_path(index.prefix)}, which "
                f"holds {index.num_tokens} ids: is it cut short, or another dataset's?"
            )
        end = int(ends[-1])
    if end != limit:
        raise DataError(
            f"{bin_path(index.prefix)} holds {index.num_tokens} ids, {file} names {end // unit}: is it another "
            "dataset's?"
        )


def _misplaced(sequence: int, found: int, expected: int, limit: int, index: MegatronIndex) -> str:
    unit = "id" if index.format == "TNTIDX" else "byte"
    if found < 0:
        return f"sequence {sequence} starts at {unit} {found}, which is negative"
    if found > limit:
        return f"sequence {sequence} starts at {unit} {found}, past the end of {bin_path(index.prefix)} at {limit}"
    how = "inside the one before it, which ends at" if found < expected else "after a gap, as the one before it ends at"
    return f"sequence {sequence} starts at {unit} {found}, {how} {expected}"


def _prefix(path: Path) -> Path:
    return path.with_suffix("") if path.suffix in (".idx", ".bin") else path


def iter_document_lengths(index: MegatronIndex, documents: int = 1 << 16) -> Iterator[tuple[int, NDArray[np.int64]]]:
    """Tokens of each document, for so many documents at a time: the number of the first, and [documents] int64."""
    for first in range(0, index.num_documents, documents):
        bounds = index.documents[first : first + documents + 1]
        lengths = index.lengths[bounds[0] : bounds[-1]].astype(np.int64)
        ends = np.concatenate([[0], np.cumsum(lengths)])
        yield first, np.diff(ends[bounds - bounds[0]])
