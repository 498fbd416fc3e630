"""How a run stands, from what lies in its directory: nothing in there, damaged or foreign, makes this fail."""

import math
import os
import re
import socket
import statistics
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from megalite.guard.lock import is_locked
from megalite.guard.observer import FOLDER
from megalite.guard.run_state import STATE_FILE, RunState, read_state

from ..slurm.queue import Queue, ask_squeue
from ..slurm.submit import JOB, log_of
from ..tail import modified, read_small, tail_lines, tail_rows
from .first_error import find_first_error
from .log_entries import clean

CONFIG = "config.yaml"
MARKS = (STATE_FILE, CONFIG, JOB)  # a directory with one of these is a run
_DEPTH = 6  # of sweeps of sweeps
_MAX_FOLDERS = 20_000  # the wrong folder was named, or a file system without an end
_TRAINER = re.compile(r"^trainer:\n(?:[ ].*\n?)+", re.MULTILINE)
_ROWS = 20  # the last ones, for the time of a step
_END_OF_TIME = 2.0**36  # in seconds since 1970: what a calendar is made of ends not long after
_ALIVE_SECONDS = 60.0  # ranks publish every second, in jobs of thousands every few; clocks and disks may lag


@dataclass(frozen=True)
class RunStatus:
    """One run. `state`: those of `RunState`; pending (in Slurm's queue), starting (its job is at work, no rank is yet).

    new: nothing was trained. running?: its signs contradict each other. unknown: it has no record. unreadable: a
    directory that only looks like a run.
    """

    run: str  # its path below the folder that was searched
    run_dir: str
    state: str
    started: float = 0.0  # seconds since 1970: when its last life was, or when it was submitted
    step: int | None = None
    steps: int | None = None
    loss: float | None = None
    tokens_per_second: float | None = None
    eta_seconds: float | None = None
    row_age_seconds: float | None = None  # since the last row of metrics.jsonl
    job: str = ""  # its number in Slurm
    job_state: str = ""  # in Slurm's words, while Slurm knows it
    error: str = ""


@dataclass(frozen=True)
class Survey:
    """All runs below a folder, the newest first; `notes`: what else a person should know."""

    runs: list[RunStatus]
    notes: list[str]


def survey(folder: Path) -> Survey:
    """Look at every run below `folder`."""
    runs: list[RunStatus] = []
    waiting, num_closed = [(folder, 0)], 0
    seen: set[tuple[int, int]] = set()
    while waiting and len(seen) < _MAX_FOLDERS:
        path, depth = waiting.pop()
        try:
            about = path.stat()
            with os.scandir(path) as entries:
                found = list(entries)
            if (about.st_dev, about.st_ino) in seen:  # a link that leads back
                continue
            seen.add((about.st_dev, about.st_ino))
            below = [entry.name for entry in found if not entry.name.startswith(".") and entry.is_dir()]
        except OSError:
            num_closed += 1
            continue
        if any(entry.name in MARKS for entry in found):
            runs.append(look_at(path, _name(path, folder)))
            if runs[-1].state != "unreadable":
                continue  # what lies in a run is no other run
        waiting += [(path / name, depth + 1) for name in below if depth < _DEPTH]
    notes = [f"{num_closed} directories cannot be opened"] if num_closed else []
    if waiting:
        notes.append(f"there are more than {_MAX_FOLDERS:,} directories; those beyond were not looked at")
    return Survey(sorted(runs, key=lambda run: (-run.started, run.run)), notes)


def look_at(run_dir: Path, name: str) -> RunStatus:
    """One run, without Slurm's word."""
    now = time.time()
    state, settings = read_record(run_dir), _read_settings(run_dir)
    job = clean((read_small(run_dir / JOB) or "").strip())[:40]
    if state is None and settings is None and not job:
        return RunStatus(name, str(run_dir), "unreadable", modified(run_dir) or 0.0)
    rows = tail_rows(run_dir / "metrics.jsonl")
    submitted = modified(run_dir / JOB) or 0.0
    if state is not None and state.job and state.started >= submitted:
        job = state.job
    steps = _whole((settings or {}).get("steps"))
    last_step = min(filter(None, (steps, _whole((settings or {}).get("stop_after")))), default=None)
    step = rows[-1]["step"] if rows else None
    if state is not None and state.step and state.state != "running":
        step = state.step
    word = _word(run_dir, state, now) if state else _word_without_record(run_dir, step, steps)
    row_at = modified(run_dir / "metrics.jsonl") if rows else None
    age = None if row_at is None else max(0.0, now - row_at)
    return RunStatus(
        name,
        str(run_dir),
        word,
        max(state.started if state else modified(run_dir / CONFIG) or 0.0, submitted),
        step,
        steps,
        _last(rows, "loss"),
        _last(rows, "tokens_per_second"),
        _eta(rows, last_step, age) if word == "running" else None,
        age,
        job,
        error=_error(run_dir, state, word, job),
    )


