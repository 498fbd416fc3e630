"""What became of the trainings of a sweep, read from their run directories and from how their processes ended."""

import json
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from statistics import median

from megalite.config.compose import SAFE, config_digest, config_values
from megalite.config.frozen import read_config
from megalite.errors import EXIT_OK, EXIT_REQUEUE, ConfigError
from megalite.guard.lock import is_locked
from megalite.guard.run_state import RunState, read_state
from megalite.metrics.jsonl import read_metrics
from megalite.redaction import redact_text

from ..monitor.first_error import find_first_error
from ..tail import tail_lines
from .plan import Job

JOBS = "jobs"  # in the sweep's directory: a folder for each training, beside its run directory
METRICS = "metrics.jsonl"
_OUTCOME = "outcome.json"
_TAIL_BYTES = 4096


@dataclass(frozen=True)
class Row:
    """One training in the sweep's table."""

    label: str
    values: tuple[str, ...]  # of the sweep's keys
    run_dir: Path
    # not started; pruned (by a search); or as in `RunState`: running, finished, stopped, preempted, failed, died
    state: str
    step: int = 0
    steps: int = 0  # where it is to end
    figures: dict[str, float] = field(default_factory=dict)  # the last of each, by the names of metrics.jsonl
    error: str = ""
    command: str = ""

    @property
    def is_done(self) -> bool:
        """Whether its figures are those of its end."""
        return self.state in ("finished", "stopped")


@dataclass(frozen=True)
class Outcome:
    """How the process of a training ended, told also where it came to no state of its own."""

    started: float  # seconds since 1970
    code: int
    error: str = ""


def save_outcome(directory: Path, label: str, outcome: Outcome) -> None:
    """Write it into the sweep's `directory`."""
    folder = directory / JOBS / label
    folder.mkdir(parents=True, exist_ok=True)
    temporary = folder / (_OUTCOME + ".tmp")
    temporary.write_text(json.dumps(asdict(outcome)) + "\n", encoding="utf-8")
    temporary.replace(folder / _OUTCOME)


def read_outcome(directory: Path, label: str) -> Outcome | None:
    """None: no process of it has ended yet."""
    try:
        return Outcome(**json.loads((directory / JOBS / label / _OUTCOME).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return None


def is_finished(job: Job) -> bool:
    """Whether the training is at its end, with this configuration."""
    state, trainer = read_state(job.run_dir), job.training.config.trainer
    if (
        state is None
        or state.state not in ("finished", "stopped")
        or state.step < (trainer.stop_after or trainer.steps)
    ):
        return False
    try:
        found = read_config(job.run_dir / "config.yaml")
    except ConfigError:
        return False
    planned = job.training.config
    if planned.model.vocab_size is None:  # it was planned before its stores were there
        planned = replace(planned, model=replace(planned.model, vocab_size=found.model.vocab_size))
    return config_digest(config_values(found), SAFE) == config_digest(config_values(planned), SAFE)


def row_of(job: Job, directory: Path) -> Row:
    """How a training stands now."""
    trainer = job.training.config.trainer
    state = read_state(job.run_dir)
    outcome = read_outcome(directory, job.label)
    name, error = _state(state, outcome, is_locked(job.run_dir))
    if name in ("finished", "stopped") and not is_finished(job):
        name = "not started"  # with these keys: the folder holds a training with others
    figures = read_figures(job.run_dir) if state is not None else {}
    step = state.step if state is not None else 0
    if name in ("running", "died"):  # it writes its step down when it ends
        step = max(step, int(figures.get("step", 0)))
    steps = trainer.stop_after or trainer.steps
    return Row(job.label, job.values, job.run_dir, name, step, steps, figures, error, job.command)


def _state(state: RunState | None, outcome: Outcome | None, is_running: bool) -> tuple[str, str]:
    """The state's name, and the error that explains it."""
    if is_running:
        return "running", ""
    is_told = state is not None and (outcome is None or state.started >= outcome.started)
    if is_told:
        assert state is not None
        return state.state, state.error or (outcome.error if outcome and state.state in ("failed", "died") else "")
    if outcome is None:
        return "not started", ""
    if outcome.code in (EXIT_OK, EXIT_REQUEUE):
        return "preempted" if outcome.code else "finished", ""
    return "failed", outcome.error  # before it could write anything down


def read_figures(run_dir: Path) -> dict[str, float]:
    """The last value of each figure in metrics.jsonl; the median of `tokens_per_second`."""
    rows = read_metrics(run_dir / METRICS)
    figures = {key: value for row in rows for key, value in row.items() if value is not None}
    if speeds := [row["tokens_per_second"] for row in rows if row.get("tokens_per_second") is not None]:
        figures["tokens_per_second"] = median(speeds)
    return figures


def outcome_of(log: Path | None, started: float, code: int, run_dir: Path | str | None = None) -> Outcome:
    """How a process ended: why it failed, the logs of its ranks in `run_dir` tell, or else the last line of `log`."""
    if code in (EXIT_OK, EXIT_REQUEUE):
        return Outcome(started, code)
    state = read_state(Path(run_dir)) if run_dir else None
    has_begun = state is not None and state.started >= started
    if run_dir and has_begun and (first := find_first_error(Path(run_dir), state)):
        return Outcome(started, code, redact_text(first.headline[:500]))
    lines = [line.strip() for line in tail_lines(log, _TAIL_BYTES)[0] if line.strip()] if log else []
    said = f"ended by signal {code - 128}" if code > 128 else f"exit code {code}"
    return Outcome(started, code, redact_text(lines[-1][:500]) if lines else said)
