"""Large files cut into spans that several workers read side by side; rows keep the numbers they have in the file."""

from dataclasses import dataclass
from pathlib import Path

from megalite.config.schema_data import ReaderConfig

from .streams import COMPRESSIONS

SPAN_BYTES = 1 << 26  # of a file, or of the columns' values in parquet
_BLOCK = 1 << 23


@dataclass(frozen=True)
class Span:
    """A part of a file: bytes `start` to `stop`, or row groups of parquet; `first` rows or lines are before it."""

    start: int
    stop: int | None
    first: int


WHOLE = Span(0, None, 0)


def plan_spans(path: Path, format_name: str, config: ReaderConfig) -> list[Span]:
    """The parts of a file in order; `WHOLE` where it is small or cannot be cut.

    Lines are counted on the way, so a file is read once for it. Raises nothing: what is wrong with a file is said by
    who reads its rows.
    """
    try:
        if path.stat().st_size <= SPAN_BYTES:
            return [WHOLE]
        if format_name == "parquet":
            return [*_row_groups(path)] or [WHOLE]
        by_line = format_name == "jsonl" or (format_name == "txt" and config.document == "line")
        return [*_lines(path)] if by_line and path.suffix.lower() not in COMPRESSIONS else [WHOLE]
    except OSError:
        return [WHOLE]


def _lines(path: Path) -> list[Span]:
    spans, start, first = [], 0, 0
    position = lines = 0  # of the block that is looked at
    with open(path, "rb") as file:
        while block := file.read(_BLOCK):
            # A span ends behind the last line end of the block with which it is long enough.
            end = block.rfind(b"\n") + 1
            if end and position + end - start >= SPAN_BYTES:
                before = lines + block.count(b"\n", 0, end)
                spans.append(Span(start, position + end, first))
                start, first = position + end, before
            lines += block.count(b"\n")
            position += len(block)
    return [*spans, Span(start, position, first)] if start < position else spans


def _row_groups(path: Path) -> list[Span]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path) as file:
            groups = [file.metadata.row_group(i) for i in range(file.num_row_groups)]
            sizes = [(group.total_byte_size, group.num_rows) for group in groups]
    except pa.ArrowException:
        return []
    spans, start, first, size, rows = [], 0, 0, 0, 0
    for number, (num_bytes, num_rows) in enumerate(sizes, start=1):
        size, rows = size + num_bytes, rows + num_rows
        if size >= SPAN_BYTES or number == len(sizes):
            spans.append(Span(start, number, first))
            start, first, size = number, rows, 0
    return spans
