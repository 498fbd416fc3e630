"""Documents as a stream, from files, folders and globs of .txt, .jsonl, .json, .html (.gz, .zst) and .parquet.

What is wrong with the input is either an error or a counted, logged skip, as `reader.on_bad` says. That covers a row
(invalid UTF-8, missing or empty text, a broken line) and a file (empty, cut short, unreadable: what could be read
before the damage is kept, the rest of the file is the skip). A mistake of the configuration is always an error: an
input that does not exist, a missing column, a split that is neither train nor validation.

An empty document, or one of white space only, is a bad row. Blank lines of .jsonl and of .txt are no documents.
"""

import glob
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megalite.config.schema_data import ReaderConfig
from megalite.errors import ConfigError, DataError
from megalite.log import get_logger

from .formats import (
    COMPRESSIONS,
    FORMATS,
    WHOLE,
    BadFileError,
    BadRowError,
    Span,
    format_of,
    iter_rows,
    plan_spans,
)

log = get_logger(__name__)

SPLITS = ("train", "validation")
_LOGGED_SKIPS = 10  # of each reason; the rest is counted only
_MAX_NAME = 100  # characters of a source's name, which becomes a folder's


@dataclass(frozen=True, slots=True)
class Document:
    """One document. `split` is None when no column tells it."""

    text: str
    num_bytes: int  # of the text in UTF-8
    id: str
    source: str
    language: str
    split: str | None


@dataclass
class ReadReport:
    """What became of the input: counts of files, documents and skips by reason."""

    files: int = 0
    documents: int = 0
    skipped: Counter[str] = field(default_factory=Counter)
    quiet: bool = False  # count skips without logging them
    messages: list[str] = field(default_factory=list)  # what was logged, or would have been


def iter_documents(inputs: Sequence[str], config: ReaderConfig, report: ReadReport) -> Iterator[Document]:
    """Stream the documents of `inputs` in a fixed order, counting into `report`.

    Raises `DataError` naming the file and the row; see the head of this module for what is skipped instead.
    """
    files = find_files(inputs, config.format)
    source = default_source(inputs, files, config)
    for path in files:
        yield from iter_file_documents(path, config, source, report)
    _log_skips(report)


def iter_file_documents(
    path: Path, config: ReaderConfig, source: str, report: ReadReport, span: Span = WHOLE, markup: bool = False
) -> Iterator[Document]:
    """Stream the documents of one file or a span of it; `source` is that of documents without a column for it.

    `markup`: documents of HTML files are the pages, not their text.
    """
    columns = [config.text_column]
    for column in (config.id_column, config.source_column, config.language_column, config.split_column):
        columns += [column] if column is not None else []
    report.files += 1
    try:
        for position, fields in iter_rows(path, _format(path, config), columns, config, span, markup):
            try:
                document = _document(fields, path, position, config, source)
            except BadRowError as bad:
                _skip_or_stop(bad, f"{path}, {position}", config, report)
                continue
            report.documents += 1
            yield document
    except BadFileError as bad:
        _skip_or_stop(bad, str(path), config, report)


def spans_of(path: Path, config: ReaderConfig) -> list[Span]:
    """The parts in which several workers may read a file."""
    return plan_spans(path, _format(path, config), config)


def _format(path: Path, config: ReaderConfig) -> str:
    format_name = format_of(path) if config.format == "auto" else config.format
    assert format_name is not None, "find_files lets through known endings only"
    return format_name


def find_files(inputs: Sequence[str], format_name: str) -> list[Path]:
    """The files that `inputs` name, each once: inputs in the order given, folders and globs sorted.

    A folder stands for all files below it with a known ending; hidden ones and others are left out. A link to nothing
    is among them: who reads it says so. Raises `DataError` for an input that matches nothing or is such a link, and for
    a file whose ending tells no format (with `reader.format=auto`).
    """
    if not inputs:
        raise DataError("input is empty: name files, folders or globs")
    found: dict[tuple[int, int], Path] = {}
    for name in inputs:
        if os.path.islink(name) and not os.path.exists(name):
            raise DataError(f"input {name!r} is a link to a file that does not exist")
        matches = [Path(name)] if os.path.exists(name) else [Path(p) for p in sorted(glob.glob(name, recursive=True))]
        if not matches:
            raise DataError(f"input {name!r} does not exist and matches no file")
        for match in matches:
            for path in _files_below(match) if match.is_dir() else [match]:
                if format_name == "auto" and format_of(path) is None:
                    raise DataError(f"{path}: its ending tells no format. Known: {_endings()}; or set reader.format")
                status = status_of(path)
                if (first := found.setdefault((status.st_dev, status.st_ino), path)) != path:
                    log.warning("%s is the same file as %s: read once", path, first)
    return list(found.values())


