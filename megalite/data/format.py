"""The token store: tokenised documents on disk, memory-mapped by the reader.

A store is a directory:

    manifest.json               counts, dtype, tokenizer, and the size and xxh3_128 digest of every other file
    tokens_00000.bin ...        a shard: token ids, little endian; a document is its tokens + one end-of-document token
    document_offsets_00000.bin  uint64 [documents of the shard + 1]: where each starts in the shard; then its length
    document_bytes_00000.bin    uint64 [documents of the shard]: UTF-8 bytes of each one's untouched text (for bits per
                                byte)
    tokenizer/                  a copy of the tokenizer that wrote the ids

A document never crosses a shard, and nothing in a shard refers to another: shards can be linked, dropped or put
together as they are. The shards in the manifest's order are one stream of tokens and one list of documents. The
directory is written under a temporary sibling name and renamed when it is whole, so what stands under the final name is
complete.
"""

import os
import stat
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from megalite.data.files import digest_file
from megalite.data.manifest import (
    DTYPES,
    MANIFEST,
    OFFSET_DTYPE,
    FileRecord,
    Manifest,
    read_manifest,
)
from megalite.data.mapped import MappedFile
from megalite.errors import DataError

_CHECK_BYTES = 1 << 24  # bytes looked at at a time when content is checked
_MAX_MAPPED_FILES = 256  # each map holds a file descriptor, and a process may have about 1000

_I64 = NDArray[np.int64]


