"""When a job is too quiet, and which rank is to blame: pure functions of what the ranks published.

Every rank publishes a `Record` (heartbeat.py); the monitor reads them (monitor.py) and asks here.
"""

import json
import math
from collections import Counter, defaultdict, deque
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field

from megalite.guard.proc import GONE

_BEFORE_THE_GROUP = ("start", "start: process group")
# The last two come once in a life, so that nothing is learned of them before: waiting for an asynchronous save, which
# takes as long as the disk does, and for a tracker's last upload.
_SECTIONS_OF_THEIR_OWN = ("evaluate", "save", "save: files", "other: closing")
_HISTORY = 500  # quiet times remembered of each section


@dataclass(frozen=True)
class Limits:
    """Seconds for which no rank may move on, and the pace at which that is looked at."""

    timeout: float | None = None  # for every section after the first step; None: learned, as follows
    floor: float = 60.0  # learned: at least this,
    factor: float = 10.0  # and this times the 99th percentile of the section's own quiet times;
    first: float = 1800.0  # before there are any: this
    start: float = 1800.0  # start-up and the first step, which compiles
    interval: float = 1.0  # between two looks, and between two records of a rank

    def period(self, world_size: int) -> float:
        """The interval, longer in jobs so large that their records would keep a shared file system busy."""
        return self.interval * max(1.0, world_size / 256)


@dataclass(frozen=True)
class Record:
    """What a rank publishes of itself."""

    rank: int
    world_size: int
    host: str
    machine: str  # equal for ranks that see each other under /proc
    pid: int
    start: int  # of the process, with which its pid is unique
    token: str  # random: no other process, before or after, is this rank of this job
    signal: int  # makes it write the stacks of all its threads
    own_signal: int  # makes the thread that gets it write its own
    launchers: tuple[tuple[int, int], ...]  # (pid, start): it is an orphan without any of them
    phase: str  # "start" and "start: ..." before the first step; "evaluate", "save", "end", or a part of a step
    step: int
    num_steps: int  # entered by this process
    num_phases: int  # entered within this step
    progress: int  # phases entered by this process
    published: int  # records written: grows while the rank's Python runs
    collectives: Mapping[str, list[tuple[int, str]]] = field(default_factory=dict)
    """Process group -> its last collectives, (sequence number, operation), the newest last."""

    @property
    def place(self) -> str:
        """For people."""
        return f"step {self.step}, {self.phase}" if self.step else self.phase

    def last(self, group: str) -> int:
        """The sequence number of the newest collective in `group`."""
        return max((number for number, _ in self.collectives[group]), default=0)


def parse_record(text: str) -> Record | None:
    """None for a text that is no whole record: caught while it was written."""
    try:
        return Record(**json.loads(text))
    except (ValueError, TypeError):
        return None


class Patience:
    """How long each section may be quiet, learned from how long it was quiet before."""

    def __init__(self, limits: Limits):
        """Nothing is learned yet."""
        self._limits = limits
        self._quiet: dict[str, deque[float]] = defaultdict(lambda: deque(maxlen=_HISTORY))

    def section(self, records: Iterable[Record]) -> str:
        """The section that the job is in: of those its ranks are in, the one that may take longest.

        Where one rank is at its third step none is at its start: one that says so has published nothing since.
        """
        records = list(records)
        started = max(record.num_steps for record in records) > 2
        sections = {_section(record) for record in records if record.num_steps > 1 or not started}
        return max(sorted(sections), key=self.seconds)

    def learn(self, section: str, quiet: float) -> None:
        """In `section`, no rank moved for `quiet` seconds; then one did."""
        self._quiet[section].append(quiet)

    def seconds(self, section: str) -> float:
        """How long `section` may be quiet."""
        limits, quiet = self._limits, sorted(self._quiet[section])
        if section == "start":
            return limits.start
        if limits.timeout is not None:
            return limits.timeout
        if not quiet:
            return limits.first
        return max(limits.floor, limits.factor * quiet[math.ceil(0.99 * len(quiet)) - 1])


def _section(record: Record) -> str:
    if record.num_steps <= 1:
        return "start"  # the first step compiles
    return record.phase if record.phase in _SECTIONS_OF_THEIR_OWN else "step"


@dataclass(frozen=True)
class Verdict:
    """`ranks` are to blame; `reason` completes "rank 1 is ..."."""

    ranks: tuple[int, ...]
    reason: str


