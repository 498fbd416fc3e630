"""Run directories as trainings leave them, made without training."""

import json
import os
import time
from dataclasses import asdict

from megalite.guard.run_state import RunState
from megalite.guard.stall import Record

NOW = time.time()


def write_run(folder, state=None, steps=100, rows=(), stop_after=None, started=NOW - 100, **record):
    """A run in `folder`, in `state` (None: without a record), whose configuration says `steps`."""
    folder.mkdir(parents=True, exist_ok=True)
    if steps is not None:
        stop = "null" if stop_after is None else stop_after
        text = f"run_name: r\ntrainer:\n  steps: {steps}\n  stop_after: {stop}\n"
        (folder / "config.yaml").write_text(text)
    if rows:
        (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    if state:
        values = {"world_size": 2, "host": "node1", "pid": 1} | record
        life = RunState(state=state, started=started, changed=NOW, **values)
        (folder / "state.json").write_text(json.dumps(asdict(life)))
    return folder


def row(step, **more):
    return {"step": step, "loss": 5.0 - step / 100, "tokens_per_second": 2000.0, "step_seconds": 2.0} | more


def stamp(seconds):
    """A time as the logs of ranks have it."""
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(seconds)) + f",{int(seconds * 1000) % 1000:03d}"


def write_log(folder, rank, *lines):
    """(seconds before now, level, text) each."""
    (folder / "logs").mkdir(parents=True, exist_ok=True)
    with open(folder / "logs" / f"rank_{rank}.log", "a", encoding="utf-8") as file:
        for before, level, text in lines:
            file.write(f"{stamp(NOW - before)} {level} megalite.trainer: {text}\n")


def write_heartbeat(folder, rank, before=0.0, phase="step", host="node2", step=7, now=NOW):
    """The record of a rank that was last heard of `before` seconds ago."""
    path = folder / "logs" / "heartbeats" / f"rank_{rank:05d}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    record = Record(
        rank, 2, host, "machine", 1, 1, "token", 42, 43, (), phase=phase, step=step, num_steps=step, num_phases=1,
        progress=9, published=9,
    )  # fmt: skip
    path.write_text(json.dumps(asdict(record)).ljust(1024))
    os.utime(path, (now - before, now - before))
