"""A sweep under `launch=slurm`: one array, a task for each training that is left, or for each worker of a search."""

import json
import shlex
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from megalite.config.frozen import save_config
from megalite.config.validate_launch import slurm_path_rules
from megalite.errors import EXIT_FAILURE, EXIT_OK, ConfigError, ResourceError
from megalite.guard.run_state import read_state
from megalite.log import get_logger

from ..slurm.script import batch_script
from ..slurm.submit import PATIENCE_SECONDS, SCRIPT, command, submit
from .plan import Job, Sweep
from .state import JOBS, is_finished, outcome_of, read_outcome, save_outcome

log = get_logger(__name__)

ARRAY_FILE = "array.json"  # the command, and the label of each task of the array
JOB = "array_job.txt"  # its number; by another name than that of a run's job, for here is no run
CONFIG = "training.yaml"  # of one task
_POLL_SECONDS = 2.0
_FORGOTTEN = "Invalid job id"  # squeue's words for a job that has long ended


def start_array(sweep: Sweep, jobs: Sequence[Job], workers: int | None = None) -> int:
    """Submit a task for each of `jobs`, or of a search so many `workers`; returns 0 once they are in the queue.

    With `launch.wait` when all have ended. Raises `ResourceError` while an array of this sweep is still in the queue.
    """
    _refuse_a_second(sweep)
    config, started = jobs[0].training.config, time.time()
    script = describe_array(sweep, jobs, workers)
    (sweep.directory / "logs").mkdir(parents=True, exist_ok=True)
    for job in jobs if workers is None else ():
        save_config(job.training.config, sweep.directory / JOBS / job.label / CONFIG)
    labels = [job.label for job in jobs] if workers is None else []
    array = {"arguments": list(sweep.arguments), "labels": labels}
    (sweep.directory / ARRAY_FILE).write_text(json.dumps(array, indent=1) + "\n", encoding="utf-8")
    (sweep.directory / SCRIPT).write_text(script, encoding="utf-8")
    number = submit(sweep.directory / SCRIPT)
    (sweep.directory / JOB).write_text(number + "\n", encoding="utf-8")
    print(f"job {number}: {sweep.directory / SCRIPT}; it writes to {sweep.directory / 'logs'}")
    if not config.launch.wait:
        return EXIT_OK
    while is_queued(number, PATIENCE_SECONDS):
        time.sleep(_POLL_SECONDS)
    if workers is not None:
        return EXIT_OK
    for task, job in enumerate(jobs):
        _note_silent_end(sweep, job, sweep.directory / "logs" / f"slurm_{number}_{task}.log", started)
    return EXIT_OK if all(is_finished(job) for job in jobs) else EXIT_FAILURE


def _note_silent_end(sweep: Sweep, job: Job, log: Path, started: float) -> None:
    """Of a task that Slurm, or the head of its script, ended before it could say anything itself."""
    outcome = read_outcome(sweep.directory, job.label)
    if (outcome is None or outcome.started < started) and not is_finished(job) and read_state(job.run_dir) is None:
        save_outcome(sweep.directory, job.label, outcome_of(log, started, EXIT_FAILURE))


def describe_array(sweep: Sweep, jobs: Sequence[Job], workers: int | None = None) -> str:
    """The script of the array. Its tasks are counted from 0: Slurm's largest number is 1,000 where nobody raised it.

    Raises `ConfigError` for a directory that no script can hold.
    """
    config = jobs[0].training.config
    if problems := list(slurm_path_rules("sweep.dir", str(sweep.directory))):
        raise ConfigError(problems[0])
    limit = f"%{sweep.settings.parallel}" if sweep.settings.parallel and workers is None else ""
    body = [f"exec {shlex.join([sys.executable, '-m', 'megalite.launch.sweep.task', str(sweep.directory.absolute())])}"]
    return batch_script(
        sweep.name,
        config.launch,
        jobs[0].training.ranks_per_node,
        sweep.directory.absolute() / "logs" / "slurm_%A_%a.log",
        body,
        array=f"0-{(workers or len(jobs)) - 1}{limit}",
    )


def is_queued(job: str, patience: float = 0.0) -> bool:
    """Whether a job, or a task of an array, waits or runs; a controller may be away for `patience` seconds.

    Raises `ResourceError` when Slurm does not answer.
    """
    try:
        words = ["squeue", "--noheader", f"--jobs={job}", "--format=%T"]
        return bool(command(*words, patience=patience, final=_FORGOTTEN).strip())
    except ResourceError as error:
        if _FORGOTTEN in str(error):
            return False  # it ended minutes ago
        raise


def _refuse_a_second(sweep: Sweep) -> None:
    try:
        job = (sweep.directory / JOB).read_text(encoding="utf-8").strip()
    except OSError:
        return
    if is_queued(job):
        raise ResourceError(
            f"sweep.dir: job {job} of {sweep.directory} is in the queue; wait for it, or `scancel {job}` ends it"
        )