def _with_job(run: RunStatus, queue: Queue) -> RunStatus:
    """The run, with what Slurm says of its job: one to come makes a run `pending`, one that has ended none at work."""
    job = queue.jobs.get(run.job)
    if job is None:
        if not run.job or not queue.has_ended(run.job):
            return run
        if run.state == "new":
            return replace(run, state="failed", error=run.error or _last_words(Path(run.run_dir), run.job))
        return replace(run, state="died") if run.state == "running?" else run
    state = run.state
    if job.state == "PENDING" and state not in ("running", "running?", "finished"):
        state = "pending"
    elif state == "new":
        state = "starting"
    told = f"{job.state.lower()} ({job.reason})" if job.reason not in ("", "None") else job.state.lower()
    return replace(run, state=state, job_state=clean(told))


def _last_words(run_dir: Path, job: str) -> str:
    """Why a job has ended before any rank began."""
    lines = [line for line in tail_lines(log_of(run_dir, job))[0] if line.strip()]
    nothing = f"job {job} ended and left no log in {run_dir / 'logs'}: does its first node have that directory?"
    return clean(lines[-1].strip()) if lines else nothing


def ask_slurm(found: Survey) -> Survey:
    """The runs with Slurm's word, where there is Slurm."""
    queue = ask_squeue({run.job for run in found.runs if run.job})
    notes = [*found.notes, *([queue.problem] if queue.problem else [])]
    return Survey([_with_job(run, queue) for run in found.runs], notes)


def _name(path: Path, folder: Path) -> str:
    return str(path.relative_to(folder)) if path != folder else path.name or str(path)


def read_record(run_dir: Path) -> RunState | None:
    """The record of the last life; None for one that holds something else than it should."""
    if read_small(run_dir / STATE_FILE) is None:
        return None
    try:
        state = read_state(run_dir)
    except RecursionError:
        return None
    if state is None or not all(isinstance(text, str) for text in (state.state, state.job, state.host, state.error)):
        return None
    times = all(isinstance(when, int | float) and abs(when) < _END_OF_TIME for when in (state.started, state.changed))
    counts = all(
        type(count) is int and abs(count) < 1 << 63 for count in (state.step, state.last_step, state.world_size)
    )
    return state if times and counts else None


def _read_settings(run_dir: Path) -> dict[str, Any] | None:
    """The group `trainer` of the frozen configuration, of any version of megalite."""
    group = _TRAINER.search(
        read_small(run_dir / CONFIG) or ""
    )  # the rest takes ten times as long, in each of many runs
    try:
        values = yaml.safe_load(group[0]) if group else None
    except (yaml.YAMLError, ValueError, RecursionError):
        return None
    trainer = values.get("trainer") if isinstance(values, dict) else None
    return trainer if isinstance(trainer, dict) else None


def _word(run_dir: Path, state: RunState, now: float) -> str:
    """The state, doubted where the lock and the ranks' signs of life do not agree."""
    if state.state not in ("running", "died"):
        return clean(state.state)
    heard = modified(run_dir / "logs" / FOLDER / "rank_00000.json")
    if heard is None or heard < state.started - 1:  # the watchdog is off, or has not begun
        return state.state
    is_quiet = now - heard > _ALIVE_SECONDS
    if state.state == "running":
        return "running?" if is_quiet else "running"
    # Some file systems keep no lock between hosts. On this one a lock is the truth.
    return "died" if is_quiet or state.host == socket.gethostname() else "running?"


def _word_without_record(run_dir: Path, step: int | None, steps: int | None) -> str:
    """Of a run that an older version trained, that was imported, or that has not begun."""
    if is_locked(run_dir):
        return "running"
    if step is None:
        return "new"
    return "finished" if steps is not None and step >= steps else "unknown"


def _error(run_dir: Path, state: RunState | None, word: str, job: str) -> str:
    if word not in ("failed", "died", "preempted") and not (word == "new" and job):
        return ""
    first = find_first_error(run_dir, state, since=modified(run_dir / JOB) or 0.0)
    return first.headline if first else ""


def _last(rows: list[dict[str, Any]], key: str) -> float | None:
    """The newest value; `nan` stands in the file as a text."""
    for row in reversed(rows):
        if row.get(key) is not None:
            return _number(row[key])
    return None


def _eta(rows: list[dict[str, Any]], last_step: int | None, age: float | None) -> float | None:
    """Seconds to the last step, at the median time of the last steps, less what passed since the last row."""
    times = [_number(row.get("step_seconds")) for row in rows[-_ROWS:]]
    known = [seconds for seconds in times if seconds is not None and math.isfinite(seconds)]
    if not known or last_step is None:
        return None
    return max(0.0, statistics.median(known) * (last_step - rows[-1]["step"]) - (age or 0.0))


def _number(value: Any) -> float | None:
    try:
        return None if value is None or isinstance(value, bool) else float(value)
    except (TypeError, ValueError, OverflowError):
        return None


def _whole(value: Any) -> int | None:
    return value if type(value) is int and value > 0 else None
