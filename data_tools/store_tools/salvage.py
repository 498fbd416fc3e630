"""What can still be read of a damaged token store."""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megalite.data.files import digest_file
from megalite.data.manifest import DTYPES, OFFSET_DTYPE, FileRecord, ShardRecord, read_manifest

from .documents import BLOCK_TOKENS, iter_ranges


@dataclass(frozen=True)
class Salvaged:
    """Documents side by side, as `documents.Documents`; `verified`: their shard has the digest that it was given."""

    tokens: NDArray[Any]
    lengths: NDArray[np.int64]
    num_bytes: NDArray[np.uint64] | None  # None: not known any more
    verified: bool


class DamagedStore:
    """A store whose manifest can be read and whose other files are believed one by one.

    `problems`: file -> what is wrong with it. Documents are found by their offsets or, where these are damaged, by
    their end-of-document tokens, which tokenizers never produce inside a document.
    """

    def __init__(self, path: Path):
        """Read every file and compare its digest. Raises `DataError` when the manifest cannot be read."""
        self.path = path
        self.manifest = read_manifest(path)
        self._dtype = DTYPES[self.manifest.dtype]
        found = ((record.file, _problem(path / record.file, record)) for record in self.manifest.files)
        self.problems: dict[str, str] = {file: problem for file, problem in found if problem}
        for shard in self.manifest.shards:
            self._doubt(shard.document_offsets, self._wrong_offsets(shard))
        self._doubt_byte_counts()

    @property
    def tokenizer_whole(self) -> bool:
        """Whether every file of the tokenizer is; a store without one counts as whole."""
        record = self.manifest.tokenizer
        return record is None or not any(file.file in self.problems for file in record.files)

    def documents(self, keep_unverified: bool) -> Iterator[Salvaged]:
        """The complete documents of whole shards and, with `keep_unverified`, of damaged ones.

        A document is complete when it ends with an end-of-document token, its ids are inside the vocabulary and, in a
        damaged shard, no other token ends a document in it. What becomes of shards is added to `problems`.
        """
        for shard in self.manifest.shards:
            record = shard.tokens
            verified = record.file not in self.problems
            if not verified and not (keep_unverified and _is_readable(self.path / record.file)):
                continue
            tokens = _map(self.path / record.file, self._dtype, record.bytes)
            by_ends = shard.document_offsets.file in self.problems
            if by_ends and verified and (found := self._count_ends(tokens)) != shard.num_documents:
                self.problems[record.file] = (
                    f"holds {found} end-of-document tokens for {shard.num_documents} documents, whose offsets cannot "
                    "be rebuilt"
                )
                continue
            num_bytes = None
            if shard.document_bytes.file not in self.problems and (verified or not by_ends):
                num_bytes = _map(self.path / shard.document_bytes.file, OFFSET_DTYPE, shard.document_bytes.bytes)
            first = 0
            for part, lengths in self._cut(shard, tokens):
                counts = None if num_bytes is None else np.array(num_bytes[first : first + len(lengths)])
                first += len(lengths)
                yield from self._complete(Salvaged(part, lengths, counts, verified))

    def _cut(self, shard: ShardRecord, tokens: NDArray[Any]) -> Iterator[tuple[NDArray[Any], NDArray[np.int64]]]:
        """Blocks of a shard's documents, as far as its file goes: tokens, and the length of each document."""
        record = shard.document_offsets
        if record.file in self.problems:
            yield from _cut_by_ends(tokens, self.manifest.end_of_document)
            return
        offsets = _map(self.path / record.file, OFFSET_DTYPE, record.bytes)
        last = int(np.searchsorted(offsets, np.uint64(len(tokens)), side="right")) - 1
        for start, stop in iter_ranges(offsets, 0, last):
            places = offsets[start : stop + 1].astype(np.int64)
            yield np.asarray(tokens[places[0] : places[-1]]), np.diff(places)

    def _complete(self, documents: Salvaged) -> Iterator[Salvaged]:
        """The complete ones among the documents, if there are any."""
        tokens, lengths = documents.tokens, documents.lengths
        starts = np.cumsum(lengths) - lengths
        is_end = tokens == self.manifest.end_of_document
        complete = is_end[starts + lengths - 1] & (np.maximum.reduceat(tokens, starts) < self.manifest.vocab_size)
        if not documents.verified:
            complete &= np.add.reduceat(is_end, starts, dtype=np.int64) == 1
        if complete.any():
            num_bytes = documents.num_bytes if documents.num_bytes is None else documents.num_bytes[complete]
            tokens = tokens if complete.all() else tokens[np.repeat(complete, lengths)]
            yield Salvaged(tokens, lengths[complete], num_bytes, documents.verified)

    def _count_ends(self, tokens: NDArray[Any]) -> int:
        starts = range(0, len(tokens), BLOCK_TOKENS)
        end = self.manifest.end_of_document
        return sum(int(np.count_nonzero(tokens[start : start + BLOCK_TOKENS] == end)) for start in starts)

    def _doubt(self, record: FileRecord, problem: str | None) -> None:
        if problem:
            self.problems.setdefault(record.file, problem)

    def _wrong_offsets(self, shard: ShardRecord) -> str | None:
        """Offsets start at 0, increase, and end with the tokens; what a writer did wrong, digests do not show."""
        record = shard.document_offsets
        if record.file in self.problems:
            return None
        offsets = _map(self.path / record.file, OFFSET_DTYPE, record.bytes)
        expected = shard.tokens.bytes // self._dtype.itemsize
        if offsets[0] != 0 or offsets[-1] != expected:
            return f"documents span {offsets[0]}..{offsets[-1]}, expected 0..{expected}"
        for start in range(0, len(offsets) - 1, BLOCK_TOKENS):
            block = offsets[start : start + BLOCK_TOKENS + 1]
            if np.any(block[1:] <= block[:-1]):
                return "offsets do not increase"
        return None

    def _doubt_byte_counts(self) -> None:
        """Where all counts are there and their sum is wrong, none of them is believed."""
        records = [shard.document_bytes for shard in self.manifest.shards]
        if any(record.file in self.problems for record in records):
            return
        counts = (_map(self.path / record.file, OFFSET_DTYPE, record.bytes) for record in records)
        total = sum(int(np.sum(count, dtype=np.uint64)) for count in counts)
        if total != self.manifest.num_bytes:
            for record in records:
                self._doubt(record, f"all byte counts together make {total}, expected {self.manifest.num_bytes}")


