"""Trainings of `megalite resume-check`: each in processes of its own, to the end or until `kill -9`."""

import ctypes
import multiprocessing
import os
import shutil
import signal
import sys
import time
from collections.abc import Iterator, MutableSequence
from contextlib import contextmanager, suppress
from multiprocessing.process import BaseProcess
from pathlib import Path

from megalite.config.place import Place
from megalite.config.schema import TrainConfig
from megalite.errors import EXIT_FAILURE, MegaliteError
from megalite.metrics.jsonl import read_metrics

from ..spawn import spawn_ranks
from .compare import METRICS, newest

_STOPPED = (128 + signal.SIGINT, 128 + signal.SIGTERM)  # exit codes of ranks that somebody stopped
_PR_SET_PDEATHSIG = 1
_POLL_SECONDS = 0.002
_GRACE_SECONDS = 5.0  # in which a driver whose ranks are gone cleans up after them
_ATTEMPTS = 3  # to kill a run before it has ended
_LOG_LINES = 12  # of a run that failed, shown


class ResumeCheckError(MegaliteError):
    """An interruption changed the numbers, or one of the runs failed; `exit_code` is then that of its ranks."""

    def __init__(self, message: str, exit_code: int = EXIT_FAILURE):
        super().__init__(message)
        self.exit_code = exit_code


def train(config: TrainConfig, world_size: int) -> None:
    """Train in fresh processes to the end. Raises `ResumeCheckError` when they fail."""
    with _ranks(config, world_size) as (driver, _):
        driver.join()
    _check_exit(driver, config)


def train_and_kill(config: TrainConfig, world_size: int, saved: int) -> int:
    """Train, and `kill -9` all ranks in the middle of a step while the checkpoint of step `saved` is the newest.

    Returns the last step in metrics.jsonl, above `saved`. Raises `ResumeCheckError` when the ranks fail before that,
    or are too fast.
    """
    run_dir = Path(config.run_dir)
    for _ in range(_ATTEMPTS):
        shutil.rmtree(run_dir, ignore_errors=True)
        with _ranks(config, world_size) as (driver, ranks):
            was_killed = _kill_after(driver, ranks, run_dir, saved)
            driver.join()
        if not was_killed:
            _check_exit(driver, config)
        elif driver.exitcode and _newest_step(run_dir) == saved:
            return int(read_metrics(run_dir / METRICS)[-1]["step"])
    raise ResumeCheckError(
        f"the run had saved again before it could be killed between steps {saved} and {2 * saved}, {_ATTEMPTS} times: "
        "its steps are too short. Raise resume_check.steps, or leave the kill out with resume_check.kill=false"
    )


def _kill_after(driver: BaseProcess, ranks: MutableSequence[int], run_dir: Path, saved: int) -> bool:
    """Kill the ranks half a step after the row that follows the save; False when they ended before."""
    while driver.is_alive():
        rows = read_metrics(run_dir / METRICS)
        if rows and rows[-1]["step"] > saved and _newest_step(run_dir) == saved:
            time.sleep(rows[-1]["step_seconds"] / 2)
            _kill(driver, ranks)
            return True
        time.sleep(_POLL_SECONDS)
    return False


def _newest_step(run_dir: Path) -> int:
    folder = newest(run_dir)
    return int(folder.name.removeprefix("step_")) if folder else 0


@contextmanager
def _ranks(config: TrainConfig, world_size: int) -> Iterator[tuple[BaseProcess, MutableSequence[int]]]:
    """A process that starts the ranks of `config` and waits for them, and the ranks' process ids (0 before they run).

    What they print goes to <run_dir>.log. None of them outlives the block.
    """
    context = multiprocessing.get_context("fork")
    ranks: MutableSequence[int] = context.Array("i", world_size, lock=False)
    driver = context.Process(target=_drive, args=(config, world_size, ranks, os.getpid()))
    driver.start()
    try:
        yield driver, ranks
    finally:
        _kill(driver, ranks)
        driver.join(_GRACE_SECONDS)
        driver.kill()
        driver.join()


def _drive(config: TrainConfig, world_size: int, ranks: MutableSequence[int], parent: int) -> None:
    """The life of that process. It ends with its parent, as its ranks end with it."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(EXIT_FAILURE)  # the parent died before the line above
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    output = open(log_file(config), "a", buffering=1, encoding="utf-8")  # noqa: SIM115  until the process ends
    os.dup2(output.fileno(), 1)
    os.dup2(output.fileno(), 2)
    sys.stdout = sys.stderr = output

    def rank_main(place: Place) -> None:
        from megalite.train import train as train_rank

        ranks[place.rank] = os.getpid()
        train_rank(config, place)

    sys.exit(spawn_ranks(rank_main, world_size))


def log_file(config: TrainConfig) -> Path:
    """What the ranks of a run print; beside its run directory, which is theirs alone."""
    return Path(f"{config.run_dir}.log")


def _kill(driver: BaseProcess, ranks: MutableSequence[int]) -> None:
    for rank in ranks:
        # A driver that has ended has seen to its ranks: their numbers may be those of others now.
        if rank and driver.is_alive():
            with suppress(ProcessLookupError):
                os.kill(rank, signal.SIGKILL)


def _check_exit(driver: BaseProcess, config: TrainConfig) -> None:
    code = driver.exitcode or 0
    code = code if code >= 0 else 128 - code
    if code in _STOPPED:
        raise SystemExit(code)
    if code:
        lines = log_file(config).read_text(encoding="utf-8", errors="replace").splitlines()
        said = "\n".join(f"  {line}" for line in lines[-_LOG_LINES:])
        raise ResumeCheckError(f"a run failed with exit code {code}. The last that its ranks printed:\n{said}", code)
