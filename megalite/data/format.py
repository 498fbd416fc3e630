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

import dataclasses
import json
import os
import sys
from collections import OrderedDict
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol

import numpy as np
import xxhash
from numpy.typing import ArrayLike, NDArray

from megalite.data.files import digest_file, new_directory, write_synced
from megalite.data.manifest import (
    DTYPES,
    FORMAT_VERSION,
    MANIFEST,
    OFFSET_DTYPE,
    FileRecord,
    Manifest,
    TokenizerRecord,
    dtype_for,
    read_manifest,
)
from megalite.errors import DataError

_CHECK_BYTES = 1 << 24  # bytes looked at at a time when content is checked
_MAX_MAPPED_SHARDS = 256  # each map holds a file descriptor, and a process may have about 1000


class SavableTokenizer(Protocol):
    """What the writer needs of a `megalite.tokenizer.Tokenizer`."""

    @property
    def name(self) -> str:
        """What to call it in a manifest."""

    @property
    def digest(self) -> str:
        """xxh3_128 of its files."""

    def save(self, folder: Path) -> None:
        """Copy its files to a new folder."""


class StoreWriter:
    """Writes a token store; use as a context manager.

    Leaving the block normally commits: files synced, manifest written last, directory renamed to `path`. Leaving it by
    an exception removes what was written. A process that is killed leaves only a directory named `<path>.tmp-*`.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        vocab_size: int,
        end_of_document: int,
        source: str = "",
        shard_tokens: int = 500_000_000,
    ):
        """`shard_tokens` bounds a shard's length in tokens, unless one document alone is longer.

        Raises `DataError` when the end-of-document id is outside the vocabulary.
        """
        self.path = Path(path)
        self._check_ids(np.array([end_of_document]), vocab_size)
        self.vocab_size = vocab_size
        self.end_of_document = end_of_document
        self.source = source
        self.shard_tokens = shard_tokens
        self.num_tokens = self.num_documents = self.num_bytes = 0
        self._dtype = dtype_for(vocab_size)
        self._tokenizer: TokenizerRecord | None = None
        self._shards: list[_DigestedFile] = []
        self._open_shard_tokens = 0
        self._directory = new_directory(self.path)

    def __enter__(self) -> "StoreWriter":
        """Make the temporary directory. `DataError` when `path` exists already."""
        self._temporary = self._directory.__enter__()
        self._offsets = _DigestedFile(self._temporary, "document_offsets.bin")
        self._bytes = _DigestedFile(self._temporary, "document_bytes.bin")
        self._offsets.write(np.zeros(1, OFFSET_DTYPE))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Commit, or remove everything when the block failed."""
        try:
            for file in (*self._shards, self._offsets, self._bytes):
                file.close()
            if kind is None:
                self._write_manifest()
        except BaseException:  # a full disk, say: nothing may stay behind then either
            self._directory.__exit__(*sys.exc_info())
            raise
        self._directory.__exit__(kind, error, trace)

    def add_document(self, tokens: ArrayLike, num_bytes: int) -> None:
        """Append a document: its ids without the end-of-document token, and the UTF-8 bytes of its text.

        Raises `DataError` for an id outside the vocabulary: stored narrow it would wrap to another id silently.
        """
        ids = np.asarray(tokens, dtype=np.int64)
        self._check_ids(ids, self.vocab_size)
        stored = np.append(ids, self.end_of_document).astype(DTYPES[self._dtype])
        full = self._open_shard_tokens + len(stored) > self.shard_tokens
        if not self._shards or (full and self._open_shard_tokens > 0):
            if self._shards:
                self._shards[-1].close()
            self._shards.append(_DigestedFile(self._temporary, f"tokens_{len(self._shards):05d}.bin"))
            self._open_shard_tokens = 0
        self._shards[-1].write(stored)
        self._open_shard_tokens += len(stored)
        self.num_tokens += len(stored)
        self.num_documents += 1
        self.num_bytes += num_bytes
        self._offsets.write(np.array([self.num_tokens], OFFSET_DTYPE))
        self._bytes.write(np.array([num_bytes], OFFSET_DTYPE))

    def add_tokenizer(self, tokenizer: "SavableTokenizer") -> None:
        """Copy a `megalite.tokenizer.Tokenizer` into the store and record its name and digest."""
        record = TokenizerRecord(name=tokenizer.name, digest=tokenizer.digest)
        folder = self._temporary / record.folder
        tokenizer.save(folder)
        files = []
        for file in sorted(p for p in folder.rglob("*") if p.is_file()):
            files.append(_record_of(file, file.relative_to(self._temporary).as_posix()))
        self._tokenizer = dataclasses.replace(record, files=tuple(files))

    def _write_manifest(self) -> None:
        manifest = Manifest(
            format_version=FORMAT_VERSION,
            dtype=self._dtype,
            vocab_size=self.vocab_size,
            end_of_document=self.end_of_document,
            num_tokens=self.num_tokens,
            num_documents=self.num_documents,
            num_bytes=self.num_bytes,
            source=self.source,
            tokenizer=self._tokenizer,
            shards=tuple(shard.record for shard in self._shards),
            document_offsets=self._offsets.record,
            document_bytes=self._bytes.record,
        )
        text = json.dumps(dataclasses.asdict(manifest), indent=2, ensure_ascii=False) + "\n"
        write_synced(self._temporary / MANIFEST, text)

    @staticmethod
    def _check_ids(ids: NDArray[Any], vocab_size: int) -> None:
        if len(ids) and (int(ids.min()) < 0 or int(ids.max()) >= vocab_size):
            raise DataError(
                f"token ids from {ids.min()} to {ids.max()} do not fit a vocabulary of {vocab_size}: "
                "the store's vocab_size must be that of the tokenizer"
            )


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


class _DigestedFile:
    """A file of a store being written: digested on the way, synced when closed."""

    def __init__(self, root: Path, name: str):
        self._name = name
        self._file = open(root / name, "wb", buffering=1 << 20)  # noqa: SIM115 (closed by the writer)
        self._digest = xxhash.xxh3_128()
        self._size = 0

    def write(self, values: NDArray[Any]) -> None:
        data = values.tobytes()
        self._file.write(data)
        self._digest.update(data)
        self._size += len(data)

    def close(self) -> None:
        if not self._file.closed:
            self._file.flush()
            os.fsync(self._file.fileno())
            self._file.close()

    @property
    def record(self) -> FileRecord:
        return FileRecord(file=self._name, bytes=self._size, digest=self._digest.hexdigest())


def _record_of(file: Path, name: str) -> FileRecord:
    return FileRecord(file=name, bytes=file.stat().st_size, digest=digest_file(file))


def _map(file: Path, dtype: np.dtype[Any]) -> NDArray[Any]:
    # An empty file cannot be memory-mapped.
    return np.memmap(file, dtype=dtype, mode="r") if file.stat().st_size else np.empty(0, dtype)
