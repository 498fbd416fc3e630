"""The watchdog of one machine: a small process beside its ranks, which names the rank that holds a job up and ends all.

Started by `heartbeat.Heartbeat` on local rank 0. It imports no torch, listens to nobody, and lives as long as a rank of
its machine does. Where machines share the run directory, the monitor beside rank 0 judges for all and the others do
what it writes there; otherwise each judges for its own ranks.
"""

import contextlib
import json
import select
import signal
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from megalite.errors import EXIT_OK, EXIT_RESOURCE
from megalite.guard.observer import VERDICT_FILE, MonitorSettings, Observer, read_json, read_names, state_of
from megalite.guard.proc import GONE, kill, kill_main_thread, read_state
from megalite.guard.reach import describe_cut
from megalite.guard.report import Sighting, build_report, describe_build_locks, shorten
from megalite.guard.stall import Limits, Record, judge, name_ranks

CALL_FILE = "call.json"  # the tokens of the ranks whose stacks and states the judging monitor asks for

_NETWORK = " network"  # behind a rank's token in an answer: what is wrong with that of its machine
_STACKS_SECONDS = 2.0  # for ranks to write their stacks
_EXIT_SECONDS = 2.0  # for ranks to end by themselves before they are killed
_D_SECONDS = 0.5  # any process waits for a disk now and then, but not for long
_LOOK_SECONDS = 0.1  # between looks whether stacks still grow: on a busy machine they grow haltingly
_HURRY_SECONDS = 0.05  # between looks once the rank that started the monitor has ended: the others soon will


class Monitor:
    """Acts on what the observer sees."""

    def __init__(self, settings: MonitorSettings):
        """Nothing has happened yet."""
        self.settings = settings
        self.observer = Observer(settings)
        self._folder = self.observer.folder
        self._answered: set[str] = set()
        self._starter_may_end = True
        self._warned = False

    def run(self) -> int:
        """Watch until the machine's ranks are gone, or made to; returns the exit code."""
        observer = self.observer
        while True:
            observer.tick()
            observer.read()
            own = observer.own
            tokens = {record.token for record in own.values()}
            working = {rank: r for rank, r in own.items() if r.phase != "end" and state_of(r) != GONE}
            if not working:
                return EXIT_OK
            if any(read_state(*launcher) == GONE for r in working.values() for launcher in r.launchers):
                _say(f"the launcher is gone: {name_ranks(working)} on this machine end")
                return _end(own, 0.0)
            if observer.now - observer.job_moved > (limit := observer.limit()):
                self._judge(working, limit)
                return _end(own, _EXIT_SECONDS)
            self._warn_of_locks()
            if tokens & read_names(self._folder / VERDICT_FILE):
                return _end(own, _EXIT_SECONDS)
            called = read_names(self._folder / CALL_FILE)
            if tokens & called and called != self._answered:
                self._answered = called
                states = _states(working)
                self._collect_stacks(working, states)
                told = {own[rank].token: state for rank, state in states.items()}
                told |= {own[rank].token + _NETWORK: text for rank, text in self._cut(own).items()}
                _write(self._answer_file(self.settings.rank), told)
            self._sleep(observer.period if self.settings.rank in working else min(observer.period, _HURRY_SECONDS))

    def _warn_of_locks(self) -> None:
        """Early: the first start of an engine may take long, and its limit is generous."""
        observer = self.observer
        quiet = observer.now - observer.job_moved
        if not self._warned and observer.section == "start" and quiet > self.settings.limits.floor:
            self._warned = True
            if advice := describe_build_locks():
                _say(f"no rank has moved for {quiet:.0f} s: {advice}")

    def _judge(self, working: Mapping[int, Record], limit: float) -> None:
        """Find out who holds the job up, say so, and tell all ranks to end."""
        observer, logs = self.observer, Path(self.settings.logs)
        quiet, silent = observer.now - observer.job_moved, observer.silent()
        observer.read(everyone=True)
        records, own = dict(observer.records), observer.own
        tokens = [record.token for record in records.values()]
        sizes = {rank: self._stacks_size(rank) for rank in records.keys() | observer.strangers.keys()}
        _write(self._folder / CALL_FILE, tokens)
        states = _states(own)
        self._collect_stacks(working, states)
        told = self._await_answers([record for rank, record in records.items() if rank not in own])
        # Other monitors also know ranks that fell silent before this one could tell that they lived.
        records |= {rank: stranger for rank, stranger in observer.strangers.items() if stranger.token in told}
        states |= {rank: told[record.token] for rank, record in records.items() if record.token in told}
        cut = self._cut(own)
        cut |= {rank: told[key] for rank, record in records.items() if (key := record.token + _NETWORK) in told}
        verdict = judge(records, states, silent, cut)
        seen = {
            rank: Sighting(record, states.get(rank), observer.quiet(rank), self._stacks(rank, sizes[rank]))
            for rank, record in sorted(records.items())
        }
        parts = build_report(verdict, seen, quiet, limit, observer.section)
        path = _save(logs, "\n\n".join(parts) + "\n")
        _say(shorten(parts, len(seen.keys() & set(verdict.ranks)), path))
        _write(self._folder / VERDICT_FILE, tokens)

    def _cut(self, own: Mapping[int, Record]) -> dict[int, str]:
        """What is wrong with the network of this machine, for each of its ranks; nothing where it is whole."""
        text = describe_cut(self.settings.meeting)
        return dict.fromkeys(own, text) if text else {}

    def _collect_stacks(self, working: Mapping[int, Record], states: Mapping[int, str]) -> None:
        """Have the `working` ranks, of this machine, write what their threads are at."""
        # The main thread by itself, and first: looking at the stacks of threads that run may crash the rank. Those of
        # one that was stopped all run when it continues.
        sizes = {rank: self._stacks_size(rank) for rank in working}
        for rank, record in working.items():
            kill_main_thread(record.pid, record.start, record.signal if states[rank] == "D" else record.own_signal)
        stopped = {rank: sizes.pop(rank) for rank in working if states[rank] in "Tt"}
        self._await_stacks(sizes)
        sizes = {rank: self._stacks_size(rank) for rank in sizes if states[rank] != "D"}
        for rank in sizes:
            kill_main_thread(working[rank].pid, working[rank].start, working[rank].signal)
        self._await_stacks(sizes)
        for rank in stopped:  # it was told, but only acts when it continues: for a moment, lest the job go on
            kill(working[rank].pid, working[rank].start, signal.SIGCONT)
        self._await_stacks(stopped)
        for rank in stopped:
            kill(working[rank].pid, working[rank].start, signal.SIGSTOP)

    def _await_answers(self, far: Sequence[Record]) -> dict[str, str]:
        """The states, by token, of ranks of other machines, whose monitors answer when they have the stacks, too."""
        deadline = time.monotonic() + 2 * _STACKS_SECONDS + 2 * self.observer.period
        told: dict[str, str] = {}
        while not {record.token for record in far} <= told.keys() and time.monotonic() < deadline:
            time.sleep(_HURRY_SECONDS)
            for record in far:
                answer = read_json(self._answer_file(record.rank), {})
                told |= answer if record.token in answer else {}  # else of an earlier job
        return told

    def _await_stacks(self, sizes: Mapping[int, int]) -> None:
        """Until the stacks of all ranks have grown beyond `sizes`, and no longer grow."""
        deadline, last = time.monotonic() + _STACKS_SECONDS, dict(sizes)
        while sizes and time.monotonic() < deadline:
            time.sleep(_LOOK_SECONDS)
            now = {rank: self._stacks_size(rank) for rank in sizes}
            if now == last and all(now[rank] > size for rank, size in sizes.items()):
                return
            last = now

    def _stacks(self, rank: int, offset: int) -> str:
        try:
            return self._stacks_file(rank).read_bytes()[offset:].decode(errors="replace").strip()
        except OSError:
            return ""

    def _stacks_size(self, rank: int) -> int:
        try:
            return self._stacks_file(rank).stat().st_size
        except OSError:
            return 0

    def _stacks_file(self, rank: int) -> Path:
        return self._folder / f"rank_{rank:05d}.stacks"

    def _answer_file(self, rank: int) -> Path:
        """Written by the monitor that `rank` started."""
        return self._folder / f"answer_{rank:05d}.json"

    def _sleep(self, seconds: float) -> None:
        """Wake early when the rank that started this process closes its heartbeat or dies."""
        if not self._starter_may_end:
            time.sleep(seconds)
        elif select.select([0], [], [], seconds)[0]:
            self._starter_may_end = False


