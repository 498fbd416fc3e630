"""Starts a run, kills a process of it at a drawn place, starts it again, until it ends; everything from one seed.

A run is forked from this process, which holds the slow imports: its launcher, which forks the ranks as always.
"""

import os
import random
import signal
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path

from megalite import failpoints
from megalite.checkpoint_folder import newest_checkpoint
from megalite.checkpoint_format import read_manifest
from megalite.config.schema import TrainConfig
from megalite.launch.spawn import spawn_ranks
from megalite.metrics.jsonl import read_metrics
from megalite.preflight import preflight
from megalite.train import train

# In the order in which a save passes them. Those of files are passed by every rank, the others by rank 0.
FILE_POINTS = ("before file", "before fsync", "after file")
COMMIT_POINTS = ("before manifest", "before rename", "before latest", "after commit", "during prune")


@dataclass(frozen=True)
class Kill:
    """SIGKILL for a rank or the launcher: at the n-th passing of a failpoint, or after some seconds of the run."""

    rank: int | None  # None: the launcher
    point: str | None = None
    passing: int = 1
    seconds: float = 0.0


def draw_kill(source: random.Random, world_size: int, seconds: float) -> Kill:
    """One kill: in six of ten inside the writing of a checkpoint, else at any moment; one in six is the launcher's."""
    rank = None if source.random() < 1 / 6 else source.randrange(world_size)
    if source.random() >= 0.6:
        return Kill(rank, seconds=source.uniform(0.0, seconds))
    if rank in (None, 0) and source.random() < 0.6:
        return Kill(rank, source.choice(COMMIT_POINTS), source.randint(1, 2))
    return Kill(rank, source.choice(FILE_POINTS), source.randint(1, 4))


def run_once(config: TrainConfig, world_size: int, kill: Kill | None = None) -> int:
    """The command, in a process of its own and to its end; returns its exit code, negative for a signal."""
    launcher = start_run(config, world_size, kill)
    timer = None
    if kill and kill.point is None:
        timer = threading.Timer(kill.seconds, _kill_one, (launcher, kill.rank))
        timer.start()
    code = end_run(launcher)
    if timer:
        timer.cancel()
    return code


def start_run(config: TrainConfig, world_size: int, kill: Kill | None = None) -> int:
    """Start the command; returns the pid of its launcher, which leads a process group of its own."""
    sys.stdout.flush()
    launcher = os.fork()
    if launcher == 0:
        code = 1
        try:
            os.setpgid(0, 0)
            silent = os.open(os.devnull, os.O_WRONLY)
            os.dup2(silent, 1)
            os.dup2(os.open(Path(config.run_dir).parent / "stderr.txt", os.O_CREAT | os.O_APPEND | os.O_WRONLY), 2)
            checked = preflight(config)
            code = spawn_ranks(lambda place: _rank(checked, place, kill), world_size)
        finally:
            os._exit(code)
    return launcher


def end_run(launcher: int) -> int:
    """Wait for the launcher and all its ranks; returns its exit code, negative for a signal."""
    _, status = os.waitpid(launcher, 0)
    _wait_for_ranks(launcher)
    return os.waitstatus_to_exitcode(status)


def _rank(config, place, kill):
    if kill and kill.point and kill.rank in (None, place.rank):
        passed = [0]

        def on_failpoint(name):
            if name == kill.point and (kill.rank is not None or place.rank == 0):
                passed[0] += 1
                if passed[0] == kill.passing:
                    os.kill(os.getppid() if kill.rank is None else os.getpid(), signal.SIGKILL)

        failpoints.on_failpoint = on_failpoint
    train(config, place)


def _kill_one(launcher: int, rank: int | None) -> None:
    try:
        if rank is None:
            os.kill(launcher, signal.SIGKILL)
            return
        ranks = rank_pids(launcher)
        if rank < len(ranks):
            os.kill(ranks[rank], signal.SIGKILL)
    except (ProcessLookupError, FileNotFoundError):
        pass  # it has ended already


def rank_pids(launcher: int) -> list[int]:
    """The launcher's children, in the order in which it started them."""
    return [int(pid) for pid in Path(f"/proc/{launcher}/task/{launcher}/children").read_text().split()]


def _wait_for_ranks(group: int) -> None:
    """Until no process of the group is left: ranks die with their launcher, and before the next life begins."""
    for _ in range(1000):
        try:
            os.killpg(group, 0)
        except ProcessLookupError:
            return
        time.sleep(0.01)
    raise AssertionError("ranks have outlived their launcher by ten seconds")


def outcome(run_dir: Path) -> tuple[dict[int, tuple[str, str]], dict[str, str]]:
    """Loss and gradient norm of every step, as hex, and the digests of the final checkpoint's files."""
    rows = read_metrics(run_dir / "metrics.jsonl")
    losses = {row["step"]: (float(row["loss"]).hex(), float(row["grad_norm"]).hex()) for row in rows}
    return losses, final_digests(run_dir)


def final_digests(run_dir: Path) -> dict[str, str]:
    """Of the newest checkpoint's files."""
    folder = newest_checkpoint(run_dir)
    assert folder is not None
    return {entry.name: entry.digest for entry in read_manifest(folder).files}
