"""manifest.json of a token store: what it says, and the checks before anything else is believed."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np

from megalite.config.loader import load_config
from megalite.errors import ConfigError, DataError

FORMAT_VERSION = 1
MANIFEST = "manifest.json"
DTYPES: Final[dict[str, np.dtype[Any]]] = {"uint16": np.dtype("<u2"), "uint32": np.dtype("<u4")}
OFFSET_DTYPE: Final = np.dtype("<u8")


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
    shards: tuple[FileRecord, ...]
    document_offsets: FileRecord
    document_bytes: FileRecord

    @property
    def files(self) -> tuple[FileRecord, ...]:
        """Every file that the manifest vouches for."""
        tokenizer = self.tokenizer.files if self.tokenizer else ()
        return (*self.shards, self.document_offsets, self.document_bytes, *tokenizer)


def dtype_for(vocab_size: int) -> str:
    """The narrowest stored type that holds the ids 0 .. vocab_size - 1."""
    return "uint16" if vocab_size <= 1 << 16 else "uint32"


def read_manifest(path: Path) -> Manifest:
    """Read and check the manifest of the store at `path`. Raises `DataError` for what cannot be trusted."""
    file = path / MANIFEST
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
        version = values.get("format_version") if isinstance(values, dict) else None
        if version != FORMAT_VERSION:
            raise DataError(f"{file}: format_version {version!r}, this program reads {FORMAT_VERSION}")
        manifest = load_config(Manifest, values)
    except (FileNotFoundError, NotADirectoryError):
        raise DataError(
            f"{path} is not a token store: it has no {MANIFEST}. `megalite data build` makes one, below its output as "
            "train/<source> and validation/<source>"
        ) from None
    except (ValueError, ConfigError) as error:
        raise DataError(f"{file} is damaged: {error}") from None
    if problem := _inconsistency(manifest):
        raise DataError(f"{file} is damaged: {problem}")
    return manifest


def _inconsistency(manifest: Manifest) -> str | None:
    """What in the manifest contradicts itself, or points outside the store."""
    for record in manifest.files:
        parts = Path(record.file).parts
        if not parts or Path(record.file).is_absolute() or ".." in parts:
            return f"it names the file {record.file!r}, which is not inside the store"
    if manifest.dtype != dtype_for(manifest.vocab_size):
        return f"dtype {manifest.dtype}, expected {dtype_for(manifest.vocab_size)} for vocab_size {manifest.vocab_size}"
    if not 0 <= manifest.end_of_document < manifest.vocab_size:
        return f"end_of_document {manifest.end_of_document} is outside the vocabulary of {manifest.vocab_size}"
    sizes = (
        ("tokens", sum(s.bytes for s in manifest.shards), manifest.num_tokens * DTYPES[manifest.dtype].itemsize),
        ("document offsets", manifest.document_offsets.bytes, (manifest.num_documents + 1) * OFFSET_DTYPE.itemsize),
        ("document byte counts", manifest.document_bytes.bytes, manifest.num_documents * OFFSET_DTYPE.itemsize),
    )
    for name, found, expected in sizes:
        if found != expected:
            return f"{name} take {found} bytes, expected {expected} from the counts"
    return None