class TokenStore:
    """A token store opened for reading. Opening reads the manifest and file sizes only, never the tokens.

    Shards are mapped when they are touched, and every touch looks at the file's size first: reading beyond the end of a
    file that was cut under its map would kill the process with SIGBUS, so it is a `DataError` instead.
    """

    def __init__(self, path: Path, manifest: Manifest):
        """Use `TokenStore.open`; this takes a manifest that has been checked."""
        self.path = path
        self.manifest = manifest
        self.dtype = DTYPES[manifest.dtype]
        lengths = [shard.tokens.bytes // self.dtype.itemsize for shard in manifest.shards]
        # [num_shards + 1]: the first token and the first document of each shard; then their numbers.
        self.token_starts = np.cumsum([0, *lengths], dtype=np.int64)
        self.document_starts = np.cumsum([0, *(shard.num_documents for shard in manifest.shards)], dtype=np.int64)
        self.max_mapped_files = _MAX_MAPPED_FILES
        self._maps: OrderedDict[str, MappedFile] = OrderedDict()

    @classmethod
    def open(cls, path: str | Path) -> "TokenStore":
        """Open the store at `path`.

        Raises `DataError` when it is missing, of another format version, or when a shard is absent or of another size
        than the manifest says. What stands beside the tokens is looked at when it is used: a store has thousands of
        files, and a training reads none but those.
        """
        path = Path(path)
        manifest = read_manifest(path)
        for shard in manifest.shards:
            _check_size(f"{path}/{shard.tokens.file}", shard.tokens.bytes)
        return cls(path, manifest)

    def check_sizes(self) -> None:
        """Raise `DataError` when any file of the store is absent or of another size than the manifest says."""
        for record in self.manifest.files:
            _check_size(f"{self.path}/{record.file}", record.bytes)

    @property
    def digest(self) -> str:
        """xxh3_128 of the manifest, which holds the digests of everything else."""
        return digest_file(self.path / MANIFEST)

    @property
    def num_tokens(self) -> int:
        """Tokens in the store, end-of-document tokens included."""
        return self.manifest.num_tokens

    @property
    def num_documents(self) -> int:
        """Documents in the store."""
        return self.manifest.num_documents

    @property
    def num_shards(self) -> int:
        """Shards that the store is made of."""
        return len(self.manifest.shards)

    def shard_tokens(self, shard: int) -> NDArray[Any]:
        """Ids of one shard: its map, in the stored dtype."""
        return self._map(self.manifest.shards[shard].tokens, self.dtype)

    def shard_offsets(self, shard: int) -> NDArray[np.uint64]:
        """Where each document of a shard starts in it, and its length: its map, [documents + 1]."""
        return self._map(self.manifest.shards[shard].document_offsets, OFFSET_DTYPE)

    def shard_bytes(self, shard: int) -> NDArray[np.uint64]:
        """UTF-8 bytes of the untouched text of each document of a shard: its map, [documents]."""
        return self._map(self.manifest.shards[shard].document_bytes, OFFSET_DTYPE)

    def tokens(self, start: int, stop: int) -> NDArray[Any]:
        """Ids [stop - start] of the stream, across shards; a copy, in the stored dtype. `IndexError` out of range."""
        self._check_tokens(start, stop)
        out = np.empty(stop - start, self.dtype)
        self.read(start, out)
        return out

    def read(self, start: int, out: NDArray[Any]) -> None:
        """Fill `out` [count] with the ids of the stream from `start` on, across shards. `IndexError` out of range."""
        stop = start + len(out)
        self._check_tokens(start, stop)
        shard, position = _shard_of(self.token_starts, start), start
        while position < stop:
            first, end = int(self.token_starts[shard]), min(stop, int(self.token_starts[shard + 1]))
            out[position - start : end - start] = self.shard_tokens(shard)[position - first : end - first]
            position, shard = end, shard + 1

    def read_rows(self, starts: ArrayLike, out_NW: NDArray[Any]) -> None:
        """Row r of `out_NW` becomes the W ids of the stream from `starts[r]` on; its dtype may be a wider one.

        Raises `IndexError` when a row would leave the store.
        """
        starts_N = np.asarray(starts, np.int64)
        width = out_NW.shape[1]
        if len(starts_N) and not (starts_N.min() >= 0 and starts_N.max() + width <= self.num_tokens):
            raise IndexError(f"rows of {width} tokens do not lie within a store of {self.num_tokens}: {self.path}")
        shards_N = np.searchsorted(self.token_starts, starts_N, side="right") - 1
        within_N = starts_N + width <= self.token_starts[shards_N + 1]
        firsts_N = starts_N - self.token_starts[shards_N]
        # Shard after shard: each is mapped, and its size looked at, once.
        for shard in _distinct(shards_N[within_N]):
            tokens = self.shard_tokens(shard)
            rows = np.flatnonzero((shards_N == shard) & within_N)
            for row, first in zip(rows.tolist(), firsts_N[rows].tolist(), strict=True):
                out_NW[row] = tokens[first : first + width]
        for row in np.flatnonzero(~within_N).tolist():
            self.read(int(starts_N[row]), out_NW[row])

    def document(self, index: int) -> NDArray[Any]:
        """Ids of one document, its end-of-document token included. `DataError` when its offsets make no sense."""
        start, stop = self.offsets_of_documents(index, index + 1).tolist()
        return self.tokens(start, stop)

    def document_bytes(self, index: int) -> int:
        """UTF-8 bytes of one document's untouched text."""
        return int(self.bytes_of_documents(index, index + 1)[0])

    def offsets_of_documents(self, start: int, stop: int) -> _I64:
        """Where the documents `start` .. `stop` lie in the stream, each from one entry to the next: [stop - start + 1].

        A copy, across shards. Raises `IndexError` out of range, `DataError` when the offsets make no sense.
        """
        if start == stop:
            raise IndexError(f"documents {start}:{stop} are none: {self.path}")
        parts = self._shards_of_documents(start, stop)
        out, done = np.empty(stop - start + 1, np.int64), 0
        for shard, first, last in parts:
            offsets = self.shard_offsets(shard)[first : last + 1]
            # Compared unsigned: as differences, damaged numbers could wrap around.
            if np.any(offsets[1:] <= offsets[:-1]) or offsets[-1] > len(self.shard_tokens(shard)):
                file = self.path / self.manifest.shards[shard].document_offsets.file
                raise DataError(
                    f"{file} is damaged: its documents {first} to {last} do not follow one another within the shard; "
                    "`megalite data repair` mends it"
                )
            out[done : done + len(offsets)] = offsets.astype(np.int64) + self.token_starts[shard]
            done += last - first
        return out

    def bytes_of_documents(self, start: int, stop: int) -> NDArray[np.uint64]:
        """UTF-8 bytes of the texts of the documents `start` .. `stop`, each: [stop - start]; a copy."""
        parts = [self.shard_bytes(shard)[first:last] for shard, first, last in self._shards_of_documents(start, stop)]
        return np.concatenate([np.empty(0, np.uint64), *parts])

    def document_at(self, positions: ArrayLike) -> _I64:
        """The document that holds each of the tokens at `positions` [N] of the stream: [N]. `IndexError` outside."""
        positions_N = np.asarray(positions, np.int64)
        if len(positions_N) and not 0 <= positions_N.min() <= positions_N.max() < self.num_tokens:
            raise IndexError(f"tokens {positions_N} of a store of {self.num_tokens}: {self.path}")
        shards_N = np.searchsorted(self.token_starts, positions_N, side="right") - 1
        out_N = np.empty(len(positions_N), np.int64)
        for shard in _distinct(shards_N):
            rows = shards_N == shard
            local = (positions_N[rows] - self.token_starts[shard]).astype(np.uint64)
            found = np.searchsorted(self.shard_offsets(shard), local, side="right") - 1
            out_N[rows] = np.clip(found, 0, self.manifest.shards[shard].num_documents - 1) + self.document_starts[shard]
        return out_N

    def verify(self) -> None:
        """Read every file again and compare it with the manifest. `DataError` names the file, expected and found."""
        self.check_sizes()
        for record in self.manifest.files:
            found = digest_file(self.path / record.file)
            if found != record.digest:
                raise DataError(
                    f"{self.path / record.file} is damaged: expected digest {record.digest}, found {found}; "
                    "build the store again, or save what is whole with `megalite data repair`"
                )
        self._verify_content()

    def _verify_content(self) -> None:
        """What digests cannot show: that a writer put sensible numbers there in the first place."""
        manifest, step = self.manifest, _CHECK_BYTES // 8
        num_bytes = 0
        for number, record in enumerate(manifest.shards):
            tokens, offsets = self.shard_tokens(number), self.shard_offsets(number)
            for start in range(0, len(offsets) - 1, step):
                block = offsets[start : start + step + 1]
                if np.any(block[1:] <= block[:-1]):
                    raise DataError(f"{self.path / record.document_offsets.file}: offsets do not increase; build again")
            if int(offsets[0]) != 0 or int(offsets[-1]) != len(tokens):
                raise DataError(
                    f"{self.path / record.document_offsets.file}: documents span {offsets[0]}..{offsets[-1]}, expected "
                    f"0..{len(tokens)}; build the store again"
                )
            num_bytes += int(np.sum(self.shard_bytes(number), dtype=np.uint64))
            highest = max((int(tokens[i : i + step].max()) for i in range(0, len(tokens), step)), default=0)
            if highest >= manifest.vocab_size:
                raise DataError(
                    f"{self.path / record.tokens.file}: token id {highest} outside the vocabulary of "
                    f"{manifest.vocab_size}"
                )
        if num_bytes != manifest.num_bytes:
            raise DataError(f"{self.path}: documents hold {num_bytes} bytes, the manifest says {manifest.num_bytes}")

    def _shards_of_documents(self, start: int, stop: int) -> list[tuple[int, int, int]]:
        """Shards that hold the documents `start` .. `stop`, and which of each shard's own they are."""
        if not 0 <= start <= stop <= self.num_documents:
            raise IndexError(f"documents {start}:{stop} of a store of {self.num_documents}: {self.path}")
        found, shard = [], _shard_of(self.document_starts, start)
        while start < stop:
            first, end = int(self.document_starts[shard]), min(stop, int(self.document_starts[shard + 1]))
            if end > start:
                found.append((shard, start - first, end - first))
            start, shard = end, shard + 1
        return found

    def _check_tokens(self, start: int, stop: int) -> None:
        if not 0 <= start <= stop <= self.num_tokens:
            raise IndexError(f"tokens {start}:{stop} of a store of {self.num_tokens}: {self.path}")

    def _map(self, record: FileRecord, dtype: np.dtype[Any]) -> NDArray[Any]:
        """The map of a file, made on first use; the least recently used one is let go when there are many."""
        mapped = self._maps.get(record.file)
        if mapped is None:
            mapped = self._maps[record.file] = MappedFile(self.path / record.file, record.bytes, dtype)
            if len(self._maps) > self.max_mapped_files:
                self._maps.popitem(last=False)
        else:
            self._maps.move_to_end(record.file)
            mapped.check()
        return mapped.values


def _distinct(shards: _I64) -> list[int]:
    """In order; `np.unique` costs 15 ms when it is first used, more than all the rest of a start."""
    return sorted(set(shards.tolist()))


def _shard_of(starts: _I64, position: int) -> int:
    return int(np.searchsorted(starts, position, side="right")) - 1


def _check_size(file: str, expected: int) -> None:
    try:
        found = os.stat(file)
    except (FileNotFoundError, NotADirectoryError):
        found = None
    except OSError as error:  # a name too long, a loop of links, no permission
        raise DataError(f"{file} cannot be read: {error.strerror}") from None
    if found is None or not stat.S_ISREG(found.st_mode):
        raise DataError(f"{file} is missing: the token store is damaged; build it again")
    if found.st_size != expected:
        raise DataError(
            f"{file} has {found.st_size} bytes, its manifest says {expected}: the token store is damaged; build it "
            "again"
        )
