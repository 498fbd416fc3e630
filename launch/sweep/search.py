"""The trainings of a search: Optuna chooses their values, in a study that several processes may work on at once.

One worker at a time looks at the study (a lock on a file), and each trial belongs to the worker that holds its lock:
when that worker is gone, however it ended, the next one goes on with the trial where its checkpoint stands.
"""

import fcntl
import json
import math
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
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
from megalite.guard.observer import read_json
from megalite.guard.run_state import read_state
from megalite.log import get_logger
from megalite.metrics.jsonl import read_metrics

from .plan import Job, Sweep, build_job, check_alike, command_of, metric_of, numbers_of
from .state import JOBS, METRICS, Outcome, Row, is_finished, read_figures, read_outcome, save_outcome

log = get_logger(__name__)

STUDY_FILE = "study.sqlite"
_SEARCH_FILE = "search.json"
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
        self._sweep, self._optuna = sweep, _import_optuna()
        config = (like or plan_search(sweep)).training.config
        sweep.directory.mkdir(parents=True, exist_ok=True)
        self._metric = metric_of(sweep.settings, config)
        # What is given up in the warm-up of the learning rate is told apart by its random start alone.
        self._not_judged = max(config.schedule.warmup_steps, config.trainer.steps // _WARMUP_SHARE)
        self.requeues = config.launch.slurm.requeue  # whether Slurm is asked for it
        self._mine: dict[str, tuple[Any, RunLock]] = {}  # label -> trial and its lock
        self._left: set[int] = set()  # stopped by somebody who did not stop the sweep: not to be taken up here again
        self._hopeless: set[str] = set()
        self._seen: dict[str, tuple[float, int]] = {}  # label -> when its figures were read, and the last step of them
        self._looked = -math.inf
        self.is_empty = False
        self.problem = EXIT_OK  # the exit code of what kept this worker from starting trials
        with self._exclusive():
            self._check_same()
            self._study = self._open()

    def next(self) -> Job | None:
        """A trial that nobody works on any more, or else a new one."""
        if self.is_empty or time.monotonic() < self._looked + _PAUSE_SECONDS:
            return None
        with self._exclusive():
            trials = self._study.get_trials(deepcopy=False)
            waits = False
            for frozen in trials:
                if frozen.state.is_finished() or frozen.number in self._left:
                    continue
                if (lock := self._take(frozen.number)) is None:
                    continue
                if is_locked(self._run_dir(frozen.number)):  # its ranks are about to end
                    lock.close()
                    waits = True
                elif job := self._begin(self._optuna.trial.Trial(self._study, frozen._trial_id), lock):
                    self._seen[job.label] = -math.inf, max(frozen.intermediate_values, default=0)
                    return job
                elif self.problem:
                    return None
            while len(self._study.get_trials(deepcopy=False)) < int(self._sweep.settings.trials or 0):
                number = len(self._study.get_trials(deepcopy=False))
                self._study.sampler = self._sampler(number)
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
        values = [_suggest(trial, dimension) for dimension in self._sweep.dimensions]
        try:
            job = build_job(self._sweep, label_of_trial(trial.number), values)
        except MegaliteError as error:
            lock.close()
            if not isinstance(error, ConfigError):  # a disk, and not the values: the next command goes on with it
                log.error("%s; nothing more is started here", error)
                self.problem, self.is_empty = error.exit_code, True
                return None
            outcome = Outcome(
                time.time(), error.exit_code, str(error).removeprefix(f"{label_of_trial(trial.number)}: ")
            )
            save_outcome(self._sweep.directory, label_of_trial(trial.number), outcome)
            self._study.tell(trial, state=self._optuna.trial.TrialState.FAIL)
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
        with self._exclusive():
            for row in new:
                trial.report(row[self._metric], row["step"])
            if new and trial.should_prune():
                log.info("%s is worse than the others were at step %d: given up", job.label, new[-1]["step"])
                self._hopeless.add(job.label)
        return job.label in self._hopeless

    def ended(self, job: Job, code: int) -> int:
        """Tell the study what became of a trial; one that was stopped from outside stays to be taken up again."""
        trial, lock = self._mine.pop(job.label)
        with self._exclusive():
            is_told = self._tell(trial, job, code)
            lock.close()
        if not is_told:
            self._left.add(trial.number)
        return EXIT_OK if is_told else code

    def _tell(self, trial: Any, job: Job, code: int) -> bool:
        states = self._optuna.trial.TrialState
        value = read_figures(job.run_dir).get(self._metric, math.nan) if is_finished(job) else math.nan
        if math.isfinite(value):
            self._study.tell(trial, value)
        elif job.label not in self._hopeless and _was_the_machine(job, code):
            return False  # the next command goes on with it
        else:
            self._study.tell(trial, state=states.PRUNED if code == EXIT_REQUEUE else states.FAIL)
        return True

    def rows(self) -> list[Row]:
        """All trials of the study, by their numbers."""
        with self._exclusive():
            return [self._row(frozen) for frozen in self._study.get_trials(deepcopy=False)]

    def _row(self, frozen: Any) -> Row:
        label, run_dir = label_of_trial(frozen.number), self._run_dir(frozen.number)
        values = tuple(
            _text(one, frozen.params[one.key]) if one.key in frozen.params else "" for one in self._sweep.dimensions
        )
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
        with self._exclusive():
            return sum(frozen.state.is_finished() for frozen in self._study.get_trials(deepcopy=False))

    def _run_dir(self, number: int) -> Path:
        return self._sweep.directory / label_of_trial(number)

    def _take(self, number: int) -> RunLock | None:
        """The lock of a trial; None while a worker holds it."""
        label = label_of_trial(number)
        if label in self._mine:
            return None
        try:
            return RunLock(self._sweep.directory / JOBS / label, key="sweep.dir", work="worker")
        except ResourceError:
            return None

    def _open(self) -> Any:
        optuna, settings = self._optuna, self._sweep.settings
        return optuna.create_study(
            storage=f"sqlite:///{(self._sweep.directory / STUDY_FILE).absolute()}",
            study_name="sweep",
            direction=settings.direction,
            load_if_exists=True,
            sampler=self._sampler(0),
            pruner=optuna.pruners.MedianPruner(n_warmup_steps=self._not_judged)
            if settings.prune
            else optuna.pruners.NopPruner(),
        )

    def _sampler(self, number: int) -> Any:
        """Seeded for one trial: what it draws depends on the trials before it, and not on who asks."""
        seed = (self._sweep.settings.seed + number * 1_000_003) % 2**32
        return self._optuna.samplers.TPESampler(seed=seed, constant_liar=True)

    def _check_same(self) -> None:
        sweep, path = self._sweep, self._sweep.directory / _SEARCH_FILE
        said = {
            "dimensions": [dimension.line for dimension in sweep.dimensions],
            "others": sorted(numbers_of(sweep.single)),
            "metric": self._metric,
            "direction": sweep.settings.direction,
        }
        found = read_json(path, {})  # nothing, where a disk was full
        if not found:
            temporary = path.with_suffix(".tmp")
            temporary.write_text(json.dumps(said, indent=1) + "\n", encoding="utf-8")
            temporary.replace(path)
        elif found != said:
            what = next(key for key in said if found.get(key) != said[key])
            raise ConfigError(
                f"sweep.dir: {sweep.directory} holds a search with other {what}: {found.get(what)}, and not "
                f"{said[what]}; choose another sweep.name"
            )

    @contextmanager
    def _exclusive(self) -> Iterator[None]:
        """No other process looks at the study within the block; waits for it. Raises `ResourceError` for its file."""
        from sqlalchemy.exc import SQLAlchemyError

        with open(self._sweep.directory / "study.lock", "w", encoding="utf-8") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            try:
                yield
            except (SQLAlchemyError, self._optuna.exceptions.StorageInternalError) as error:
                reason = str(error.__cause__ or error).partition("\n")[0]
                raise ResourceError(
                    f"sweep.dir: {self._sweep.directory / STUDY_FILE} cannot be read or written: {reason}; restore it, "
                    f"or choose another sweep.name: what was trained stays in {self._sweep.directory}"
                ) from None


def _was_the_machine(job: Job, code: int) -> bool:
    """Whether a trial was ended by its machine, a person or its data, and not by its values."""
    state = read_state(job.run_dir)
    has_died = state is not None and state.state == "died"  # whose code Slurm's driver does not keep
    return has_died or code in (EXIT_REQUEUE, EXIT_RESOURCE, EXIT_DATA, EXIT_CHECKPOINT) or code >= _KILLED


def label_of_trial(number: int) -> str:
    """The folder of a trial in the sweep's directory."""
    return f"trial_{number:04d}"


def _suggest(trial: Any, dimension: Dimension) -> str:
    """The value of a trial for a key, as text of a command line; the same for each call."""
    key, ends = dimension.key, dimension.ends
    if ends is None:
        return _text(dimension, trial.suggest_categorical(key, dimension.choices))
    if isinstance(ends[0], int) and isinstance(ends[1], int):
        return _text(dimension, trial.suggest_int(key, *ends, step=int(dimension.step or 1), log=dimension.log))
    return _text(dimension, trial.suggest_float(key, *ends, step=dimension.step, log=dimension.log))


def _text(dimension: Dimension, value: Any) -> str:
    """A value of Optuna's as text that gives the same number back."""
    if dimension.ends is None or not dimension.choices:
        return str(value)
    return min(dimension.choices, key=lambda choice: abs(float(choice) - value))  # 0.3, and not 0.30000000000000004


def _import_optuna() -> Any:
    try:
        import optuna
    except ImportError:
        raise ConfigError("sweep.trials: needs the library optuna: pip install megalite[sweep]") from None
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    return optuna
