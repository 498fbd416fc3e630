"""Directories that are whole or absent: temporary names, renames that commit, digests."""

import ctypes
import errno
import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import xxhash

from megalite.errors import DataError, ResourceError

_AT_FDCWD, _RENAME_EXCHANGE = -100, 2  # of <fcntl.h> and <linux/fs.h>
OVERWRITE_HINT = ", or set overwrite=true to replace it"  # for commands that have such a key
_READ_BYTES = 1 << 20  # one buffer that stays in the cache: half the time of 16 MB at a time


@contextmanager
def new_directory(path: Path, overwrite_mark: str | None = None) -> Iterator[Path]:
    """A temporary sibling of `path` to fill; renamed to `path` when the block ends well, removed when it fails.

    `overwrite_mark`: see `refuse_existing`. Raises `DataError`.
    """
    refuse_existing(path, overwrite_mark)
    temporary = _sibling(path)
    temporary.mkdir(parents=True)
    try:
        yield temporary
        commit_directory(temporary, path, overwrite_mark)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def commit_directory(temporary: Path, path: Path, overwrite_mark: str | None = None) -> None:
    """Give a whole directory on the same file system its final name. Raises `DataError` as `refuse_existing` does."""
    sync_directory(temporary)
    refuse_existing(path, overwrite_mark)
    try:
        put_in_place(temporary, path)
    except OSError as error:
        raise DataError(f"{path} could not be put in place: {error}. Is another process writing it?") from None


def put_in_place(temporary: Path, path: Path) -> None:
    """Let a directory have the name `path`, for good, and remove the one that had it.

    At no moment is neither there, where the file system can swap names. Raises `OSError`: before the name changes
    hands, or when what had it cannot be removed.
    """
    doomed = temporary
    if not path.exists():
        temporary.rename(path)
    elif not exchange(temporary, path):
        doomed = _sibling(path)
        path.rename(doomed)
        try:
            temporary.rename(path)
        except OSError:
            doomed.rename(path)
            raise
    sync_directory(path.parent)
    if doomed.exists():
        shutil.rmtree(doomed)


@contextmanager
def disk_errors(output: Path) -> Iterator[None]:
    """Turn what the disk says while `output` is written into a `ResourceError`."""
    try:
        yield
    except OSError as error:
        place = error.filename or output
        raise ResourceError(
            f"writing {place} failed: {error.strerror or error}. Is the disk full, or the folder read-only?"
        ) from None


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Let an `OSError` name the file: those of writing and syncing do not."""
    try:
        yield
    except OSError as error:
        if error.filename is None:
            error.filename = str(path)
        raise


def refuse_existing(path: Path, overwrite_mark: str | None, hint: str = "") -> None:
    """Raise `DataError` for a `path` that exists, unless it holds a file named `overwrite_mark`, or nothing.

    So only a directory of the same kind is ever replaced. `hint`: what else a user may do.
    """
    if not os.path.lexists(path):
        return
    if overwrite_mark is None:
        raise DataError(f"{path} exists already: choose another output{hint}")
    if not (path / overwrite_mark).is_file() and not (path.is_dir() and not any(path.iterdir())):
        raise DataError(f"{path} was not written by this command (no {overwrite_mark} in it): it is not overwritten")


def digest_file(path: Path) -> str:
    """xxh3_128 of a file's bytes, in hexadecimal."""
    digest = xxhash.xxh3_128()
    buffer = memoryview(bytearray(_READ_BYTES))
    with open(path, "rb", buffering=0) as file:
        while size := file.readinto(buffer):
            digest.update(buffer[:size])
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
        with naming(path):
            os.fsync(descriptor)
    finally:
        os.close(descriptor)


def exchange(first: Path, second: Path) -> bool:
    """Let two directories swap names at once, so that a kill finds one or the other under each; False: not done.

    Not every file system can (Linux, renameat2(2) with RENAME_EXCHANGE: NFS cannot). Raises `OSError`.
    """
    try:
        rename = ctypes.CDLL(None, use_errno=True).renameat2
    except AttributeError:  # glibc before 2.28
        return False
    if rename(_AT_FDCWD, os.fsencode(first), _AT_FDCWD, os.fsencode(second), _RENAME_EXCHANGE) == 0:
        return True
    number = ctypes.get_errno()
    if number in (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP):
        return False
    raise OSError(number, os.strerror(number), str(first), None, str(second))


def _sibling(path: Path) -> Path:
    """A fresh name beside `path`, on the same file system, so that a rename commits."""
    return path.with_name(f"{path.name}.tmp-{uuid.uuid4().hex}")
