"""What went wrong first in the last life of a run: later errors are mostly other ranks that lost the first one."""

import re
import time
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path

from megalite.guard.observer import FOLDER
from megalite.guard.run_state import RunState
from megalite.guard.stall import Record, name_ranks, parse_record

from ..tail import modified, read_small
from .log_entries import ERRORS, Entry, OtherLog, clean, other_logs, rank_logs, read_rank, read_stalls

# What ranks say when they lose another one (gloo, NCCL, sockets); its own end came before.
_LOST_ANOTHER = re.compile(
    r"connection (closed|reset|refused)|read error|broken pipe|socket|ncclRemoteError|ncclSystemError|timed out", re.I
)
_RANKS_START = re.compile(r"job \S+, start \d+: step.*|ranks died \(exit code \d+\): starting them again .*")
_OF_SLURM = ("srun: ", "slurmstepd: ")  # said of whatever ended a task
_OURS = re.compile(r"(Config|Data|Checkpoint|Resource)Error: .*")  # a driver's own word
_UNDATED_ERROR = re.compile(
    r"(rank \d+: )?\w*(Error|Exception)(: .*)?|rank \d+( \(pid \d+\))? (was ended by|ended with exit code) .*|"
    r"slurmstepd: error: .*|srun: error: .*"
)
_BEFORE, _AFTER = 4, 2  # entries of the same rank around an error


@dataclass(frozen=True)
class FirstError:
    """Who, when, what, and what stands around it. `context` has the entry itself in it."""

    who: str
    text: str
    time: float | None = None  # seconds since 1970; None: not known
    host: str = ""
    context: tuple[Entry, ...] = ()
    entry: Entry | None = None
    notes: tuple[str, ...] = ()

    @property
    def headline(self) -> str:
        """In one line."""
        return f"{self.who}: {self.text}" if self.who else self.text


@dataclass(frozen=True)
class _Silent:
    """A rank that ended without a word, and when it was last heard of."""

    record: Record
    time: float


def find_first_error(
    run_dir: Path, state: RunState | None, ranks: Collection[int] = (), since: float = 0.0
) -> FirstError | None:
    """The earliest error since the last start of the run, of `ranks` or of all; None when there is none.

    Looks at the ends of rank logs, at what the watchdog wrote, at ranks that fell silent, and at Slurm's log. Ranks'
    clocks are taken to agree. `since`: when its job was submitted, for a run that has no record yet.
    """
    if state and state.state in ("finished", "stopped"):
        return None
    started = state.started if state else since
    logs = {rank: path for rank, path in rank_logs(run_dir / "logs").items() if not ranks or rank in ranks}
    first: tuple[Entry, list[Entry]] | None = None
    for rank, path in logs.items():
        entries = [entry for entry in read_rank(rank, path) if entry.time >= started]
        place = next((number for number, entry in enumerate(entries) if entry.level in ERRORS), None)
        if place is not None and (first is None or entries[place].time < first[0].time):
            first = entries[place], entries[max(0, place - _BEFORE) : place + _AFTER + 1]
    others = other_logs(run_dir)
    stall = next((entry for entry in read_stalls(run_dir / "logs") if entry.time >= started), None)
    if stall and (first is None or stall.time <= first[0].time):
        return FirstError("watchdog", stall.lines[0], stall.time, context=(stall,), entry=stall)
    silent = [found for found in _silent(run_dir, state) if not ranks or found.record.rank in ranks]
    said = tuple(dict.fromkeys(line for log in others if log.modified >= started for line in errors_of(log)))
    if state and state.state == "preempted":  # it was asked to end: that srun says so is no error
        said = tuple(line for line in said if _OURS.fullmatch(line))
    if first is not None:
        entry, context = first
        if silent and _LOST_ANOTHER.search(entry.lines[0]):
            note = f"then {name_ranks(entry.ranks)}: {_shortened(entry.lines[0])}"
            return _of_the_silent(silent, (note, *said))
        notes = tuple(_describe(found) for found in silent)
        host = _host(run_dir, entry.ranks[0], started)
        return FirstError(name_ranks(entry.ranks), entry.lines[0], entry.time, host, tuple(context), entry, notes)
    ours = next((line for line in said if _OURS.fullmatch(line)), None)
    if silent and ours is None:
        return _of_the_silent(silent, said)
    if state and state.error:
        return FirstError("rank 0", clean(" ".join(state.error.split())), state.changed, state.host, notes=said)
    if not said:
        return None
    first_said = ours or said[0]
    notes = (*(_describe(found) for found in silent), *(line for line in said if line != first_said))
    return FirstError(others[0].name, first_said, notes=notes)


def records_of(run_dir: Path, started: float = 0.0) -> Iterator[tuple[Record, float]]:
    """What the ranks published since `started`, and when they last did."""
    for path in sorted((run_dir / "logs" / FOLDER).glob("rank_*.json")):
        when = modified(path)
        try:
            record = parse_record(read_small(path) or "")
        except RecursionError:
            continue
        if when is not None and when >= started and record is not None and type(record.rank) is int:
            yield record, when


def _silent(run_dir: Path, state: RunState | None) -> list[_Silent]:
    """Ranks of a run that is over, which did not close their heartbeat: an exception does, a kill does not."""
    if state is None or state.state == "running":
        return []
    found = [
        _Silent(record, when)
        for record, when in records_of(run_dir, state.started)
        if record.phase != "end" and record.rank < state.world_size
    ]
    return sorted(found, key=lambda one: one.time)


def _of_the_silent(silent: list[_Silent], notes: tuple[str, ...]) -> FirstError:
    who = name_ranks(found.record.rank for found in silent)
    hosts = ", ".join(dict.fromkeys(clean(str(found.record.host)) for found in silent))
    text = "killed, or its host is gone: it ended without a word (kill -9? out of memory?)"
    stood = tuple(f"{name_ranks([one.record.rank])} was last heard of {_when(one)}" for one in silent[:8])
    return FirstError(who, text, silent[0].time, hosts, notes=(*stood, *notes))


def _describe(found: _Silent) -> str:
    record = found.record
    return (
        f"{name_ranks([record.rank])} on {clean(str(record.host))} ended without a word, last heard of {_when(found)}"
    )


def _when(found: _Silent) -> str:
    record, clock = found.record, time.strftime("%H:%M:%S", time.localtime(found.time))
    return clean(
        f"at {clock}, in step {record.step} ({record.phase})" if record.step else f"at {clock} ({record.phase})"
    )


def _host(run_dir: Path, rank: int, started: float) -> str:
    return next((clean(str(record.host)) for record, _ in records_of(run_dir, started) if record.rank == rank), "")


def errors_of(log: OtherLog) -> list[str]:
    """Lines of a log without times that tell of an end, since ranks were started last; Slurm's own come last."""
    starts = [number for number, line in enumerate(log.lines) if _RANKS_START.fullmatch(line)]
    found = [line for line in log.lines[starts[-1] if starts else 0 :] if _UNDATED_ERROR.fullmatch(line)]
    return sorted(found, key=lambda line: line.startswith(_OF_SLURM))[:5]


def _shortened(text: str, length: int = 160) -> str:
    return text if len(text) <= length else text[: length - 1] + "…"
