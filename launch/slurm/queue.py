"""What Slurm knows of jobs, asked once for all of them; nothing where there is no Slurm."""

import re
import shutil
import subprocess
from collections.abc import Collection
from dataclasses import dataclass, field

_SECONDS = 10.0  # a client whose controller is gone waits for minutes
_SHOWN = 500  # job numbers on one command line


@dataclass(frozen=True)
class QueuedJob:
    """`state` and `reason` in Slurm's words: RUNNING; PENDING and Resources."""

    state: str
    reason: str


@dataclass(frozen=True)
class Queue:
    """The jobs that are in the queue or at work, by their number (`12`, or `12_3` of an array); and what went wrong."""

    jobs: dict[str, QueuedJob] = field(default_factory=dict)
    asked: frozenset[str] = frozenset()  # the numbers, without an array's tasks, that Slurm gave an answer about
    problem: str = ""

    def has_ended(self, job: str) -> bool:
        """Whether Slurm was asked for a job, and does not have it any more."""
        return job.partition("_")[0] in self.asked and job not in self.jobs


def ask_squeue(numbers: Collection[str]) -> Queue:
    """What Slurm has of jobs; nothing, and no answer, where there is no Slurm."""
    asked = sorted({match[0] for number in numbers if (match := re.match(r"\d+", number))})[-_SHOWN:]
    if not asked or shutil.which("squeue") is None:
        return Queue()
    # Two numbers at least: of a single one that it does not know squeue makes an error, of several it leaves it out.
    words = ["squeue", "--noheader", "--array", "--format=%i|%T|%r", f"--jobs={','.join([*asked, asked[0]])}"]
    try:
        done = subprocess.run(words, capture_output=True, text=True, timeout=_SECONDS, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return Queue(problem="squeue gives no answer")
    jobs = {}
    for line in done.stdout.splitlines():
        number, _, rest = line.strip().partition("|")
        state, _, reason = rest.partition("|")
        if number and state:
            jobs[number] = QueuedJob(state, reason)
    problem = " ".join(done.stderr.split()) or f"exit code {done.returncode}"
    if done.returncode:
        return Queue(jobs, problem=f"squeue: {problem[:200]}")
    return Queue(jobs, frozenset(asked))
