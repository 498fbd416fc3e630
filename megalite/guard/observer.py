"""What a monitor knows of the ranks: their last records, and since when they stand where they stand."""

import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from megalite.guard.proc import GONE, read_state
from megalite.guard.stall import Limits, Patience, Record, parse_record

FOLDER = "heartbeats"
VERDICT_FILE = "verdict.json"  # the tokens of the ranks that are to end

_SILENT = 5  # periods without a record, after which a rank's Python does not run
_WITH_A_JUDGE = 30.0  # seconds more before a monitor judges that is not the one to judge

_Json = TypeVar("_Json", list, dict)


@dataclass(frozen=True)
class MonitorSettings:
    """What a monitor is started with; `rank` is the one that starts it."""

    logs: str
    rank: int
    world_size: int
    machine: str
    limits: Limits
    meeting: str = ""  # HOST:PORT where ranks of several hosts met


class Observer:
    """What is known of all ranks, and since when: by a clock of our own, for clocks of machines differ."""

    def __init__(self, settings: MonitorSettings):
        """Nothing has been read yet."""
        self.settings = settings
        self.folder = Path(settings.logs) / FOLDER
        self.period = settings.limits.period(settings.world_size)
        self.patience = Patience(settings.limits)
        self.section = "start"
        self.records: dict[int, Record] = {}  # of the ranks of this job
        self.now = self.job_moved = 0.0  # the clock, and when any rank went on
        self._ticked = time.monotonic()
        self._moved: dict[int, float] = {}
        self._spoke: dict[int, float] = {}
        self.strangers: dict[int, Record] = {}  # of other machines: perhaps left by an earlier job

    @property
    def own(self) -> dict[int, Record]:
        """The ranks of this machine."""
        return {rank: r for rank, r in self.records.items() if r.machine == self.settings.machine}

    @property
    def has_another_judge(self) -> bool:
        """The monitor beside rank 0 sees what this one sees."""
        return self.settings.rank != 0 and 0 in self.records

    def tick(self) -> None:
        """Let the clock go on, only while this process runs: that a machine slept or a disk hung is no rank's fault."""
        now = time.monotonic()
        self.now += min(now - self._ticked, 2 * self.period)
        self._ticked = now

    def read(self, everyone: bool = False) -> None:
        """Take in what was published, and learn how long a section may be quiet.

        All ranks, for the monitor that judges; for the others their own and rank 0, which is enough to follow.
        """
        starter = self.records.get(self.settings.rank)
        # Without the rank that started it, a monitor takes in nobody new: a job that starts again has other monitors.
        closed = starter is not None and (starter.phase == "end" or state_of(starter) == GONE)
        before, moved = self.records, False
        for rank in range(self.settings.world_size):
            known = before.get(rank)
            if self.has_another_judge and not everyone and rank and known and known.machine != self.settings.machine:
                continue
            record = self._load(rank)
            if record is None:
                continue
            if known is None or known.token != record.token:
                if closed or not self._is_of_this_job(record):
                    continue
                known = None
            if known is None or known.progress != record.progress:
                self._moved[rank], moved = self.now, True
            if known is None or known.published != record.published:
                self._spoke[rank] = self.now
            self.records[rank] = record
            self.strangers.pop(rank, None)
        if moved:
            self.patience.learn(self.section, self.now - self.job_moved)
            self.job_moved = self.now
        if working := [record for record in self.records.values() if record.phase != "end"]:
            self.section = self.patience.section(working)

    def limit(self) -> float:
        """How long the job may be quiet where it stands."""
        limit = self.patience.seconds(self.section)
        if any(record.phase != "end" and state_of(record) == GONE for record in self.own.values()):
            limit = min(limit, self.settings.limits.floor)  # a rank died: its launcher acts, or nobody ever will
        return limit + _WITH_A_JUDGE if self.has_another_judge else limit

    def quiet(self, rank: int) -> float:
        """Seconds since `rank` went on."""
        return self.now - self._moved.get(rank, 0.0)

    def silent(self) -> list[int]:
        """Ranks that publish no more."""
        return [rank for rank, spoke in self._spoke.items() if self.now - spoke > _SILENT * self.period]

    def _load(self, rank: int) -> Record | None:
        try:
            return parse_record((self.folder / f"rank_{rank:05d}.json").read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError):
            return None

    def _is_of_this_job(self, record: Record) -> bool:
        """False for what an earlier job left: its ranks do not live. On another machine a rank lives that publishes.

        On this machine ranks of one job have one launcher: those of a second job, started here by mistake, another.
        """
        if record.machine == self.settings.machine:
            launchers = [other.launchers[-1] for other in self.own.values() if other.launchers]
            if record.launchers and launchers and record.launchers[-1] not in launchers:
                return False
            died_early = any(record.launchers == other.launchers != () for other in self.own.values())
            return died_early or state_of(record) != GONE
        before = self.strangers.get(record.rank)
        self.strangers[record.rank] = record
        return before is not None and before.token == record.token and before.published != record.published


def state_of(record: Record) -> str:
    """The state of a rank of this machine."""
    return read_state(record.pid, record.start)


def read_names(path: Path) -> set[str]:
    """The tokens that `path` lists; none when there is no such file."""
    return set(read_json(path, []))


def read_json(path: Path, default: _Json) -> _Json:
    """What the file holds; `default` when it cannot be read or holds something of another kind."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return default
    return value if isinstance(value, type(default)) else default
