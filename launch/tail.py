"""The end of a file that may be huge, or no file at all."""

import json
import os
from pathlib import Path
from typing import Any

TAIL_BYTES = 1 << 18
_SMALL_BYTES = 1 << 20  # files that a run writes in one piece are far smaller; others of their name are not ours


def tail_lines(path: Path, size: int = TAIL_BYTES) -> tuple[list[str], bool]:
    """The last whole lines of a file, at most `size` bytes; and whether there is more before them.

    Nothing where there is no file that can be read.
    """
    try:
        if not path.is_file():  # a pipe would wait for somebody to write
            return [], False
        with open(path, "rb") as file:
            length = file.seek(0, os.SEEK_END)
            start = file.seek(max(0, length - size))
            text = file.read(size)
    except OSError:
        return [], False
    if start:
        text = text.partition(b"\n")[2]
    return text.decode(errors="replace").removesuffix("\n").split("\n") if text else [], start > 0


def read_small(path: Path) -> str | None:
    """The text of a file that is known to be small; None where it is not there, not readable, or not small."""
    try:
        if not path.is_file() or path.stat().st_size > _SMALL_BYTES:
            return None
        return path.read_text(encoding="utf-8")
    except (OSError, ValueError):
        return None


def tail_rows(path: Path) -> list[dict[str, Any]]:
    """The last rows of a metrics file, as they stand there; a torn line is left out without a word."""
    rows = []
    for line in tail_lines(path)[0]:
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(row, dict) and type(row.get("step")) is int:
            rows.append(row)
    return rows


def modified(path: Path) -> float | None:
    """When a file was written to last, in seconds since 1970; None where there is none."""
    try:
        return path.stat().st_mtime
    except OSError:
        return None
