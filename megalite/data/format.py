"""The token store: tokenised documents on disk, memory-mapped by the reader.

A store is a directory:

    manifest.json          counts, dtype, tokenizer, and the size and xxh3_128 digest of every other file
    tokens_00000.bin ...   token ids, little endian; every document is its tokens + one end-of-document token
    document_offsets.bin   uint64 [num_documents + 1]: where each document starts in the stream of tokens; then the end
    document_bytes.bin     uint64 [num_documents]: UTF-8 bytes of each document's untouched text (for bits per byte)
    tokenizer/             a copy of the tokenizer that wrote the ids

A document never crosses a shard. The directory is written under a temporary sibling name and renamed when it is whole,
so what stands under the final name is complete.
"""

from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megalite.data.files import digest_file
from megalite.data.manifest import (
    DTYPES,
    MANIFEST,
    OFFSET_DTYPE,
    Manifest,
    read_manifest,
)
from megalite.errors import DataError

_CHECK_BYTES = 1 << 24  # bytes looked at at a time when content is checked
_MAX_MAPPED_SHARDS = 256  # each map holds a file descriptor, and a process may have about 1000


class TokenStore:
    """A token store opened for reading. Opening reads the manifest and file sizes only, never the tokens."""

    def __init__(self, path: Path, manifest: Manifest):
        """Use `TokenStore.open`; this takes a manifest that has been checked."""
        self.path = path
        self.manifest = manifest
        self._dtype = DTYPES[manifest.dtype]
        lengths = [shard.bytes // self._dtype.itemsize for shard in manifest.shards]
        self._shard_ends = np.cumsum([0, *lengths], dtype=np.int64)  # [num_shards + 1], first entry 0
        self._maps: OrderedDict[int, NDArray[Any]] = OrderedDict()
        self.document_offsets: NDArray[np.uint64] = _map(path / manifest.document_offsets.file, OFFSET_DTYPE)
        self._document_bytes: NDArray[np.uint64] = _map(path / manifest.document_bytes.file, OFFSET_DTYPE)

    @classmethod
    def open(cls, path: str | Path) -> "TokenStore":
        """Open the store at `path`.

        Raises `DataError` when it is missing, of another format version, or when a file is absent or of another size
        than the manifest says (a map of a file that is too short would kill the process with SIGBUS).
        """
        path = Path(path)
        manifest = read_manifest(path)
        for record in manifest.files:
            file = path / record.file
            if not file.is_file():
                raise DataError(f"{file} is missing: the token store is damaged; build it again")
            if (found := file.stat().st_size) != record.bytes:
                raise DataError(
                    f"{file} has {found} bytes, its manifest says {record.bytes}: "
                    "the token store is damaged; build it again"
                )
        return cls(path, manifest)

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

    def tokens(self, start: int, stop: int) -> NDArray[Any]:
        """Ids [stop - start] of the stream, across shards; a copy, in the stored dtype. `IndexError` out of range."""
        if not 0 <= start <= stop <= self.num_tokens:
            raise IndexError(f"tokens {start}:{stop} of a store of {self.num_tokens}: {self.path}")
        out = np.empty(stop - start, self._dtype)
        shard = int(np.searchsorted(self._shard_ends, start, side="right")) - 1
        position = start
        while position < stop:
            first, end = int(self._shard_ends[shard]), min(stop, int(self._shard_ends[shard + 1]))
            out[position - start : end - start] = self._shard(shard)[position - first : end - first]
            position, shard = end, shard + 1
        return out

    def document(self, index: int) -> NDArray[Any]:
        """Ids of one document, its end-of-document token included."""
        self._check_document(index)
        return self.tokens(int(self.document_offsets[index]), int(self.document_offsets[index + 1]))

    def document_bytes(self, index: int) -> int:
        """UTF-8 bytes of one document's untouched text."""
        self._check_document(index)
        return int(self._document_bytes[index])

    def verify(self) -> None:
        """Read every file again and compare it with the manifest. `DataError` names the file, expected and found."""
        for record in self.manifest.files:
            found = digest_file(self.path / record.file)
            if found != record.digest:
                raise DataError(
                    f"{self.path / record.file} is damaged: expected digest {record.digest}, found {found}; "
                    "build the store again"
                )
        self._verify_content()

    def _verify_content(self) -> None:
        """What digests cannot show: that a writer put sensible numbers there in the first place."""
        manifest = self.manifest
        offsets = self.document_offsets
        step = _CHECK_BYTES // 8
        for start in range(0, len(offsets) - 1, step):
            block = offsets[start : start + step + 1].astype(np.int64)
            if np.any(np.diff(block) < 1):
                raise DataError(f"{self.path / manifest.document_offsets.file}: offsets do not increase; build again")
        if int(offsets[0]) != 0 or int(offsets[-1]) != self.num_tokens:
            raise DataError(
                f"{self.path / manifest.document_offsets.file}: documents span {offsets[0]}..{offsets[-1]}, expected "
                f"0..{self.num_tokens}; build the store again"
            )
        if (found := int(np.sum(self._document_bytes, dtype=np.uint64))) != manifest.num_bytes:
            raise DataError(f"{self.path}: documents hold {found} bytes, the manifest says {manifest.num_bytes}")
        for index, record in enumerate(manifest.shards):
            shard = self._shard(index)
            highest = max(int(shard[i : i + step].max()) for i in range(0, len(shard), step))
            if highest >= manifest.vocab_size:
                raise DataError(
                    f"{self.path / record.file}: token id {highest} outside the vocabulary of {manifest.vocab_size}"
                )

    def _shard(self, index: int) -> NDArray[Any]:
        """The map of a shard, made on first use; the least recently used one is let go when there are many."""
        if index not in self._maps:
            self._maps[index] = _map(self.path / self.manifest.shards[index].file, self._dtype)
            if len(self._maps) > _MAX_MAPPED_SHARDS:
                self._maps.popitem(last=False)
        self._maps.move_to_end(index)
        return self._maps[index]

    def _check_document(self, index: int) -> None:
        if not 0 <= index < self.num_documents:
            raise IndexError(f"document {index} of a store of {self.num_documents}: {self.path}")


def _map(file: Path, dtype: np.dtype[Any]) -> NDArray[Any]:
    # An empty file cannot be memory-mapped.
    return np.memmap(file, dtype=dtype, mode="r") if file.stat().st_size else np.empty(0, dtype)
