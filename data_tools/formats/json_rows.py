"""Rows of .jsonl, a JSON object a line, and of .json, an array of objects or one object after another."""

import codecs
import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, Any

from .rows import BadFileError, BadRowError, Row, require_columns
from .spans import Span
from .streams import iter_lines, open_bytes

_WHITE = re.compile(r"[ \t\r\n]*")
_READ_AT_ONCE = 1 << 20
_LONGEST_LITERAL = 12  # characters at the end of what was read that may be half of -Infinity or of \\ud83d\\ude00


def iter_jsonl(path: Path, columns: Sequence[str], limit: int, span: Span) -> Iterator[Row]:
    """The lines that are not blank; a bad line is one bad row."""
    first = True
    with open_bytes(path, span.start) as file:
        for number, line in enumerate(iter_lines(file, limit, span.stop), start=span.first + 1):
            if isinstance(line, BadRowError):
                yield f"line {number}", line
                continue
            if not line.strip():
                continue
            row = _parse(line, columns)
            if first and isinstance(row, dict):
                require_columns(path, columns, row)
                first = False
            yield f"line {number}", row


def iter_json(path: Path, columns: Sequence[str], limit: int) -> Iterator[Row]:
    """The items of a JSON array, or of a file that is one object after another, read a megabyte at a time.

    Raises `BadFileError` where the file is no JSON, or an item is longer than `limit` characters: where the next one
    begins cannot be told then.
    """
    first = True
    with open_bytes(path) as file:
        for number, (item, source) in enumerate(_Items(file, limit), start=1):
            row = _checked(item, source, columns)
            if first and isinstance(row, dict):
                require_columns(path, columns, row)
                first = False
            yield f"item {number}", row


def _parse(line: bytes, columns: Sequence[str]) -> "dict[str, Any] | BadRowError":
    import orjson

    try:
        item = orjson.loads(line)
    except ValueError:
        # Python's own reader takes NaN and unpaired surrogates, which many programs write, and tells what is wrong.
        try:
            item = json.loads(line.decode("utf-8"))
        except UnicodeDecodeError as error:
            return BadRowError("invalid UTF-8", f"byte {error.start} of the line")
        except (ValueError, RecursionError) as error:
            return BadRowError("broken JSON", str(error))
    return _checked(item, line, columns)


def _checked(item: Any, source: bytes | str, columns: Sequence[str]) -> "dict[str, Any] | BadRowError":
    """The item when it is an object that has no wanted key twice: which of the values is meant cannot be told."""
    if not isinstance(item, dict):
        return BadRowError("not a JSON object", f"a {type(item).__name__}")
    for name in columns:
        quoted: Any = f'"{name}"' if isinstance(source, str) else f'"{name}"'.encode()
        if source.count(quoted) > 1 and _num_keys(source, name) > 1:
            return BadRowError("duplicate key", repr(name))
    return item


def _num_keys(source: bytes | str, name: str) -> int:
    """How often the outermost object has the key `name`."""
    keys: list[str] = []

    def note(pairs: list[tuple[str, Any]]) -> None:
        keys[:] = [key for key, _ in pairs]  # the outermost object comes last

    try:
        json.loads(source, object_pairs_hook=note)
    except (ValueError, RecursionError):  # orjson reads deeper, and longer numbers: it has said that the row is fine
        return 1
    return keys.count(name)


class _Items:
    """The items of a JSON array or sequence with their source text, from a window that moves over the file."""

    def __init__(self, file: IO[bytes], limit: int):
        self._file, self._limit = file, limit
        # A byte that is no UTF-8 becomes an unpaired surrogate, which spoils its own item only.
        self._utf8 = codecs.getincrementaldecoder("utf-8")("surrogateescape")
        self._text, self._at, self._ended = "", 0, False
        self._json = json.JSONDecoder()

    def __iter__(self) -> Iterator[tuple[Any, str]]:
        is_array = self._next_character() == "["
        self._at += is_array
        first = True
        while (character := self._next_character()) and not (is_array and character == "]"):
            if is_array and not first:
                if character != ",":
                    raise BadFileError("broken JSON", f"expected , or ] after an item, found {character!r}")
                self._at += 1
                self._next_character()
            start, item = self._item()
            yield item, self._text[start : self._at]
            first = False
        if is_array and not character:
            raise BadFileError("broken JSON", "the array does not end")
        self._at += is_array
        if self._next_character():
            raise BadFileError("broken JSON", "something follows the array")

    def _next_character(self) -> str:
        """The next one that is no white space; "" at the end of the file."""
        while True:
            self._at = _WHITE.match(self._text, self._at).end()  # type: ignore[union-attr]  # matches always
            if self._at < len(self._text) or not self._read():
                return self._text[self._at : self._at + 1]

    def _item(self) -> tuple[int, Any]:
        """Where the item begins, and its value; the window grows until the item is whole."""
        while True:
            size = len(self._text)
            try:
                item, end = self._json.raw_decode(self._text, self._at)
            except RecursionError as error:
                raise BadFileError("broken JSON", str(error)) from None
            except json.JSONDecodeError as error:
                is_cut = error.msg.startswith("Unterminated string") or error.pos >= size - _LONGEST_LITERAL
                if not is_cut or not self._read():
                    raise BadFileError("broken JSON", error.msg) from None
                continue
            except ValueError as error:  # a whole number of more digits than Python reads
                raise BadFileError("broken JSON", str(error)) from None
            # A number may go on behind the end of the window, and what is read of 1e+5 may be 1e+.
            is_whole = isinstance(item, dict | list | str) or end < size - 2
            if is_whole or not self._read():
                start, self._at = self._at, end
                return start, item

    def _read(self) -> bool:
        """Let the window begin at the current item and grow: by as much as it has, so that the work stays linear."""
        if self._ended:
            return False
        self._text, self._at = self._text[self._at :], 0
        if len(self._text) > self._limit:
            raise BadFileError("document too large", f"over reader.max_document_bytes={self._limit}, or it has no end")
        data = self._file.read(max(_READ_AT_ONCE, len(self._text)))
        self._ended = not data
        self._text += self._utf8.decode(data, final=self._ended)
        return True