def _problem(file: Path, record: FileRecord) -> str | None:
    """What is wrong with a file: missing, of another size, changed, or on a disk that gives an error."""
    try:
        if not file.is_file():
            return "is missing"
        if (found := file.stat().st_size) != record.bytes:
            return f"has {found} bytes, expected {record.bytes}"
        if (digest := digest_file(file)) != record.digest:
            return f"has digest {digest}, expected {record.digest}"
    except OSError as error:
        return f"cannot be read: {error.strerror}"
    return None


def _is_readable(file: Path) -> bool:
    return os.path.isfile(file) and os.access(file, os.R_OK)


def _map(file: Path, dtype: np.dtype[Any], limit: int) -> NDArray[Any]:
    """The whole items of the first `limit` bytes of a file."""
    items = min(file.stat().st_size, limit) // dtype.itemsize
    return np.memmap(file, dtype, "r", shape=(items,)) if items else np.empty(0, dtype)


def _cut_by_ends(tokens: NDArray[Any], end: int) -> Iterator[tuple[NDArray[Any], NDArray[np.int64]]]:
    """Blocks of documents, told by the tokens that end them: tokens, and the length of each. What follows is left."""
    start, size = 0, BLOCK_TOKENS
    while start < len(tokens):
        part = np.asarray(tokens[start : start + size])
        ends = np.flatnonzero(part == end) + 1
        if len(ends):
            yield part[: ends[-1]], np.diff(ends, prepend=0)
            start, size = start + int(ends[-1]), BLOCK_TOKENS
        elif start + size >= len(tokens):
            return
        else:
            size *= 2  # a document longer than the block
