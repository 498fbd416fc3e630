"""The trainings of a search, which several processes may work on at once.

Each trial belongs to the worker that holds its lock: when that worker is gone, however it ended, the next one goes on
with the trial where its checkpoint stands.
"""

import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megalite.config.frozen import read_config
from megalite.config.sweep import Dimension
from megalite.errors import (
    EXIT_CHECKPOINT,
    EXIT_DATA,
    EXIT_OK,
    EXIT_REQUEUE,
    EXIT_RESOURCE,
    ConfigError,
    MegaliteError,
    ResourceError,
)
from megalite.guard.lock import RunLock, is_locked
from megalite.guard.run_state import read_state
from megalite.log import get_logger
from megalite.metrics.jsonl import read_metrics

from .plan import Job, Sweep, build_job, check_alike, command_of, metric_of
from .state import JOBS, METRICS, Outcome, Row, is_finished, read_figures, read_outcome, save_outcome
from .study import Study

log = get_logger(__name__)

_KILLED = 128  # exit codes of what a signal ended, for want of memory for instance
_WARMUP_SHARE = 10  # no trial is given up in the first tenth of its steps
_PAUSE_SECONDS = 1.0  # between two looks at figures, and at trials that nobody works on


def plan_search(sweep: Sweep) -> Job:
    """Check the trainings at both ends of all ranges; returns one of them, whose metric and launcher all share.

    Raises one error, naming the end. What Optuna will choose between them may still not fit together: such a trial
    fails, and counts.
    """
    lowest, highest = (
        build_job(sweep, name, _ends(sweep.dimensions, i)) for i, name in enumerate(("lowest", "highest"))
    )
    config, settings = lowest.training.config, sweep.settings
    metric = metric_of(settings, config)
    if settings.prune and metric.startswith("eval/") and not config.trainer.eval_every:
        raise ConfigError(f"sweep.prune: found true, but {metric} is looked at only in the end: set trainer.eval_every")
    check_alike([lowest, highest])
    return lowest


def _ends(dimensions: Sequence[Dimension], which: int) -> list[str]:
    """The first values (0) or the last ones (1) of all dimensions."""
    return [
        (one.choices[0], one.choices[-1])[which] if one.choices else repr((one.ends or (0, 0))[which])
        for one in dimensions
    ]