def status_of(path: Path) -> os.stat_result:
    """A file's; where a link leads to none, the link's own. Raises `OSError`."""
    return path.stat() if path.exists() else path.lstat()


def _files_below(folder: Path) -> list[Path]:
    paths = sorted(p for p in folder.rglob("*") if p.is_file() or not p.exists())
    visible = [p for p in paths if not any(part.startswith((".", "_")) for part in p.relative_to(folder).parts)]
    known = [p for p in visible if format_of(p)]
    if not known:
        raise DataError(f"the folder {folder} holds no file that ends in {_endings()}")
    if left_out := len(paths) - len(known):
        log.warning("%s: %d files are not read: other endings, or names that begin with . or _", folder, left_out)
    return known


def _endings() -> str:
    return ", ".join(f".{name}" for name in FORMATS) + f" (and {', '.join(COMPRESSIONS)} of all but parquet)"


def default_source(inputs: Sequence[str], files: Sequence[Path], config: ReaderConfig) -> str:
    """The source of documents without a column for it: `reader.source`, or the first input's name without endings."""
    path = inputs[0] if os.path.exists(inputs[0]) else files[0]
    name = os.path.basename(os.path.realpath(path))
    try:
        return _checked_name(config.source if config.source is not None else name.split(".")[0] or name)
    except BadRowError as bad:
        raise ConfigError(f"{bad}; set reader.source to a plain file name") from None


def _document(
    fields: "dict[str, Any] | BadRowError", path: Path, position: str, config: ReaderConfig, default_source: str
) -> Document:
    """The document of a row. Raises `BadRowError`, or `DataError` for a split that does not exist."""
    if isinstance(fields, BadRowError):
        raise fields
    text = _text(fields, config.text_column)
    if not text.strip():
        raise BadRowError("empty document")
    try:
        num_bytes = len(text.encode())
    except UnicodeEncodeError as error:
        raise BadRowError("invalid Unicode", f"{error.reason} at character {error.start}") from None
    default_id = f"{path.name}:{position.rsplit(' ', 1)[-1]}"
    split = _text(fields, config.split_column) if config.split_column else None
    if split is not None and split not in SPLITS:
        raise DataError(
            f"{path}, {position}: split {split!r} in column {config.split_column!r}, allowed: {', '.join(SPLITS)}"
        )
    return Document(
        text=text,
        num_bytes=num_bytes,
        id=_text(fields, config.id_column, numbers=True) if config.id_column else default_id,
        source=_checked_name(_text(fields, config.source_column) if config.source_column else default_source),
        language=_text(fields, config.language_column) if config.language_column else "",
        split=split,
    )


def _text(fields: dict[str, Any], column: str, numbers: bool = False) -> str:
    value = fields.get(column)
    if isinstance(value, bytes):
        try:
            return value.decode("utf-8")
        except UnicodeDecodeError as error:
            raise BadRowError("invalid UTF-8", f"byte {error.start} of {column!r}") from None
    if value is None:
        raise BadRowError(f"missing {column}")
    if numbers and isinstance(value, int):
        return str(value)
    if not isinstance(value, str):
        raise BadRowError(f"{column} is no text", f"a {type(value).__name__}")
    return value


def _checked_name(source: str) -> str:
    """A source's name becomes a folder, so it must be a plain file name."""
    fits = source.strip() and len(source) <= _MAX_NAME and source.isprintable()
    if not fits or source[0] in ".-" or set(source) & set("/\\"):
        raise BadRowError("unfit source name", f"{source[:_MAX_NAME]!r}: it names a folder of the output")
    return source


def _skip_or_stop(bad: BadRowError, where: str, config: ReaderConfig, report: ReadReport) -> None:
    if config.on_bad == "stop":
        raise DataError(f"{where}: {bad}. Mend the input, or set reader.on_bad=skip to skip and count what is bad")
    report.skipped[bad.reason] += 1
    if report.skipped[bad.reason] <= _LOGGED_SKIPS:
        report.messages.append(f"skipped {where}: {bad}")
        if not report.quiet:
            log.warning("%s", report.messages[-1])


def _log_skips(report: ReadReport) -> None:
    for reason, count in [] if report.quiet else sorted(report.skipped.items()):
        log.warning("skipped in all: %d x %s", count, reason)
