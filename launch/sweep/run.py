"""Trainings one after another or side by side, each a process of its own on devices of its own."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

from megalite.config.frozen import FROZEN, config_to_send
from megalite.config.place import count_gpus
from megalite.config.schema import TrainConfig
from megalite.errors import EXIT_OK, EXIT_REQUEUE, EXIT_RESOURCE
from megalite.guard.signals import SIGNALS
from megalite.log import get_logger

from ..supervise import clean_environment
from .plan import Job
from .state import outcome_of, save_outcome

log = get_logger(__name__)

_POLL_SECONDS = 0.1
LOG = "logs/sweep.log"  # in a run directory: what the training said


class Source(Protocol):
    """Where trainings come from, and who hears what became of them."""

    def next(self) -> Job | None:
        """A training to start; None: there is none, or none yet."""
        ...

    @property
    def is_empty(self) -> bool:
        """Whether `next` will have none any more."""
        ...

    def is_hopeless(self, job: Job) -> bool:
        """Whether a training that runs is to be stopped; asked now and then."""
        ...

    def ended(self, job: Job, code: int) -> int:
        """A training has ended with `code`; returns what that means for the whole."""
        ...


@dataclass(frozen=True)
class Slot:
    """What one training at a time has for itself."""

    number: int
    cores: frozenset[int] = frozenset()  # none: all of them
    gpus: tuple[str, ...] = ()  # as CUDA_VISIBLE_DEVICES names them; none: all of them


def slots_of(parallel: int, gpus_each: int | None) -> list[Slot]:
    """The machine in `parallel` parts: GPUs where there are any, and cores; one part is all of it."""
    if parallel == 1:
        return [Slot(0)]
    cores = sorted(os.sched_getaffinity(0))
    shares = [cores[i::parallel] or [cores[i % len(cores)]] for i in range(parallel)]
    if len(cores) >= parallel:  # neighbours share caches
        shares = [cores[i * len(cores) // parallel : (i + 1) * len(cores) // parallel] for i in range(parallel)]
    visible = [device for device in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if device.strip()]
    gpus = (visible or [str(number) for number in range(count_gpus())])[: count_gpus()]
    each = (gpus_each or 1) if gpus else 0
    return [Slot(i, frozenset(shares[i]), tuple(gpus[i * each : (i + 1) * each])) for i in range(parallel)]


@dataclass(frozen=True)
class _Child:
    job: Job
    process: "subprocess.Popen[bytes]"
    started: float


def run_side_by_side(source: Source, slots: list[Slot], directory: Path, received: list[int] | None = None) -> int:
    """Run what `source` gives, one training a slot, until it is empty; how each ended is noted in `directory`.

    Returns 0 when each ended well; 75 when a signal asked to stop, which all trainings hear: they save; else the code
    of the first that failed. SIGUSR1 reaches trainings as itself, SIGTERM and SIGINT as SIGTERM; a second one too.
    `received` takes the numbers of these signals.
    """
    received = [] if received is None else received
    running: dict[Slot, _Child] = {}
    told: set[str] = set()
    codes = []
    heard = 0
    with _noting_signals(received):
        while running or not (received or source.is_empty):
            for slot in slots:
                if slot not in running and not received and (job := source.next()):
                    running[slot] = _start(job, slot)
            for number in received[heard:]:
                heard += 1
                for child in running.values():
                    _send(child, signal.SIGUSR1 if number == signal.SIGUSR1 else signal.SIGTERM)
            for slot, child in list(running.items()):
                if child.process.poll() is not None:
                    del running[slot]
                    codes.append(source.ended(child.job, _settle(child, directory, bool(received))))
                elif not received and child.job.label not in told and source.is_hopeless(child.job):
                    told.add(child.job.label)
                    _send(child, signal.SIGTERM)
            time.sleep(_POLL_SECONDS)
    if received:
        return EXIT_REQUEUE
    failed = [code for code in codes if code not in (EXIT_OK, EXIT_REQUEUE)]
    return failed[0] if failed else max(codes, default=EXIT_OK)


def _settle(child: _Child, directory: Path, was_asked: bool) -> int:
    """Note how a process ended; returns its exit code, as a shell would (128 + the number of a signal)."""
    job, number = child.job, child.process.returncode
    code = number if number >= 0 else 128 - number
    if was_asked and code not in (EXIT_OK, EXIT_RESOURCE):
        code = EXIT_REQUEUE  # before its first step, or at once for a second signal: it goes on where it stood
    outcome = outcome_of(job.run_dir / LOG, child.started, code, job.run_dir)
    save_outcome(directory, job.label, outcome)
    how = {EXIT_OK: "finished", EXIT_REQUEUE: "stopped, saved"}.get(code, f"failed: {outcome.error}")
    log.info("%s: %s, after %.0f s", job.label, how, time.time() - child.started)
    return code


def _start(job: Job, slot: Slot) -> _Child:
    """A training's process, its output appended to a file in its run directory."""
    environment = clean_environment() | {FROZEN: config_to_send(_placed(job, slot))}
    if slot.cores:
        environment.setdefault("OMP_NUM_THREADS", str(max(1, len(slot.cores) // job.training.ranks_per_node)))
    if slot.gpus:
        environment["CUDA_VISIBLE_DEVICES"] = ",".join(slot.gpus)
    path = job.run_dir / LOG
    path.parent.mkdir(parents=True, exist_ok=True)
    log.info("%s starts; it writes to %s", job.label, path)
    everywhere, started = os.sched_getaffinity(0), time.time()
    with path.open("ab") as output:
        try:
            os.sched_setaffinity(0, slot.cores or everywhere)  # inherited, also by what torch asks while it is imported
            process = subprocess.Popen(
                job_command(),
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,  # an interrupt from the terminal is for this process, which passes it on
            )
        finally:
            os.sched_setaffinity(0, everywhere)
    return _Child(job, process, started)


def job_command() -> list[str]:
    """What starts the training that the environment holds."""
    return [sys.executable, "-m", "megalite.launch.sweep.job", str(os.getpid())]


def _placed(job: Job, slot: Slot) -> TrainConfig:
    """The configuration, with a port of its own where all would take the given one."""
    config = job.training.config
    if config.launch.port is None or not slot.number:
        return config
    return replace(config, launch=replace(config.launch, port=config.launch.port + 2 * slot.number))


def _send(child: _Child, number: int) -> None:
    if child.process.poll() is None:
        child.process.send_signal(number)


@contextmanager
def _noting_signals(received: list[int]) -> Iterator[None]:
    """Within the block signals that ask this process to stop are only noted."""
    before = {number: signal.signal(number, lambda number, _: received.append(number)) for number in SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