def _states(ranks: Mapping[int, Record]) -> dict[int, str]:
    """The process states of ranks of this machine; uninterruptible only one that stays so."""
    states = {rank: state_of(record) for rank, record in ranks.items()}
    if "D" in states.values():
        time.sleep(_D_SECONDS)
        states |= {rank: state_of(ranks[rank]) for rank, state in states.items() if state == "D"}
    return states


def _write(path: Path, value: object) -> None:
    temporary = path.with_suffix(".tmp")
    try:
        temporary.write_text(json.dumps(value), encoding="utf-8")
        temporary.rename(path)
    except OSError as error:
        _say(f"cannot write {path}: {error}")  # this machine's ranks are killed all the same


def _save(logs: Path, text: str) -> Path | None:
    """`text` in a file of its own; None where the disk takes none."""
    number = 1 + len(list(logs.glob("stall_*.txt")))
    try:
        (path := logs / f"stall_{number}.txt").write_text(text, encoding="utf-8")
    except OSError:
        return None
    return path


def _say(text: str) -> None:
    with contextlib.suppress(OSError):  # the terminal went with the launcher
        print(text, file=sys.stderr, flush=True)


def _end(records: Mapping[int, Record], seconds: float) -> int:
    """Give the ranks `seconds` to end by themselves, which keeps their exit code; kill the others."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline and any(state_of(record) != GONE for record in records.values()):
        time.sleep(_HURRY_SECONDS)
    for record in records.values():
        kill(record.pid, record.start, signal.SIGKILL)
    return EXIT_RESOURCE


def main(text: str) -> int:
    """Run a monitor; `text`: its `MonitorSettings` in JSON."""
    # Meant for the ranks, which may have much to save: a launcher sends these to all processes it finds.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)
    values = json.loads(text)
    return Monitor(MonitorSettings(**{**values, "limits": Limits(**values["limits"])})).run()
