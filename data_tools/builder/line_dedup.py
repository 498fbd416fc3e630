"""Lines that stand in an earlier document too, or earlier in the same one: menus, licences, headings of web pages.

It takes two readings of the input. In the first, workers write the 128-bit hashes of the lines of their units; then,
over all units, each line that has an earlier twin is marked; in the second reading the marked lines are left out.
Lines are compared without white space at their ends; short ones are never left out, since they repeat in any text.
"""

import os
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import xxhash
from numpy.typing import NDArray

from .digests import in_share, sorted_by_digest

LINES, REPEATS = "lines", "repeats"  # of a unit: hashes (xxh3_128), and which of them stand earlier
_RECORDS = 1 << 20  # hashes in memory at a time


def _long_lines(lines: Sequence[str], min_characters: int) -> list[int]:
    """The indices of the lines that are looked at."""
    return [i for i, line in enumerate(lines) if len(line.strip()) >= min_characters]


def write_lines(folder: Path, texts: Iterable[str], min_characters: int) -> None:
    """Write the hashes of a unit's lines, whole or not at all."""
    if (folder / LINES).exists():
        return
    folder.mkdir(exist_ok=True)
    with open(folder / f"{LINES}.tmp", "wb") as file:
        for text in texts:
            lines = text.split("\n")
            looked_at = (lines[i].strip().encode() for i in _long_lines(lines, min_characters))
            file.write(b"".join(map(xxhash.xxh3_128_digest, looked_at)))
        file.flush()
        os.fsync(file.fileno())
    (folder / f"{LINES}.tmp").replace(folder / LINES)


def mark_repeats(folders: Sequence[Path]) -> None:
    """Write for each unit which of its lines stand earlier, in the order of the units."""
    digests = [_map(folder / LINES) for folder in folders]
    bases = np.concatenate([[0], np.cumsum([len(lines) for lines in digests])]).astype(np.int64)
    shares = -(-int(bases[-1]) // _RECORDS)
    repeats = [_marks(folder / REPEATS, len(lines)) for folder, lines in zip(folders, digests, strict=True)]
    for share in range(shares):
        found = []
        for base, lines in zip(bases, digests, strict=False):
            mine = np.flatnonzero(in_share(lines[:, 0], share, shares))
            found.append((lines[mine], base + mine))
        numbers, same = sorted_by_digest(*(np.concatenate(column) for column in zip(*found, strict=True)))
        later = numbers[1:][same]
        units = np.searchsorted(bases, later, side="right") - 1
        for unit in np.unique(units).tolist():
            repeats[unit][later[units == unit] - bases[unit]] = True


class LineDropper:
    """Leaves the marked lines of a unit out, document by document, in the order in which they were hashed."""

    def __init__(self, folder: Path, min_characters: int, position: int):
        """`position`: lines of documents that are already done."""
        self._repeats: NDArray[np.bool_] = np.fromfile(folder / REPEATS, np.bool_)
        self._min_characters = min_characters
        self.position = position

    def drop(self, text: str, counts: Counter[str]) -> str:
        """The text without its marked lines, which are counted."""
        lines = text.split("\n")
        looked_at = _long_lines(lines, self._min_characters)
        marks = self._repeats[self.position : self.position + len(looked_at)]
        self.position += len(looked_at)
        if not marks.any():
            return text
        left_out = {i for i, mark in zip(looked_at, marks, strict=True) if mark}
        counts["lines: left out"] += len(left_out)
        counts["lines: changed"] += 1
        return "\n".join(line for i, line in enumerate(lines) if i not in left_out)


def _marks(path: Path, size: int) -> NDArray[np.bool_]:
    """A file of `size` marks, mapped, none of them set."""
    path.unlink(missing_ok=True)
    if not size:
        path.touch()
        return np.empty(0, np.bool_)
    return np.memmap(path, np.bool_, "w+", shape=(size,))


def _map(path: Path) -> NDArray[np.uint64]:
    values = np.memmap(path, "<u8", "r") if path.stat().st_size else np.empty(0, "<u8")
    return values.reshape(-1, 2)
