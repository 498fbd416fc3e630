"""`launch=slurm`: the script is kept in the run directory, submitted, and waited for if asked."""

import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from megalite.config.frozen import config_to_send
from megalite.errors import EXIT_FAILURE, EXIT_OK, ConfigError, ResourceError
from megalite.guard.lock import is_locked
from megalite.log import get_logger

from ..prepare import Training
from .script import batch_script, dependency, training_body

log = get_logger(__name__)

SCRIPT = "job.sbatch"
JOB = "job.txt"  # the number of the job that was submitted last
_POLL_SECONDS = 2.0  # `sbatch --wait` looks ever more seldom, up to half a minute
_COMMAND_SECONDS = 60.0  # a client whose controller is gone waits for minutes
PATIENCE_SECONDS = 600.0  # that a controller may be away while a job is waited for
_FINAL_STATES = (
    "COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY", "BOOT_FAIL", "DEADLINE", "PREEMPTED",
    "REVOKED",
)  # fmt: skip


def start_slurm(training: Training) -> int:
    """Submit the training; returns 0 once it is in the queue, or with `launch.wait` the job's exit code."""
    config = training.config
    run_dir = Path(config.run_dir)
    _refuse_a_second(run_dir)
    text = script_of(training)
    try:
        (run_dir / "logs").mkdir(parents=True, exist_ok=True)
        (run_dir / SCRIPT).write_text(text, encoding="utf-8")
    except OSError as error:
        raise ResourceError(f"run_dir: nothing can be written in {run_dir}: {error}") from None
    job = submit(run_dir / SCRIPT)
    with suppress(OSError):  # a full disk: the job is in the queue all the same
        (run_dir / JOB).write_text(job + "\n", encoding="utf-8")
    print(f"job {job}: {run_dir / SCRIPT}; it writes to {log_of(run_dir, job)}")
    return wait_for(job) if config.launch.wait else EXIT_OK


def script_of(training: Training) -> str:
    """The batch script of a training."""
    config = training.config
    folder = Path(config.run_dir).absolute() / "logs"
    body = training_body(config_to_send(config))
    return batch_script(config.run_name, config.launch, training.ranks_per_node, folder / "slurm_%j.log", body)


def describe_slurm(training: Training) -> str:
    """The script that `start_slurm` would submit."""
    return script_of(training).rstrip("\n")


def log_of(run_dir: Path, job: str) -> Path:
    """Where a job of one training writes."""
    return run_dir / "logs" / f"slurm_{job}.log"


def submit(script: Path, after: Sequence[str] = ()) -> str:
    """Hand a script to sbatch; returns the job's number. Raises `ResourceError` with what sbatch said.

    `after`: jobs that must have ended well before it starts.
    """
    return command("sbatch", "--parsable", *dependency(after), str(script)).strip().partition(";")[0]


def command(*arguments: str, patience: float = 0.0, final: str = "\0") -> str:
    """What a command of Slurm prints. Raises `ResourceError` when it fails, and `ConfigError` when there is none.

    `patience`: seconds for which it is tried again; Slurm's controller may be restarted at any time. `final`: words of
    an error that no other try would mend.
    """
    deadline = time.monotonic() + patience
    while True:
        try:
            return _command_once(*arguments)
        except ResourceError as error:
            if final in str(error) or time.monotonic() > deadline:
                raise
            time.sleep(min(patience, 10.0))


def _command_once(*arguments: str) -> str:
    if shutil.which(arguments[0]) is None:
        raise ConfigError(f"launch: found slurm, but there is no {arguments[0]} on this host; allowed: where Slurm is")
    try:
        done = subprocess.run(arguments, capture_output=True, text=True, timeout=_COMMAND_SECONDS, check=False)
    except subprocess.TimeoutExpired:
        raise ResourceError(
            f"{arguments[0]} gave no answer within {_COMMAND_SECONDS:.0f} s: is Slurm's controller up?"
        ) from None
    if done.returncode:
        said = " ".join(done.stderr.split()) or f"exit code {done.returncode}"
        raise ResourceError(f"{arguments[0]}: {said}")
    return done.stdout


def wait_for(job: str) -> int:
    """Wait until a job has ended for good; returns its exit code (EXIT_FAILURE when Slurm ended it)."""
    while (found := job_state(job, PATIENCE_SECONDS))[0] not in _FINAL_STATES:
        time.sleep(_POLL_SECONDS)
    state, code = found
    print(f"job {job}: {state}, exit code {code}", file=sys.stderr)
    return code if state != "COMPLETED" else EXIT_OK


def job_state(job: str, patience: float = 0.0) -> tuple[str, int]:
    """A job's state in Slurm's words, and its exit code (128 + a signal's number)."""
    shown = job_record(job, patience)
    state, (code, number) = shown["JobState"], map(int, shown["ExitCode"].split(":"))
    return state, code or (128 + number if number else 0) or (EXIT_FAILURE if state != "COMPLETED" else 0)


def job_record(job: str, patience: float = 0.0) -> dict[str, str]:
    """What scontrol shows of a job, by Slurm's names; of values with blanks the first word."""
    lines = command("scontrol", "--oneliner", "show", "job", job, patience=patience).splitlines()
    # By the number of an array all of its tasks are shown, one of which has the same number.
    text = next((line for line in lines if line.startswith(f"JobId={job} ")), "".join(lines[:1]))
    shown = dict(re.findall(r"(?:^|\s)(\w+)=(\S+)", text))
    if not {"JobState", "ExitCode"} <= shown.keys():
        raise ResourceError(f"scontrol says of job {job}: {text[:200]}")
    return shown


def _refuse_a_second(run_dir: Path) -> None:
    """Two jobs on one run directory: the second would wait for its nodes only to be refused there."""
    if is_locked(run_dir):
        raise ResourceError(
            f"run_dir: {run_dir} is in use by another training; wait for it, or choose another run_name"
        )
    refuse_queued("run_dir", run_dir, "another run_name is another run")


def refuse_queued(key: str, folder: Path, advice: str) -> None:
    """Raise `ResourceError` while a job whose number stands in `folder` is in the queue or at work."""
    try:
        jobs = (folder / JOB).read_text(encoding="utf-8").split()
    except OSError:
        return
    for job in jobs:
        try:
            state = job_state(job)[0]
        except ResourceError:
            continue  # Slurm has forgotten it
        if state not in _FINAL_STATES and job != os.environ.get("SLURM_JOB_ID"):
            ends = f"`scancel {' '.join(jobs)}`"
            raise ResourceError(f"{key}: job {job} of {folder} is {state}; {ends} ends it, {advice}")
