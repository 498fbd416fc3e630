"""What a person reads after a stall: who is late, where everybody stands, and every thread's Python stack."""

import os
import re
import shlex
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from megalite.guard.stall import Record, Verdict, name_ranks

_STATES = {
    "R": "running",
    "S": "sleeping",
    "D": "in uninterruptible sleep",
    "T": "stopped",
    "t": "stopped by a debugger",
}
_TERMINAL_RANKS, _TERMINAL_STACKS, _TERMINAL_LINES = 16, 2, 40


@dataclass(frozen=True)
class Sighting:
    """One rank as the monitor saw it last; `quiet`: seconds since it moved, `stacks`: what its threads were at."""

    record: Record
    state: str | None
    quiet: float
    stacks: str


def build_report(verdict: Verdict, seen: Mapping[int, Sighting], quiet: float, limit: float, section: str) -> list[str]:
    """The report's parts: the diagnosis; a line for each rank; each one's stacks. The blamed ones come first."""
    blamed = f"{name_ranks(verdict.ranks)}{_name_hosts(verdict.ranks, seen)}"
    head = [f"stall: {blamed} {'are' if verdict.ranks[1:] else 'is'} {verdict.reason}"]
    head.append(f"no rank has moved for {quiet:.0f} s (limit of section '{section}': {limit:.0f} s)")
    unseen = set(range(next(iter(seen.values())).record.world_size)) - seen.keys() - set(verdict.ranks)
    if unseen:
        head.append(
            f"of {name_ranks(unseen)} nothing was ever seen here: where their host has a run directory of its own, its "
            "own watchdog judges them, and they may be the ones to blame"
        )
    if section == "start" and (advice := describe_build_locks()):
        head.append(advice)
    order = sorted(seen, key=lambda rank: (rank not in verdict.ranks, rank))
    lines = [("> " if rank in verdict.ranks else "  ") + _describe(seen[rank]) for rank in order]
    stacks = [f"Python stacks of rank {rank}:\n{_tidy(seen[rank].stacks) or '(it wrote none)'}" for rank in order]
    return ["\n".join(head), "\n".join(lines), *stacks]


def _name_hosts(ranks: Iterable[int], seen: Mapping[int, Sighting]) -> str:
    """Where `ranks` are, where there is more than one host."""
    hosts = sorted({seen[rank].record.host for rank in ranks if rank in seen})
    several = len({sighting.record.host for sighting in seen.values()}) > 1
    return f" on {', '.join(hosts[:_TERMINAL_RANKS])}" if several and hosts else ""


def shorten(parts: list[str], blamed: int, path: Path | None) -> str:
    """What of a report's `parts` helps on a terminal; `blamed`: the number of stack blocks of ranks to blame."""
    head, lines, *stacks = parts
    shown = lines.splitlines()
    more = [f"  ... and {len(shown) - _TERMINAL_RANKS} more ranks"] if len(shown) > _TERMINAL_RANKS else []
    blocks = ["\n".join(block.splitlines()[:_TERMINAL_LINES]) for block in stacks[: min(blamed, _TERMINAL_STACKS)]]
    where = [f"the stacks of all ranks: {path}"] if path else []
    return "\n".join([head, *shown[:_TERMINAL_RANKS], *more, *blocks, *where, "the job is ended"])


def _describe(sighting: Sighting) -> str:
    record = sighting.record
    since = time.strftime("%H:%M:%S", time.localtime(time.time() - sighting.quiet))
    last = ", ".join(
        f"{operation} (group {group}, number {number})"
        for group, collectives in sorted(record.collectives.items())
        for number, operation in collectives[-1:]
    )
    state = _STATES.get(sighting.state, sighting.state) if sighting.state else "state unknown"
    return (
        f"rank {record.rank}, host {record.host}, pid {record.pid}, {state}: {record.place} since {since} "
        f"({sighting.quiet:.0f} s); last collective: {last or 'none known'}"
    )


def _find_build_locks() -> list[Path]:
    """Files that a build of a torch extension holds while it runs; one that was killed leaves its own for ever.

    Every later start waits for it without a word (torch.utils.file_baton, pytorch issue 189245).
    """
    named = os.environ.get("TORCH_EXTENSIONS_DIR")
    root = Path(named) if named else Path.home() / ".cache" / "torch_extensions"
    return sorted([*root.glob("*/lock"), *root.glob("*/*/lock")])


def _tidy(stacks: str) -> str:
    """The main thread first, which stands by itself before all, or else last; without the heartbeat's own."""
    threads = [thread.strip() for thread in re.split(r"^(?=Thread 0x|Current thread 0x|Stack \()", stacks, flags=re.M)]
    alone = [thread for thread in threads if thread.startswith("Stack (")]
    told = {_frames(thread) for thread in alone}
    others = [t for t in reversed(threads) if t and _frames(t) not in told and not _is_heartbeat(t)]
    return "\n\n".join([*alone, *others])


def _frames(thread: str) -> str:
    return thread.partition("\n")[2]


def _is_heartbeat(thread: str) -> bool:
    return 'heartbeat.py"' in thread and thread.endswith(" in _bootstrap")


def describe_build_locks() -> str:
    """What to do about lock files of torch's extension builder; empty when there are none."""
    locks = _find_build_locks()
    if not locks:
        return ""
    remove = shlex.join(["rm", "-f", *map(str, locks)])
    return (
        "a lock of torch's extension builder is there: one that a killed build left makes every start wait for ever; "
        f"if no build is running, remove it and start again: {remove}"
    )
