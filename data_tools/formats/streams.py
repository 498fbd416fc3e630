"""The bytes of a file, decompressed as a stream, and its lines; memory bounded whatever stands in it."""

import io
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from megalite.errors import DataError

from .rows import BadFileError, BadRowError, too_large

BOM = b"\xef\xbb\xbf"
COMPRESSIONS = (".gz", ".zst")
_COMPRESSED_INPUT = 1 << 13  # bytes at a time: even the densest frame of zstd expands to some 256 MB at most
# Text compresses by 3 to 20, a log by 100. Above this a file is made to fill memory or disk, or holds nothing.
_MAX_RATIO = 500
_RATIO_FROM = 1 << 24  # bytes decompressed before the ratio is looked at


def iter_lines(file: IO[bytes], limit: int, stop: int | None = None) -> Iterator[bytes | BadRowError]:
    """The lines of a file with their ends. One longer than `limit` bytes is read over and is a bad row.

    `stop`: lines that begin there or later are not read.
    """
    while (stop is None or file.tell() < stop) and (line := file.readline(limit + 1)):
        if len(line) > limit and not line.endswith(b"\n"):
            while line and not line.endswith(b"\n"):
                line = file.readline(1 << 20)
            yield too_large(limit)
        else:
            yield line


@contextmanager
def open_bytes(path: Path, start: int = 0) -> Iterator[IO[bytes]]:
    """A file's bytes, decompressed, without a byte order mark at its head; from byte `start` on, if it is not packed.

    What damage raises while it is read: `OSError`, `EOFError`, or `BadFileError` for a file made to fill the memory.
    """
    with open(path, "rb") as raw:
        file: io.BufferedReader = raw
        if path.suffix.lower() == ".gz":
            file = io.BufferedReader(_gzip_reader(raw), 1 << 16)
        elif path.suffix.lower() == ".zst":
            file = io.BufferedReader(_zstd_reader(raw, path), 1 << 16)
        if start:
            file.seek(start)
        elif file.peek(len(BOM))[: len(BOM)] == BOM:
            file.read(len(BOM))
        yield file


class _Decompressed(io.RawIOBase):
    """The bytes of a compressed file of one or more frames, up to where it is cut short or damaged.

    The libraries' own readers lose what they had decompressed before the damage, or do not notice a cut.
    """

    def __init__(self, file: IO[bytes], new_frame: Callable[[], Any], errors: type[Exception]):
        self._file, self._new_frame, self._errors = file, new_frame, errors
        self._frame: Any = None
        self._input = b""
        self._output = memoryview(b"")
        self._num_read = self._num_written = 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._output:
            if not self._input:
                self._input = self._file.read(_COMPRESSED_INPUT)
                self._num_read += len(self._input)
            if not self._input:
                if self._frame is not None:
                    raise EOFError("compressed file ended before the end of its stream")
                return 0
            self._output = memoryview(self._decompress(self._input))
            self._num_written += len(self._output)
            if self._num_written > max(_RATIO_FROM, _MAX_RATIO * self._num_read):
                raise BadFileError("decompression bomb", f"it expands by more than {_MAX_RATIO}")
        count = min(len(buffer), len(self._output))
        buffer[:count] = self._output[:count]
        self._output = self._output[count:]
        return count

    def _decompress(self, data: bytes) -> bytes:
        if self._frame is None:
            data = data.lstrip(b"\0")  # files are padded so between frames
            if not data:
                self._input = b""
                return b""
            self._frame = self._new_frame()
        try:
            output = self._frame.decompress(data)
        except self._errors as error:
            raise OSError(str(error)) from None
        self._input = self._frame.unused_data  # what follows a frame is the next one
        if self._frame.eof:
            self._frame = None
        return output


def _gzip_reader(raw: IO[bytes]) -> _Decompressed:
    return _Decompressed(raw, lambda: zlib.decompressobj(wbits=31), zlib.error)  # 31: gzip's header and checksum


def _zstd_reader(raw: IO[bytes], path: Path) -> _Decompressed:
    try:
        import zstandard
    except ModuleNotFoundError:
        raise DataError(f"{path}: reading .zst needs one more package: pip install megalite[data]") from None
    return _Decompressed(raw, zstandard.ZstdDecompressor().decompressobj, zstandard.ZstdError)
