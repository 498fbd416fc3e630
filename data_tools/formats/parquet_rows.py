"""Rows of parquet files."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from megalite.errors import DataError

from .rows import BadFileError, Row, require_columns
from .spans import Span

_ROWS_AT_ONCE = 512  # of a row group
_BYTES_AT_ONCE = 1 << 24  # of text, on average
_READ_AT_ONCE = 1 << 20  # bytes of a column of a row group


def iter_parquet(path: Path, columns: Sequence[str], span: Span) -> Iterator[Row]:
    """The rows of a parquet file, its page checksums verified.

    Raises `BadFileError` for damage, encryption and codecs that pyarrow lacks, `DataError` for a missing or unfit
    column.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        # Without the check a flipped bit in a page loads silently (it needs checksums in the file, too).
        # With a buffer a column of a row group, which may be gigabytes, is not read at once.
        with pq.ParquetFile(path, page_checksum_verification=True, buffer_size=_READ_AT_ONCE) as file:
            names = file.schema_arrow.names
            require_columns(path, columns, names)
            if twice := [name for name in columns if names.count(name) > 1]:
                raise DataError(f"{path}: {names.count(twice[0])} columns are called {twice[0]!r}; rename all but one")
            for name in columns:
                _require_type(path, name, file.schema_arrow.field(name).type, text=name == columns[0])
            number = span.first
            for group in range(file.num_row_groups)[span.start : span.stop]:
                rows = _rows_at_once(file.metadata.row_group(group), columns[0])
                for batch in file.iter_batches(rows, row_groups=[group], columns=list(dict.fromkeys(columns))):
                    values = {name: _raw_values(batch.column(name)) for name in columns}
                    for i in range(batch.num_rows):
                        number += 1
                        yield f"row {number}", {name: column[i] for name, column in values.items()}
    except pa.ArrowException as error:
        raise BadFileError("damaged or unreadable file", str(error).splitlines()[0]) from None


def _rows_at_once(group: Any, text_column: str) -> int:
    """Fewer rows where documents are long."""
    chunks = [group.column(i) for i in range(group.num_columns)]
    size = sum(chunk.total_uncompressed_size for chunk in chunks if chunk.path_in_schema == text_column)
    return max(1, min(_ROWS_AT_ONCE, _BYTES_AT_ONCE * group.num_rows // max(1, size)))


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
