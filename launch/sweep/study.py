"""The study of a search: Optuna chooses values, in a file that several processes look at, one at a time."""

import fcntl
import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from megalite.config.sweep import Dimension
from megalite.errors import ConfigError, ResourceError
from megalite.guard.observer import read_json

from .plan import Sweep, numbers_of

STUDY_FILE = "study.sqlite"
_SEARCH_FILE = "search.json"


class Study:
    """A sweep's study. All but `exclusive` is for within its block."""

    def __init__(self, sweep: Sweep, metric: str, not_judged: int):
        """Open the study, or make it; with `sweep.prune` no trial is judged in its first `not_judged` steps.

        Raises `ConfigError` when the directory holds another search, and `ResourceError` for its file.
        """
        self._sweep, self._optuna = sweep, _import_optuna()
        sweep.directory.mkdir(parents=True, exist_ok=True)
        pruners = self._optuna.pruners
        with self.exclusive():
            self._check_same(metric)
            self._study = self._optuna.create_study(
                storage=f"sqlite:///{(sweep.directory / STUDY_FILE).absolute()}",
                study_name="sweep",
                direction=sweep.settings.direction,
                load_if_exists=True,
                sampler=self._sampler(0),
                pruner=pruners.MedianPruner(n_warmup_steps=not_judged) if sweep.settings.prune else pruners.NopPruner(),
            )

    @contextmanager
    def exclusive(self) -> Iterator[None]:
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

    @property
    def trials(self) -> list[Any]:
        """Optuna's frozen trials, by their numbers."""
        return self._study.get_trials(deepcopy=False)

    def ask(self) -> Any:
        """A new trial."""
        self._study.sampler = self._sampler(len(self.trials))
        return self._study.ask()

    def resume(self, frozen: Any) -> Any:
        """The trial of a frozen one that has not ended."""
        return self._optuna.trial.Trial(self._study, frozen._trial_id)

    def tell(self, trial: Any, state: str, value: float | None = None) -> None:
        """A trial has ended: COMPLETE with a value, PRUNED, or FAIL."""
        self._study.tell(trial, value, state=self._optuna.trial.TrialState[state])

    def values_of(self, trial: Any) -> list[str]:
        """A trial's values for the sweep's keys, chosen now where it has none, as texts of a command line."""
        return [suggest(trial, dimension) for dimension in self._sweep.dimensions]

    def values_told(self, frozen: Any) -> tuple[str, ...]:
        """Those that a frozen trial has; empty where it has none."""
        params = frozen.params
        return tuple(_text(one, params[one.key]) if one.key in params else "" for one in self._sweep.dimensions)

    def _sampler(self, number: int) -> Any:
        """Seeded for one trial: what it draws depends on the trials before it, and not on who asks."""
        seed = (self._sweep.settings.seed + number * 1_000_003) % 2**32
        return self._optuna.samplers.TPESampler(seed=seed, constant_liar=True)

    def _check_same(self, metric: str) -> None:
        sweep, path = self._sweep, self._sweep.directory / _SEARCH_FILE
        said = {
            "dimensions": [dimension.line for dimension in sweep.dimensions],
            "others": sorted(numbers_of(sweep.single)),
            "metric": metric,
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


def suggest(trial: Any, dimension: Dimension) -> str:
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
