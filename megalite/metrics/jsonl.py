"""metrics.jsonl: one JSON object for each logged step, floats at full precision, every step once."""

import json
import math
import os
from pathlib import Path
from typing import Any

from megalite.log import get_logger
from megalite.metrics.base import Row


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The rows of a metrics file, steps rising; nothing when the file does not exist.

    `nan`, `inf` and `-inf`, which JSON has no numbers for, stand in the file as texts and are floats here again. A line
    that is no row (the last one, torn by a kill) is left out with a warning.
    """
    rows: dict[int, dict[str, Any]] = {}
    if not path.is_file():
        return []
    for number, line in enumerate(path.read_bytes().splitlines(), start=1):
        row = _decode(line)
        if row is None:
            get_logger(__name__).warning("%s, line %d is torn (a run was killed?) and is left out", path, number)
        else:
            rows[row["step"]] = row
    return [rows[step] for step in sorted(rows)]


class JsonlSink:
    """Appends to a metrics file; each row is one write, so a reader at any time sees whole rows.

    Python's `json` writes floats as `repr` does, so reading them back gives the same bits.
    """

    def __init__(self, path: Path, resume_step: int) -> None:
        """Open the file at `path`, keeping its rows up to `resume_step`: an earlier session may have gone further."""
        path.parent.mkdir(parents=True, exist_ok=True)
        rows = [row for row in read_metrics(path) if row["step"] <= resume_step]
        lines = [_encode(row) for row in rows]
        temporary = path.with_name(path.name + ".tmp")
        with temporary.open("wb") as file:
            file.write(b"".join(lines))
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
        self._file = path.open("r+b", buffering=0)
        self._end = sum(len(line) for line in lines)
        self._last: dict[str, Any] = rows[-1] if rows else {"step": -1}
        self._last_start = self._end - (len(lines[-1]) if lines else 0)

    def log(self, step: int, row: Row) -> None:
        """Append a row; a second row of the newest step (a resumed run evaluates once more) merges into it.

        Raises `ValueError` when `step` is smaller than the newest one, `OSError` when the disk refuses; the row that
        follows then takes the place of what was half written.
        """
        if step < self._last["step"]:
            raise ValueError(f"step {step} comes after step {self._last['step']}")
        merges = step == self._last["step"]
        merged = {**self._last, **row} if merges else {"step": step, **row}
        start = self._last_start if merges else self._end
        line = _encode(merged)
        self._file.seek(start)
        if self._file.write(line) != len(line):
            raise OSError("the disk took only a part of the row")
        self._file.truncate(start + len(line))
        self._last, self._last_start, self._end = merged, start, start + len(line)

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def _encode(row: Row) -> bytes:
    plain = {
        key: str(value) if isinstance(value, float) and not math.isfinite(value) else value
        for key, value in row.items()
    }
    return json.dumps(plain, allow_nan=False).encode() + b"\n"


def _decode(line: bytes) -> dict[str, Any] | None:
    try:
        row = json.loads(line)
        if not isinstance(row, dict) or type(row.get("step")) is not int:
            return None
        return {
            key: None if value is None else value if key == "step" else _number(value) for key, value in row.items()
        }
    except (ValueError, TypeError):
        return None


def _number(value: Any) -> float | int:
    return value if type(value) is int else float(value)
