"""Rows of one file: .txt, .jsonl (plain, .gz or .zst) and .parquet, as a stream, memory bounded by one document.

Every reader yields `(position, fields)`: where the row stands, for messages, and its raw values by column. A value that
should be text is bytes or str and is not decoded here, so that one bad row costs one row.
"""

import io
import json
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from megalite.config.schema_data import ReaderConfig
from megalite.errors import DataError

Row = tuple[str, "dict[str, Any] | BadRowError"]

BOM = b"\xef\xbb\xbf"
FORMATS = ("txt", "jsonl", "parquet")
COMPRESSIONS = (".gz", ".zst")
_ROWS_AT_ONCE = 512  # of a parquet row group
_COMPRESSED_INPUT = 1 << 13  # bytes at a time: even the densest frame of zstd expands to some 256 MB at most


class BadRowError(Exception):
    """One row cannot be used; `reason` is the name it is counted under, `detail` adds to the message."""

    def __init__(self, reason: str, detail: str = ""):
        super().__init__(f"{reason} ({detail})" if detail else reason)
        self.reason = reason


class BadFileError(BadRowError):
    """The rest of a file cannot be read."""


def format_of(path: Path) -> str | None:
    """The format that a file's ending tells, or None."""
    name = path.name.lower()
    for compression in COMPRESSIONS:
        name = name.removesuffix(compression)
    ending = name.rsplit(".", 1)[-1] if "." in name else ""
    return ending if ending in FORMATS else None


def iter_rows(path: Path, format_name: str, columns: Sequence[str], config: ReaderConfig) -> Iterator[Row]:
    """The rows of a file. `columns`: the text column first, then the others that the configuration asks for.

    Raises `BadFileError` when the file is empty or damaged, `DataError` when a column is missing or of an unfit type.
    """
    try:
        if path.stat().st_size == 0:
            raise BadFileError("empty file")
        if format_name == "parquet":
            rows = _iter_parquet(path, columns)
        elif format_name == "jsonl":
            rows = _iter_jsonl(path, columns)
        else:
            rows = _iter_text(path, columns, config.document)
        row = None
        for row in rows:
            yield row
        if row is None:
            raise BadFileError("empty file", "no rows, or blank lines only")
    except (OSError, EOFError, zlib.error) as error:
        raise BadFileError("damaged or unreadable file", str(error)) from None


def _iter_text(path: Path, columns: Sequence[str], document: str) -> Iterator[Row]:
    _require_columns(path, columns, {columns[0]})
    with _open(path) as file:
        if document == "file":
            yield "line 1", {columns[0]: file.read()}
            return
        lines: list[bytes] = []
        for number, line in enumerate(file, start=1):
            if document == "line":
                if line.strip():
                    yield f"line {number}", {columns[0]: _without_newline(line)}
            elif line.strip():
                lines.append(line)
            elif lines:
                yield f"line {number - len(lines)}", {columns[0]: _without_newline(b"".join(lines))}
                lines = []
        if lines:
            yield f"line {number - len(lines) + 1}", {columns[0]: _without_newline(b"".join(lines))}


def _iter_jsonl(path: Path, columns: Sequence[str]) -> Iterator[Row]:
    first = True
    with _open(path) as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            row = _parse_json(line)
            if first and isinstance(row, dict):
                _require_columns(path, columns, row)
                first = False
            yield f"line {number}", row


def _parse_json(line: bytes) -> "dict[str, Any] | BadRowError":
    try:
        row = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        return BadRowError("invalid UTF-8", f"byte {error.start} of the line")
    except (ValueError, RecursionError) as error:
        return BadRowError("broken JSON", str(error))
    return row if isinstance(row, dict) else BadRowError("not a JSON object", f"a {type(row).__name__}")


def _iter_parquet(path: Path, columns: Sequence[str]) -> Iterator[Row]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        # Without the check a flipped bit in a page loads silently (it needs checksums in the file, too).
        with pq.ParquetFile(path, page_checksum_verification=True) as file:
            names = file.schema_arrow.names
            _require_columns(path, columns, names)
            if twice := [name for name in columns if names.count(name) > 1]:
                raise DataError(f"{path}: {names.count(twice[0])} columns are called {twice[0]!r}; rename all but one")
            for name in columns:
                _require_type(path, name, file.schema_arrow.field(name).type, text=name == columns[0])
            number = 0
            for group in range(file.num_row_groups):
                for batch in file.iter_batches(_ROWS_AT_ONCE, row_groups=[group], columns=list(dict.fromkeys(columns))):
                    values = {name: _raw_values(batch.column(name)) for name in columns}
                    for i in range(batch.num_rows):
                        number += 1
                        yield f"row {number}", {name: column[i] for name, column in values.items()}
    except pa.ArrowException as error:
        raise BadFileError("damaged or unreadable file", str(error).splitlines()[0]) from None


def _raw_values(column: Any) -> list[Any]:
    """Strings as bytes: pyarrow's own conversion would stop a whole batch at one invalid byte."""
    import pyarrow as pa

    if pa.types.is_dictionary(column.type):
        column = column.dictionary_decode()
    return (column.cast(pa.large_binary()) if _is_string(column.type) else column).to_pylist()


def _is_string(arrow_type: Any) -> bool:
    import pyarrow as pa

    return pa.types.is_string(arrow_type) or pa.types.is_large_string(arrow_type) or pa.types.is_string_view(arrow_type)


def _require_type(path: Path, name: str, arrow_type: Any, text: bool) -> None:
    import pyarrow as pa

    value_type = arrow_type.value_type if pa.types.is_dictionary(arrow_type) else arrow_type
    if _is_string(value_type) or pa.types.is_null(value_type) or (not text and pa.types.is_integer(value_type)):
        return
    raise DataError(f"{path}: column {name!r} has type {arrow_type}, expected strings; choose another reader.*_column")


def _require_columns(path: Path, wanted: Sequence[str], found: Any) -> None:
    missing = [name for name in wanted if name not in found]
    if missing:
        raise DataError(
            f"{path}: no column {', '.join(map(repr, missing))}; found: {', '.join(sorted(found))}. Set "
            "reader.text_column, id_column, source_column, language_column or split_column to columns of the file"
        )


def _without_newline(line: bytes) -> bytes:
    return line.removesuffix(b"\n").removesuffix(b"\r")


@contextmanager
def _open(path: Path) -> Iterator[IO[bytes]]:
    """A file's bytes, decompressed, without a byte order mark at its head."""
    with open(path, "rb") as raw:
        file: io.BufferedReader = raw
        if path.suffix.lower() == ".gz":
            file = io.BufferedReader(_gzip_reader(raw), 1 << 16)
        elif path.suffix.lower() == ".zst":
            file = io.BufferedReader(_zstd_reader(raw, path), 1 << 16)
        if file.peek(len(BOM))[: len(BOM)] == BOM:
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

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._output:
            if not self._input and not (block := self._file.read(_COMPRESSED_INPUT)):
                if self._frame is not None:
                    raise EOFError("compressed file ended before the end of its stream")
                return 0
            self._output = memoryview(self._decompress(self._input or block))
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
