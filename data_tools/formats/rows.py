"""Rows as every format gives them, and what can be wrong with one."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megalite.errors import DataError

# Where a row stands, for messages, and its raw values by column. A value that should be text is bytes or str and is not
# decoded here, so that one bad row costs one row.
Row = tuple[str, "dict[str, Any] | BadRowError"]


class BadRowError(Exception):
    """One row cannot be used; `reason` is the name it is counted under, `detail` adds to the message."""

    def __init__(self, reason: str, detail: str = ""):
        super().__init__(f"{reason} ({detail})" if detail else reason)
        self.reason = reason


class BadFileError(BadRowError):
    """The rest of a file cannot be read."""


def too_large(limit: int, hint: str = "") -> BadRowError:
    """The row of a document over `reader.max_document_bytes`."""
    return BadRowError("document too large", f"over reader.max_document_bytes={limit}{hint}")


def require_columns(path: Path, wanted: Sequence[str], found: Any) -> None:
    """Raise `DataError` unless all columns `wanted` are `found`."""
    missing = [name for name in wanted if name not in found]
    if missing:
        raise DataError(
            f"{path}: no column {', '.join(map(repr, missing))}; found: {', '.join(sorted(found))}. Set "
            "reader.text_column, id_column, source_column, language_column or split_column to columns of the file"
        )
