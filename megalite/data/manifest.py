"""manifest.json of a token store: what it says, and the checks before anything else is believed."""

import contextlib
import dataclasses
import gc
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, TypeVar

import numpy as np
import orjson

from megalite.config.loader import load_config
from megalite.errors import ConfigError, DataError

R = TypeVar("R")
FORMAT_VERSION = 2
MANIFEST = "manifest.json"
DTYPES: Final[dict[str, np.dtype[Any]]] = {"uint16": np.dtype("<u2"), "uint32": np.dtype("<u4")}
OFFSET_DTYPE: Final = np.dtype("<u8")
# Plain names, one a line: shards lie beside the manifest.
_SHARD_FILES = re.compile(r"(?:[A-Za-z0-9_][A-Za-z0-9_.-]*(?:\n(?!\Z)|\Z))*")


@dataclass(frozen=True, kw_only=True)
class FileRecord:
    """A file of the store: its path relative to the store, its size in bytes, its xxh3_128 digest."""

    file: str
    bytes: int
    digest: str


@dataclass(frozen=True, kw_only=True)
class TokenizerRecord:
    """The tokenizer that wrote the ids; its files are copied below `folder`."""

    name: str
    digest: str
    folder: str = "tokenizer"
    files: tuple[FileRecord, ...] = ()


@dataclass(frozen=True, kw_only=True)
class ShardRecord:
    """One shard: its tokens, and where each of its documents starts and how long its text was."""

    tokens: FileRecord
    document_offsets: FileRecord
    document_bytes: FileRecord

    @property
    def num_documents(self) -> int:
        """Documents in the shard."""
        return self.document_bytes.bytes // OFFSET_DTYPE.itemsize

    @property
    def files(self) -> tuple[FileRecord, FileRecord, FileRecord]:
        """All three."""
        return self.tokens, self.document_offsets, self.document_bytes


_FILE_KEYS = {field.name for field in dataclasses.fields(FileRecord)}
_SHARD_KEYS = {field.name for field in dataclasses.fields(ShardRecord)}


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """The content of manifest.json."""

    format_version: int
    dtype: str
    vocab_size: int
    end_of_document: int
    num_tokens: int
    num_documents: int
    num_bytes: int  # UTF-8 bytes of the untouched text of all documents
    source: str
    tokenizer: TokenizerRecord | None
    shards: tuple[ShardRecord, ...]

    @property
    def files(self) -> tuple[FileRecord, ...]:
        """Every file that the manifest vouches for."""
        tokenizer = self.tokenizer.files if self.tokenizer else ()
        return (*(file for shard in self.shards for file in shard.files), *tokenizer)


def dtype_for(vocab_size: int) -> str:
    """The narrowest stored type that holds the ids 0 .. vocab_size - 1."""
    return "uint16" if vocab_size <= 1 << 16 else "uint32"


def read_manifest(path: Path) -> Manifest:
    """Read and check the manifest of the store at `path`. Raises `DataError` for what cannot be trusted."""
    file = path / MANIFEST
    try:
        with _collector_paused():
            values = orjson.loads(file.read_bytes())
            version = values.get("format_version") if isinstance(values, dict) else None
            if version != FORMAT_VERSION:
                raise DataError(f"{file}: format_version {version!r}, this program reads {FORMAT_VERSION}")
            shards = _load_shards(values.pop("shards", None))
        manifest = dataclasses.replace(load_config(Manifest, values | {"shards": ()}), shards=shards)
    except (FileNotFoundError, NotADirectoryError):
        raise DataError(
            f"{path} is not a token store: it has no {MANIFEST}. `megalite data build` makes one, below its output as "
            "train/<source> and validation/<source>"
        ) from None
    except (ValueError, RecursionError, ConfigError) as error:
        raise DataError(f"{file} is damaged: {error}") from None
    if problem := _inconsistency(manifest):
        raise DataError(f"{file} is damaged: {problem}")
    return manifest


@contextlib.contextmanager
def _collector_paused() -> Iterator[None]:
    """Thousands of records that all stay make the cyclic garbage collector look at them again and again: half the time.

    Also for a start whose caller had it paused already.
    """
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def _load_shards(values: Any) -> tuple[ShardRecord, ...]:
    """The shards' records, checked as `load_config` would: there are thousands in a large store, so all at once."""
    if type(values) is not list:
        raise ConfigError(f"shards: expected a list, found {values!r:.80}")
    if not _are_shards(values):
        for i, shard in enumerate(values):
            if problem := _shard_problem(shard):
                raise ConfigError(f"shards[{i}]{problem}")
    return tuple(
        _record(ShardRecord, {name: _record(FileRecord, record) for name, record in shard.items()}) for shard in values
    )


