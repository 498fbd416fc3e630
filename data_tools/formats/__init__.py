"""Rows of one file: .txt, .html, .jsonl and .json (plain, .gz or .zst) and .parquet, as a stream, memory bounded.

Every reader yields `(position, fields)`, as `rows.Row` says.
"""

import itertools
import re
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO

from megalite.config.schema_data import ReaderConfig

from .json_rows import iter_json, iter_jsonl
from .parquet_rows import iter_parquet
from .rows import BadFileError, BadRowError, Row, require_columns, too_large
from .spans import WHOLE, Span, plan_spans
from .streams import COMPRESSIONS, iter_lines, open_bytes

__all__ = [
    "COMPRESSIONS",
    "FORMATS",
    "WHOLE",
    "BadFileError",
    "BadRowError",
    "Row",
    "Span",
    "format_of",
    "iter_rows",
    "plan_spans",
]

FORMATS = ("txt", "jsonl", "json", "html", "parquet")
_OTHER_ENDINGS = {"htm": "html", "xhtml": "html", "ndjson": "jsonl"}
_CHARSET = re.compile(rb"""<meta[^>]{0,200}?charset\s*=\s*["']?\s*([A-Za-z0-9_:.-]{1,40})""", re.IGNORECASE)
_CHARSET_WITHIN = 1024  # bytes, as HTML demands
# What browsers take these names for (WHATWG Encoding): a superset, which pages under the old name really use.
_REALLY = {
    "gb2312": "gb18030",
    "gbk": "gb18030",
    "big5": "big5-hkscs",
    "iso-8859-1": "cp1252",
    "ascii": "cp1252",
    "us-ascii": "cp1252",
    "latin1": "cp1252",
    "shift_jis": "cp932",
    "euc-kr": "cp949",
    "ks_c_5601-1987": "cp949",
}


def format_of(path: Path) -> str | None:
    """The format that a file's ending tells, or None."""
    *_, ending, last = ("", "", *path.name.lower().split("."))
    compressed = f".{last}" in COMPRESSIONS
    ending = ending if compressed else last
    ending = _OTHER_ENDINGS.get(ending, ending)
    # Parquet compresses its pages itself, and is not read as a stream.
    return ending if ending in FORMATS and "." in path.name and not (compressed and ending == "parquet") else None


def iter_rows(
    path: Path,
    format_name: str,
    columns: Sequence[str],
    config: ReaderConfig,
    span: Span = WHOLE,
    markup: bool = False,
) -> Iterator[Row]:
    """The rows of a file or of a span of it. `columns`: the text column first, then the others that are asked for.

    `markup`: an HTML file's row is the page as it stands, for a step of the cleaning that takes the text out of it.

    Raises `BadFileError` when the file is empty, damaged, or another one at the end than at the beginning, `DataError`
    when a column is missing or of an unfit type.
    """
    limit = config.max_document_bytes
    if not path.exists():
        raise BadFileError("link to a file that does not exist")
    try:
        before = path.stat()
        if before.st_size == 0:
            raise BadFileError("empty file")
        if format_name == "parquet":
            rows = iter_parquet(path, columns, span)
        elif format_name == "jsonl":
            rows = iter_jsonl(path, columns, limit, span)
        elif format_name == "json":
            rows = iter_json(path, columns, limit)
        elif format_name == "html":
            rows = _iter_html(path, columns, limit, markup)
        else:
            rows = _iter_text(path, columns, config.document, limit, span)
        row = None
        for row in rows:
            text = None if isinstance(row[1], BadRowError) else row[1].get(columns[0])
            yield row if not isinstance(text, str | bytes) or len(text) <= limit else (row[0], too_large(limit))
        after = path.stat()
        if (before.st_size, before.st_mtime_ns, before.st_ino) != (after.st_size, after.st_mtime_ns, after.st_ino):
            raise BadFileError("file changed while it was read", f"{before.st_size} bytes became {after.st_size}")
        if row is None and span == WHOLE:
            raise BadFileError("empty file", "no rows, or blank lines only")
    except (OSError, EOFError, zlib.error) as error:
        raise BadFileError("damaged or unreadable file", str(error)) from None


def _iter_text(path: Path, columns: Sequence[str], document: str, limit: int, span: Span) -> Iterator[Row]:
    require_columns(path, columns, {columns[0]})
    with open_bytes(path, span.start) as file:
        if document == "file":
            text = file.read(limit + 1)
            hint = "; reader.document=blank_line or line cuts a file"
            yield "line 1", {columns[0]: text} if len(text) <= limit else too_large(limit, hint)
            return
        parts = _lines(file, limit, span) if document == "line" else _paragraphs(file, limit)
        for number, part in parts:
            yield f"line {number}", part if isinstance(part, BadRowError) else {columns[0]: _without_newline(part)}


def _lines(file: IO[bytes], limit: int, span: Span) -> Iterator[tuple[int, bytes | BadRowError]]:
    """The lines that are not blank, with their numbers."""
    for number, line in enumerate(iter_lines(file, limit, span.stop), start=span.first + 1):
        if isinstance(line, BadRowError) or line.strip():
            yield number, line


def _paragraphs(file: IO[bytes], limit: int) -> Iterator[tuple[int, bytes | BadRowError]]:
    """The runs of lines between blank lines, with the number of the first."""
    lines: list[bytes] = []
    first = size = 0
    for number, line in enumerate(itertools.chain(iter_lines(file, limit), [b""]), start=1):
        if isinstance(line, bytes) and not line.strip():
            if size:
                yield first, too_large(limit) if size > limit else b"".join(lines)
            lines, size = [], 0
            continue
        first = first if size else number
        size += limit + 1 if isinstance(line, BadRowError) else len(line)
        if size > limit:
            lines = []  # the rest of the paragraph is read over
        elif isinstance(line, bytes):
            lines.append(line)


def _iter_html(path: Path, columns: Sequence[str], limit: int, markup: bool) -> Iterator[Row]:
    """One document: the text of the page (see `cleaning.markup`), or with `markup` what `cleaning` knows for a page."""
    from ..cleaning.fragments import as_page
    from ..cleaning.markup import html_to_text

    require_columns(path, columns, {columns[0]})
    with open_bytes(path) as file:
        page = file.read(limit + 1)
    if len(page) > limit:
        yield "line 1", too_large(limit)
        return
    try:
        source = _decoded(page)
        yield "line 1", {columns[0]: as_page(source) if markup else html_to_text(source)}
    except BadRowError as bad:
        yield "line 1", bad
    except ValueError as error:
        yield "line 1", BadRowError("broken HTML", str(error))


def _decoded(page: bytes) -> str:
    """A page is UTF-8, or what its <meta charset> says."""
    try:
        return page.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        declared = _CHARSET.search(page[:_CHARSET_WITHIN])
        name = declared[1].decode("ascii").lower() if declared else "utf-8"
        try:
            return page.decode(_REALLY.get(name, name))
        except (UnicodeDecodeError, LookupError):
            where = f"byte {error.start}" if name == "utf-8" else f"nor is the page {name}, as it says"
            raise BadRowError("invalid UTF-8", where) from None


def _without_newline(line: bytes) -> bytes:
    return line.removesuffix(b"\n").removesuffix(b"\r")
