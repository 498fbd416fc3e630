"""What the logs of a run say, merged by time: those of ranks, and what Slurm and the watchdog wrote beside them."""

import re
import time
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from megalite.redaction import redact_text

from ..tail import modified, tail_lines

_DATED = re.compile(r"(\d{4}-\d\d-\d\d \d\d:\d\d:\d\d),(\d{3}) (DEBUG|INFO|WARNING|ERROR|CRITICAL) (\S+): (.*)")
_RANK_LOG = re.compile(r"rank_(\d+)\.log")
_COLOURS = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")
_UNPRINTABLE = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")
_SAME_SECONDS = 2.0  # ranks that say the same within this time say it once
_STALL_LINES = 8
ERRORS = ("ERROR", "CRITICAL")


@dataclass(frozen=True)
class Entry:
    """One message of one rank, or of several that say the same."""

    time: float  # seconds since 1970
    ranks: tuple[int, ...]  # none: the watchdog
    level: str
    lines: tuple[str, ...]


@dataclass(frozen=True)
class OtherLog:
    """A log without times: Slurm's, a sweep's."""

    name: str
    lines: list[str]
    modified: float


def rank_logs(logs: Path) -> dict[int, Path]:
    """Rank -> its log file."""
    found = {path: _RANK_LOG.fullmatch(path.name) for path in _entries(logs)}
    return dict(sorted((int(match[1]), path) for path, match in found.items() if match))


def read_rank(rank: int, path: Path) -> list[Entry]:
    """The messages in the tail of a rank's log."""
    entries: list[Entry] = []
    for line in tail_lines(path)[0]:
        line = clean(line)
        if match := _DATED.fullmatch(line):
            seconds, milliseconds, level, _, text = match.groups()
            entries.append(Entry(_seconds(seconds) + int(milliseconds) / 1000, (rank,), level, (text,)))
        elif entries:  # a message of several lines
            entries[-1] = replace(entries[-1], lines=(*entries[-1].lines, line))
    return entries


def read_stalls(logs: Path) -> list[Entry]:
    """What the watchdog found, each time that it ended the job: the diagnosis and where the ranks stood."""
    entries = []
    for path in sorted(path for path in _entries(logs) if re.fullmatch(r"stall_\d+\.txt", path.name)):
        when = modified(path)
        if when is not None and (lines := _head(path)):
            entries.append(Entry(when, (), "ERROR", (*map(clean, lines), f"stacks: {path}")))
    return entries


def other_logs(run_dir: Path) -> list[OtherLog]:
    """Logs that are of no rank, the newest first."""
    found = []
    for path in [*_entries(run_dir), *_entries(run_dir / "logs")]:
        if path.suffix == ".log" and not _RANK_LOG.fullmatch(path.name) and (when := modified(path)) is not None:
            found.append(OtherLog(path.name, [clean(line) for line in tail_lines(path)[0]], when))
    return sorted(found, key=lambda log: -log.modified)


def merge(parts: Iterable[Sequence[Entry]], lines: int, levels: Collection[str] | None = None) -> list[Entry]:
    """The newest entries of all `parts` by time, as many as fill `lines`, the same words of several ranks once.

    Holds no more than twice as many entries at a time as it returns, and one part.
    """
    kept: list[Entry] = []
    for part in parts:
        kept += [entry for entry in part if levels is None or entry.level in levels]
        kept = _newest(_joined(kept), lines)
    return kept


def clean(line: str) -> str:
    """A line that a terminal can be given: no colours or other commands to it, no secrets of URLs."""
    return redact_text(_UNPRINTABLE.sub("�", _COLOURS.sub("", line.rstrip("\r"))))


def _joined(entries: list[Entry]) -> list[Entry]:
    """By time; entries of several ranks with the same words at about the same time become one."""
    joined: list[Entry] = []
    last: dict[tuple[str, tuple[str, ...]], int] = {}  # words -> place in `joined`
    for entry in sorted(entries, key=lambda entry: (entry.time, entry.ranks)):
        key = (entry.level, entry.lines)
        place = last.get(key)
        if place is not None and entry.time - joined[place].time <= _SAME_SECONDS:
            known = joined[place]
            if not set(known.ranks) & set(entry.ranks):
                joined[place] = replace(known, ranks=tuple(sorted((*known.ranks, *entry.ranks))))
                continue
        last[key] = len(joined)
        joined.append(entry)
    return joined


def _newest(entries: list[Entry], lines: int) -> list[Entry]:
    count = 0
    for place in reversed(range(len(entries))):
        count += len(entries[place].lines)
        if count > lines:
            return entries[min(place + 1, len(entries) - 1) :]
    return entries


def _entries(folder: Path) -> list[Path]:
    try:
        return [path for path in folder.iterdir() if path.is_file()]
    except OSError:
        return []


def _head(path: Path) -> list[str]:
    """The first lines of a report: the diagnosis, and below it where the ranks stood."""
    try:
        with open(path, encoding="utf-8", errors="replace") as file:
            lines = [file.readline(4096).rstrip() for _ in range(_STALL_LINES)]
    except OSError:
        return []
    return [line for line in lines if line]


def _seconds(text: str) -> float:
    try:
        return time.mktime(time.strptime(text, "%Y-%m-%d %H:%M:%S"))
    except (ValueError, OverflowError):
        return 0.0