def _are_shards(values: list[Any]) -> bool:
    """Whether no shard of `values` has a `_shard_problem`, in a third of the time that asking each takes."""
    try:
        records = [record for shard in values for record in map(shard.__getitem__, _SHARD_KEYS)]
        files, sizes, digests = ([record[key] for record in records] for key in ("file", "bytes", "digest"))
        return (
            {(type(shard), len(shard)) for shard in values} <= {(dict, len(_SHARD_KEYS))}
            and {(type(record), len(record)) for record in records} <= {(dict, len(_FILE_KEYS))}
            and set(map(type, files)) | set(map(type, digests)) <= {str}
            and set(map(type, sizes)) <= {int}
            and min(sizes, default=0) >= 0
            and bool(_SHARD_FILES.fullmatch("\n".join(files)))
        )
    except (AttributeError, KeyError, TypeError):
        return False


def _shard_problem(shard: Any) -> str | None:
    if type(shard) is not dict or shard.keys() != _SHARD_KEYS:
        return f": expected {', '.join(sorted(_SHARD_KEYS))}, found {shard!r:.80}"
    problems = {name: _file_problem(record) for name, record in shard.items()}
    return next((f".{name}: {problem}" for name, problem in problems.items() if problem), None)


def _file_problem(record: Any) -> str | None:
    if type(record) is not dict or record.keys() != _FILE_KEYS:
        return f"expected {', '.join(sorted(_FILE_KEYS))}, found {record!r:.80}"
    file, size, digest = record["file"], record["bytes"], record["digest"]
    if type(file) is not str or not file or "\n" in file or not _SHARD_FILES.fullmatch(file):
        return f"the file {file!r:.80} is not inside the store"
    if type(size) is not int or size < 0 or type(digest) is not str:
        return f"{size!r:.80} bytes with digest {digest!r:.80}"
    return None


def _record(cls: type[R], values: dict[str, Any]) -> R:
    """`cls(**values)`, in a tenth of the time that a frozen dataclass takes over it; `values` becomes its own."""
    record = object.__new__(cls)
    object.__setattr__(record, "__dict__", values)
    return record


def _misplaced(record: TokenizerRecord) -> str | None:
    """What a tokenizer's record names outside the store or outside its folder."""
    for name in (record.folder, *(file.file for file in record.files)):
        path = Path(name)
        if not path.parts or path.is_absolute() or ".." in path.parts or not name.isprintable():
            return f"it names the file {name!r}, which is not inside the store"
        if not path.is_relative_to(record.folder):
            return f"it names the file {name!r}, which is not in the tokenizer's folder {record.folder!r}"
    return None


def _inconsistency(manifest: Manifest) -> str | None:
    """What in the manifest contradicts itself, or points outside the store."""
    if manifest.tokenizer and (problem := _misplaced(manifest.tokenizer)):
        return problem
    for key, count, limit in (("num_bytes", manifest.num_bytes, 1 << 63), ("vocab_size", manifest.vocab_size, 1 << 32)):
        if not 0 <= count <= limit:
            return f"{key} {count!r:.80}, allowed: 0 to {limit}"
    if manifest.dtype != dtype_for(manifest.vocab_size):
        return f"dtype {manifest.dtype}, expected {dtype_for(manifest.vocab_size)} for vocab_size {manifest.vocab_size}"
    if not 0 <= manifest.end_of_document < manifest.vocab_size:
        return f"end_of_document {manifest.end_of_document} is outside the vocabulary of {manifest.vocab_size}"
    for i, shard in enumerate(manifest.shards):
        if shard.tokens.bytes % DTYPES[manifest.dtype].itemsize or shard.document_bytes.bytes % OFFSET_DTYPE.itemsize:
            return f"the files of shard {i} hold a broken number"
        if shard.document_offsets.bytes != shard.document_bytes.bytes + OFFSET_DTYPE.itemsize:
            return f"document offsets and byte counts of shard {i} are not of the same number of documents"
    width = OFFSET_DTYPE.itemsize
    sizes = (
        ("tokens", sum(s.tokens.bytes for s in manifest.shards), manifest.num_tokens * DTYPES[manifest.dtype].itemsize),
        ("document byte counts", sum(s.document_bytes.bytes for s in manifest.shards), manifest.num_documents * width),
    )
    for name, found, expected in sizes:
        if found != expected:
            return f"{name} take {found} bytes, expected {expected} from the counts"
    return None
