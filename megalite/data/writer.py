"""Writing a token store (its layout is described in `format.py`)."""

import dataclasses
import json
import os
import sys
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
    ShardRecord,
    TokenizerRecord,
    dtype_for,
)
from megalite.errors import DataError


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
        self._shards: list[_Shard] = []
        self._directory = new_directory(self.path)

    def __enter__(self) -> "StoreWriter":
        """Make the temporary directory. `DataError` when `path` exists already."""
        self._temporary = self._directory.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Commit, or remove everything when the block failed."""
        try:
            for shard in self._shards:
                shard.close()
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
        self.add_documents(np.append(ids, self.end_of_document), np.array([len(ids) + 1]), np.array([num_bytes]))

    def add_documents(self, tokens: NDArray[Any], lengths: NDArray[Any], num_bytes: NDArray[Any]) -> None:
        """Append documents side by side: `tokens` with their end-of-document tokens in place.

        `lengths`: tokens of each document, its end included; `num_bytes`: UTF-8 bytes of each one's text, both
        [documents]. Raises `DataError` for ids outside the vocabulary and for a document without its end.
        """
        ends = np.cumsum(lengths, dtype=np.int64)
        if not len(ends):
            return
        if int(np.min(lengths)) < 1 or int(ends[-1]) != len(tokens) or np.any(tokens[ends - 1] != self.end_of_document):
            raise DataError(f"{self.path}: documents do not end with the end-of-document token {self.end_of_document}")
        self._check_ids(tokens, self.vocab_size)
        stored = tokens.astype(DTYPES[self._dtype], copy=False)
        first = 0  # of the documents that are not written yet
        while first < len(ends):
            start = int(ends[first - 1]) if first else 0
            in_shard = self._shards[-1].num_tokens if self._shards else 0
            last = int(np.searchsorted(ends, start + self.shard_tokens - in_shard, side="right"))  # does not fit
            if not self._shards or (last <= first and in_shard):
                self._open_shard()
                continue
            last = max(last, first + 1)  # a document longer than a shard has one to itself
            self._shards[-1].write(stored[start : ends[last - 1]], lengths[first:last], num_bytes[first:last])
            first = last
        self.num_tokens += len(tokens)
        self.num_documents += len(ends)
        self.num_bytes += int(np.sum(num_bytes))

    def _open_shard(self) -> None:
        if self._shards:
            self._shards[-1].close()
        self._shards.append(_Shard(self._temporary, len(self._shards)))

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


class _Shard:
    """The three files of a shard being written."""

    def __init__(self, root: Path, number: int):
        self.num_tokens = 0
        self._tokens = _DigestedFile(root, f"tokens_{number:05d}.bin")
        self._offsets = _DigestedFile(root, f"document_offsets_{number:05d}.bin")
        self._bytes = _DigestedFile(root, f"document_bytes_{number:05d}.bin")
        self._offsets.write(np.zeros(1, OFFSET_DTYPE))

    def write(self, tokens: NDArray[Any], lengths: NDArray[Any], num_bytes: NDArray[Any]) -> None:
        """Append documents side by side: ids as they are stored; see `StoreWriter.add_documents`."""
        self._tokens.write(tokens)
        self._offsets.write((self.num_tokens + np.cumsum(lengths, dtype=np.int64)).astype(OFFSET_DTYPE))
        self._bytes.write(num_bytes.astype(OFFSET_DTYPE))
        self.num_tokens += len(tokens)

    def close(self) -> None:
        for file in (self._tokens, self._offsets, self._bytes):
            file.close()

    @property
    def record(self) -> ShardRecord:
        return ShardRecord(
            tokens=self._tokens.record, document_offsets=self._offsets.record, document_bytes=self._bytes.record
        )


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