class Search:
    """Hands out trials until there are `sweep.trials` of them; see `run.Source`."""

    def __init__(self, sweep: Sweep, like: Job | None = None):
        """Open the study, or make it. Raises `ConfigError` when the directory holds another search.

        `like`: what `plan_search` gave, where it was asked already.
        """
        self._sweep = sweep
        config = (like or plan_search(sweep)).training.config
        self._metric = metric_of(sweep.settings, config)
        # What is given up in the warm-up of the learning rate is told apart by its random start alone.
        not_judged = max(config.schedule.warmup_steps, config.trainer.steps // _WARMUP_SHARE)
        self._study = Study(sweep, self._metric, not_judged)
        self.requeues = config.launch.slurm.requeue  # whether Slurm is asked for it
        self._mine: dict[str, tuple[Any, RunLock]] = {}  # label -> trial and its lock
        self._left: set[int] = set()  # stopped by somebody who did not stop the sweep: not to be taken up here again
        self._hopeless: set[str] = set()
        self._seen: dict[str, tuple[float, int]] = {}  # label -> when its figures were read, and the last step of them
        self._looked = -math.inf
        self.is_empty = False
        self.in_vain = ""  # what a training said whose life was too short to save a step
        self.problem = EXIT_OK  # the exit code of what kept this worker from starting trials

    def next(self) -> Job | None:
        """A trial that nobody works on any more, or else a new one."""
        if self.is_empty or time.monotonic() < self._looked + _PAUSE_SECONDS:
            return None
        with self._study.exclusive():
            waits = False
            for frozen in self._study.trials:
                if frozen.state.is_finished() or frozen.number in self._left:
                    continue
                if (lock := self._take(frozen.number)) is None:
                    continue
                if is_locked(self._run_dir(frozen.number)):  # its ranks are about to end
                    lock.close()
                    waits = True
                elif job := self._begin(self._study.resume(frozen), lock):
                    self._seen[job.label] = -math.inf, max(frozen.intermediate_values, default=0)
                    return job
                elif self.problem:
                    return None
            while len(self._study.trials) < int(self._sweep.settings.trials or 0):
                trial = self._study.ask()
                lock = self._take(trial.number)
                assert lock is not None, "nobody else asks"
                if job := self._begin(trial, lock):
                    return job
                if self.problem:
                    return None
            self._looked = time.monotonic()
            self.is_empty = not waits
            return None

    def _begin(self, trial: Any, lock: RunLock) -> Job | None:
        """The training of a trial; None where there is nothing to train, which the study is told."""
        label, values = label_of_trial(trial.number), self._study.values_of(trial)
        try:
            job = build_job(self._sweep, label, values)
        except MegaliteError as error:
            lock.close()
            if not isinstance(error, ConfigError):  # a disk, and not the values: the next command goes on with it
                log.error("%s; nothing more is started here", error)
                self.problem, self.is_empty = error.exit_code, True
                return None
            outcome = Outcome(time.time(), error.exit_code, str(error).removeprefix(f"{label}: "))
            save_outcome(self._sweep.directory, label, outcome)
            self._study.tell(trial, "FAIL")
            return None
        if is_finished(job):  # its worker was gone before it could tell
            self._tell(trial, job, EXIT_OK)
            lock.close()
            return None
        self._mine[job.label] = trial, lock
        return job

    def is_hopeless(self, job: Job) -> bool:
        """Tell the study of new figures; whether the training is worse than the median of the others were then."""
        read_at, last = self._seen.get(job.label, (-math.inf, 0))
        if not self._sweep.settings.prune or time.monotonic() < read_at + _PAUSE_SECONDS:
            return False
        rows = [row for row in read_metrics(job.run_dir / METRICS) if row.get(self._metric) is not None]
        self._seen[job.label] = time.monotonic(), rows[-1]["step"] if rows else last
        new = [row for row in rows if row["step"] > last]
        trial = self._mine[job.label][0]
        with self._study.exclusive():
            for row in new:
                trial.report(row[self._metric], row["step"])
            if new and trial.should_prune():
                log.info("%s is worse than the others were at step %d: given up", job.label, new[-1]["step"])
                self._hopeless.add(job.label)
        return job.label in self._hopeless

    def ended(self, job: Job, code: int) -> int:
        """Tell the study what became of a trial; one that was stopped from outside stays to be taken up again."""
        trial, lock = self._mine.pop(job.label)
        with self._study.exclusive():
            is_told = self._tell(trial, job, code)
            lock.close()
        if not is_told:
            self._left.add(trial.number)
            outcome = read_outcome(self._sweep.directory, job.label)
            if outcome and outcome.code == EXIT_RESOURCE:
                self.in_vain = outcome.error
        return EXIT_OK if is_told else code

    def _tell(self, trial: Any, job: Job, code: int) -> bool:
        value = read_figures(job.run_dir).get(self._metric, math.nan) if is_finished(job) else math.nan
        if math.isfinite(value):
            self._study.tell(trial, "COMPLETE", value)
        elif job.label not in self._hopeless and _was_the_machine(job, code):
            return False  # the next command goes on with it
        else:
            self._study.tell(trial, "PRUNED" if code == EXIT_REQUEUE else "FAIL")
        return True

    def rows(self) -> list[Row]:
        """All trials of the study, by their numbers."""
        with self._study.exclusive():
            return [self._row(frozen) for frozen in self._study.trials]

    def _row(self, frozen: Any) -> Row:
        label, run_dir = label_of_trial(frozen.number), self._run_dir(frozen.number)
        values = self._study.values_told(frozen)
        state, outcome = read_state(run_dir), read_outcome(self._sweep.directory, label)
        name = {"COMPLETE": "finished", "PRUNED": "pruned", "FAIL": "failed"}.get(frozen.state.name)
        if name is None:
            is_running = is_locked(self._sweep.directory / JOBS / label) or is_locked(run_dir)
            name = "running" if is_running else state.state if state else "preempted"
        error = (state.error if state else "") or (outcome.error if outcome else "")
        try:
            config = read_config(run_dir / "config.yaml")
            ranks, steps = config.launch.nproc_per_node, config.trainer.stop_after or config.trainer.steps
        except ConfigError:
            ranks, steps = None, 0
        figures = read_figures(run_dir) if state else {}
        step = max(state.step if state else 0, int(figures.get("step", 0)))
        command = command_of(self._sweep, label, values, ranks)
        return Row(label, values, run_dir, name, step, steps, figures, error if name == "failed" else "", command)

    @property
    def num_ended(self) -> int:
        """Trials that are through, well or not."""
        with self._study.exclusive():
            return sum(frozen.state.is_finished() for frozen in self._study.trials)

    def _run_dir(self, number: int) -> Path:
        return self._sweep.directory / label_of_trial(number)

    def _take(self, number: int) -> RunLock | None:
        """The lock of a trial; None while a worker holds it."""
        label = label_of_trial(number)
        if label in self._mine:
            return None
        folder = self._sweep.directory / JOBS / label
        try:
            return RunLock(folder, key="sweep.dir", work="worker")
        except ResourceError:
            if is_locked(folder):
                return None
            raise  # a disk: nobody holds it


def _was_the_machine(job: Job, code: int) -> bool:
    """Whether a trial was ended by its machine, a person or its data, and not by its values."""
    state = read_state(job.run_dir)
    has_died = state is not None and state.state == "died"  # whose code Slurm's driver does not keep
    return has_died or code in (EXIT_REQUEUE, EXIT_RESOURCE, EXIT_DATA, EXIT_CHECKPOINT) or code >= _KILLED


def label_of_trial(number: int) -> str:
    """The folder of a trial in the sweep's directory."""
    return f"trial_{number:04d}"
