"""Where a run's wall time went, over all its lives (one life is one start of the command)."""

import contextlib
import itertools
import json
import os
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path

SECTIONS = ("start", "data", "step", "evaluate", "save", "other")
GOODPUT = "goodput.jsonl"


@dataclass
class Life:
    """One start of the command, as far as it was written down."""

    started: float  # seconds since 1970
    ended: float
    first_step: int  # where it began, 0 for the run's start
    last_step: int  # where it stood
    seconds: dict[str, float] = field(default_factory=dict)  # by section
    saved_step: int = 0  # the last that it saved; 0: none


class GoodputClock:
    """Counts this life's seconds by section; on rank 0 with a file, written down at every `mark`."""

    def __init__(self, started: float, path: Path | None = None):
        """`started`: when the command was, in seconds since 1970; until the first `enter` it is section `start`."""
        self._path = path
        self._earlier = read_lives(path) if path else []
        self._life = Life(started, started, 0, 0, dict.fromkeys(SECTIONS, 0.0))
        self._section, self._since = "start", time.perf_counter() - (time.time() - started)

    def enter(self, section: str) -> None:
        """From now on time counts as `section`."""
        now = time.perf_counter()
        self._life.seconds[self._section] += now - self._since
        self._section, self._since = section, now

    def begin(self, step: int) -> None:
        """The run goes on from `step`."""
        self._life.first_step = self._life.last_step = step

    def mark(self, step: int, saved_step: int = 0) -> None:
        """The run stands at `step`, and `saved_step` is the last that was saved.

        What is known is written down, so that a kill loses no more than since the last mark.
        """
        self.enter(self._section)
        self._life.last_step, self._life.saved_step = step, saved_step
        self._life.ended = self._life.started + sum(self._life.seconds.values())
        if self._path:
            lines = [json.dumps(asdict(life)) + "\n" for life in [*self._earlier, self._life]]
            temporary = self._path.with_suffix(".tmp")
            with contextlib.suppress(OSError):  # a full disk: the next mark may succeed; training goes on
                temporary.write_text("".join(lines))
                temporary.replace(self._path)

    def table(self) -> dict[str, float]:
        """Seconds by section over all lives; see `goodput_table`."""
        return goodput_table([*self._earlier, self._life])


def goodput_table(lives: list[Life]) -> dict[str, float]:
    """Seconds by section from the first life's start to the last one's end; they sum to that.

    `step` is what became part of the run: the steps beyond the one that a later life went back to are `lost work`, at
    their life's mean time. `down` lies between lives: from the last mark of one to the start of the next.
    """
    table = dict.fromkeys([*SECTIONS, "lost work", "down"], 0.0)
    for number, life in enumerate(lives):
        for section, seconds in life.seconds.items():
            table[section] += seconds
        went_back = min([later.first_step for later in lives[number + 1 :]], default=life.last_step)
        taken = life.last_step - life.first_step
        kept = min(max(went_back - life.first_step, 0), taken)
        if taken:
            lost = life.seconds["step"] * (taken - kept) / taken
            table["step"] -= lost
            table["lost work"] += lost
    for before, after in itertools.pairwise(lives):
        table["down"] += max(after.started - before.ended, 0.0)
    return table


def format_goodput(table: dict[str, float]) -> str:
    """The table as lines of seconds and percent."""
    total = sum(table.values()) or 1.0
    lines = [f"{name:<10} {seconds:>10.1f} s {seconds / total:>7.1%}" for name, seconds in table.items() if seconds]
    return "\n".join([*lines, f"{'all':<10} {total:>10.1f} s"])


def read_lives(path: Path) -> list[Life]:
    """The lives in a file, oldest first, without lines that a crash of the machine has torn; none without a file."""
    lives = []
    for line in path.read_text(errors="replace").splitlines() if path.is_file() else []:
        try:
            lives.append(Life(**json.loads(line)))
        except (ValueError, TypeError):
            continue
    return lives


def process_started() -> float:
    """When this process was started, in seconds since 1970."""
    ticks = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])
    uptime = float(Path("/proc/uptime").read_text().split()[0])
    return time.time() - (uptime - ticks / os.sysconf("SC_CLK_TCK"))
