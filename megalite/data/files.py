"""Directories that are whole or absent: temporary names, renames that commit, digests."""

import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import xxhash

from megalite.errors import DataError

_READ_BYTES = 1 << 24


@contextmanager
def new_directory(path: Path, overwrite_mark: str | None = None) -> Iterator[Path]:
    """A temporary sibling of `path` to fill; renamed to `path` when the block ends well, removed when it fails.

    `overwrite_mark`: an existing `path` is replaced if it holds a file of this name (so that only a directory of the
    same kind is ever removed). Without it an existing `path` is refused. Raises `DataError`.
    """
    _refuse_existing(path, overwrite_mark)
    temporary = _sibling(path)
    temporary.mkdir(parents=True)
    try:
        yield temporary
        sync_directory(temporary)
        _refuse_existing(path, overwrite_mark)
        replaced = _sibling(path) if path.exists() else None
        if replaced:
            path.rename(replaced)
        try:
            temporary.rename(path)
        except OSError as error:
            raise DataError(f"{path} could not be put in place: {error}. Is another process writing it?") from None
        sync_directory(path.parent)
        if replaced:
            shutil.rmtree(replaced)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def digest_file(path: Path) -> str:
    """xxh3_128 of a file's bytes, in hexadecimal."""
    digest = xxhash.xxh3_128()
    with open(path, "rb") as file:
        while block := file.read(_READ_BYTES):
            digest.update(block)
    return digest.hexdigest()


def write_synced(path: Path, text: str) -> None:
    """Write a text file and flush it to disk."""
    with open(path, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def sync_directory(path: Path) -> None:
    """Flush the names in a directory to disk: a rename survives a power cut only then."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _refuse_existing(path: Path, overwrite_mark: str | None) -> None:
    if not os.path.lexists(path):
        return
    if overwrite_mark is None:
        raise DataError(f"{path} exists already: choose another output, or set overwrite=true to replace it")
    if not (path / overwrite_mark).is_file() and not (path.is_dir() and not any(path.iterdir())):
        raise DataError(f"{path} was not written by this command (no {overwrite_mark} in it): it is not overwritten")


def _sibling(path: Path) -> Path:
    """A fresh name beside `path`, on the same file system, so that a rename commits."""
    return path.with_name(f"{path.name}.tmp-{uuid.uuid4().hex[:12]}")