def judge(
    records: Mapping[int, Record], states: Mapping[int, str], silent: Collection[int], cut: Mapping[int, str]
) -> Verdict:
    """Which ranks hold the others up, the surest sign first.

    `states`: the process state of each rank as far as known; `silent`: ranks that publish no more; `cut`: what is wrong
    with the network of ranks' hosts.
    """
    working = {rank: record for rank, record in records.items() if record.phase != "end"}
    mute = tuple(rank for rank in working if rank in silent)
    signs = [
        Verdict(tuple(rank for rank in working if states.get(rank) in kinds), reason)
        for reason, kinds in _STATES.items()
    ]
    severed = tuple(rank for rank in working if rank in cut)
    signs.append(Verdict(severed, cut[severed[0]] if severed else ""))
    # Where nobody publishes it is the file system that takes no records, and tells nothing about who is late.
    if len(working) == 1 or len(mute) < len(working):
        local = tuple(rank for rank in mute if rank in states)
        signs.append(Verdict(local, "running, but Python is not: something holds the interpreter's lock (GIL)"))
        signs.append(
            Verdict(mute, "without a sign of life: the process, its machine, or its way to the run directory is gone")
        )
    signs += [_missing(records), _mismatched(records), _behind(records), _earliest(working)]
    return next(sign for sign in signs if sign.ranks)


_STATES = {
    "gone: ended without a word": (GONE,),
    "stopped (SIGSTOP, or a debugger)": ("T", "t"),
    "in uninterruptible sleep: a disk, a network file system or a driver does not answer": ("D",),
}


def _missing(records: Mapping[int, Record]) -> Verdict:
    """Ranks that never published; once a process group stands they only publish where we do not see it."""
    if any(record.phase not in _BEFORE_THE_GROUP for record in records.values()):
        return Verdict((), "")
    world_size = next(iter(records.values())).world_size
    missing = tuple(rank for rank in range(world_size) if rank not in records)
    return Verdict(missing, "missing: not started, or on a machine that does not share the run directory")


def _mismatched(records: Mapping[int, Record]) -> Verdict:
    """The first collective of a group that not all ranks call by the same name: the few differ from the many."""
    called: dict[tuple[int, str], dict[int, str]] = defaultdict(dict)
    for rank, record in records.items():
        for group, collectives in record.collectives.items():
            for number, operation in collectives:
                called[number, group][rank] = operation
    for (number, group), operations in sorted(called.items()):
        ranked = Counter(operations.values()).most_common()
        if len(ranked) > 1:
            usual = ranked[0][0] if ranked[0][1] > ranked[1][1] else None  # None: as many on either side
            blamed = tuple(rank for rank, operation in operations.items() if operation != usual)
            text = "; ".join(
                f"{name_ranks(r for r, o in operations.items() if o == operation)} called {operation}"
                for operation, _ in ranked
            )
            return Verdict(blamed, f"at odds with others in collective {number} of group {group}: {text}")
    return Verdict((), "")


def _behind(records: Mapping[int, Record]) -> Verdict:
    """Who is waited for in a collective, and waits for nobody."""
    reasons: dict[int, str] = {}
    waiting: set[int] = set()
    for group in sorted({group for record in records.values() for group in record.collectives}):
        members = {rank: record for rank, record in records.items() if group in record.collectives}
        least = min(record.last(group) for record in members.values())
        waiters = {rank: record.last(group) for rank, record in members.items() if record.last(group) > least}
        if waiters:
            waiting.update(waiters)
            first = min(waiters, key=lambda rank: (waiters[rank], rank))
            operation = members[first].collectives[group][-1][1]
            wait = f"collective {waiters[first]} ({operation}) of group {group}, in which {name_ranks(waiters)} wait"
            reasons |= {rank: wait for rank in members if rank not in waiters}
    culprits = tuple(rank for rank in sorted(reasons) if rank not in waiting)
    if reasons and not culprits:
        knot = "; ".join(sorted(set(reasons.values())))
        return Verdict(tuple(sorted(reasons)), f"waiting in one process group for a rank that waits in another: {knot}")
    return Verdict(culprits, f"not yet in {reasons[culprits[0]]}" if culprits else "")


def _earliest(working: Mapping[int, Record]) -> Verdict:
    """Who has come least far by its own account; everybody when all stand in one place."""

    # Phases count within the step: one that only some ranks enter makes the others late in this step, not for ever.
    far = {rank: (record.step, record.num_phases) for rank, record in working.items()}
    late = tuple(rank for rank in working if far[rank] == min(far.values()))
    place = working[late[0]].place
    others = [record for rank, record in working.items() if rank not in late]
    if not others:
        return Verdict(late, f"not moving on from: {place}" + (" (no rank is behind another)" if late[1:] else ""))
    return Verdict(late, f"still at {place}, while {name_ranks(r.rank for r in others)} reached {others[0].place}")


def name_ranks(ranks: Iterable[int]) -> str:
    """`rank 3`, or `ranks 0, 2, 5`; the first eight of many."""
    ranks = sorted(ranks)
    names = ", ".join(map(str, ranks[:8])) + (f" and {len(ranks) - 8} more" if len(ranks) > 8 else "")
    return f"rank{'s' if len(ranks) > 1 else ''} {names}"
