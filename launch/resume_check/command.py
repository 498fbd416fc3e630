"""`megalite resume-check`: does an interruption change the numbers of my run?

The user's own training runs for a few steps without an interruption, then stopped and resumed, then killed and resumed;
every figure of every step and every tensor of the last checkpoint must have the same bits.
"""

import dataclasses
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from megalite.config.compose import compose_config, compose_train
from megalite.config.place import place_from_environment
from megalite.config.schema import LoggingConfig, ResumeCheckConfig, ResumeCheckKeys, TrainConfig
from megalite.config.validate_commands import validate_resume_check
from megalite.errors import EXIT_OK, ConfigError, ResourceError
from megalite.log import get_logger, setup_logging
from megalite.metrics.jsonl import read_metrics

from ..prepare import import_for_ranks, prepare
from .compare import METRICS, Comparison, compare_rows, compare_runs, describe_tensors
from .runs import ResumeCheckError, train, train_and_kill

log = get_logger(__name__)

# fp32 weights and two moments. The checkpoint of the first run and two of an interrupted one stand side by side.
_BYTES_A_PARAMETER, _CHECKPOINTS = 12, 3

NOT_REPRODUCIBLE = """\
The run does not repeat its own numbers without an interruption either, so resuming is not to blame. Usual causes: GPU
kernels that add in an order of their own (backward of embeddings and of some attention kernels; cuBLAS, unless
CUBLAS_WORKSPACE_CONFIG=:4096:8), and collectives that choose another algorithm (NCCL_ALGO fixes it)."""
NOT_RESTORED = """\
Two uninterrupted runs are equal, so something that the run carries from step to step is not saved, or not restored
exactly: moments or step count of the optimizer, the loss scale, a random stream or a position in the data that does not
follow from the step, a state that engine.ds_overrides adds to the engine."""
NOT_UNTOUCHED = "Two uninterrupted runs are equal, so saving in the middle of a run changes what comes after it."
EITHER = """\
Train once more without an interruption and compare with the first: where those differ too, the run does not repeat its
own numbers (GPU kernels that add in an order of their own) and resuming is not to blame."""


@dataclasses.dataclass(frozen=True)
class Part:
    """One line of the table: a run, how it compares with the first one, and what a difference would mean."""

    name: str
    run_dir: Path
    seconds: float
    comparison: Comparison | None = None  # None: the first one itself
    meaning: str = NOT_RESTORED

    @property
    def differs(self) -> bool:
        """Whether there is anything to explain."""
        return self.comparison is not None and bool(self.comparison.difference)


def resume_check(arguments: list[str]) -> int:
    """Print a line for each run; returns 0 when all have the same bits, else raises `ResumeCheckError`."""
    setup_logging()
    own = [argument for argument in arguments if argument.startswith(("resume_check.", "resume_check="))]
    overrides = [argument for argument in arguments if argument not in own]
    options = compose_config("resume_check", ResumeCheckKeys, own).resume_check
    validate_resume_check(options)
    if options.compare:
        _compare_finished(options, overrides)
        return EXIT_OK
    if place_from_environment().init_method:
        raise ConfigError(
            "resume-check starts its own ranks, on this machine; to check a training under torchrun, deepspeed or "
            "another launcher, see resume_check.compare in megalite resume-check --help"
        )
    with _workspace(options.directory) as folder:
        config, world_size = prepare_check(overrides, options.steps, folder)
        _warn_of_a_small_disk(config, folder)
        log.info("%s", _what_runs(config, world_size, options.steps))
        check(config, world_size, options, folder)
    return EXIT_OK


def prepare_check(overrides: Sequence[str], steps: int, folder: Path) -> tuple[TrainConfig, int]:
    """The user's configuration, checked as `megalite train` does, as a run below `folder`; and the world size."""
    config = compose_train(overrides)
    if config.launch.name != "local":
        raise ConfigError(
            f"launch: found {config.launch.name}, but resume-check starts its own ranks, on this machine; train twice "
            "with that launcher instead, and see resume_check.compare in megalite resume-check --help"
        )
    training = prepare(config, lambda config: _short(config, steps, folder))
    import_for_ranks(training)  # before ranks fork from this process, many times
    # Only now: preflight looks at these stores for the size of the vocabulary.
    data = dataclasses.replace(training.config.data, validation=())
    return dataclasses.replace(training.config, data=data), training.world_size


def _short(config: TrainConfig, steps: int, folder: Path) -> TrainConfig:
    if 2 * steps > config.trainer.steps:
        raise ConfigError(
            f"resume_check.steps: found {steps}, but twice as many must fit in trainer.steps={config.trainer.steps}"
        )
    if config.checkpoint.resume not in ("auto", "never"):
        log.warning("checkpoint.resume=%s has no effect here: runs start from new weights", config.checkpoint.resume)
    return variant(config, folder / "straight", 2 * steps)


def variant(config: TrainConfig, run_dir: Path, stop_after: int, save_every: int = 0) -> TrainConfig:
    """`config` as another run: stopped early, a row for every step, saved only where told."""
    checkpoint = dataclasses.replace(
        config.checkpoint, save_every=save_every, ephemeral_every=0, keep_every=0, keep_best=False, resume="auto",
        on_save_error="stop",
    )  # fmt: skip
    trainer = dataclasses.replace(config.trainer, stop_after=stop_after, log_every=1, eval_every=0)
    return dataclasses.replace(
        config, run_dir=str(run_dir), trainer=trainer, checkpoint=checkpoint, logging=LoggingConfig()
    )


def check(config: TrainConfig, world_size: int, options: ResumeCheckConfig, folder: Path) -> None:
    """Run `config` below `folder` without and with interruptions and print the table.

    `config` is as `prepare_check` gives it. Raises `ResumeCheckError` when a run differs or fails.
    """
    parts = []
    for part in _parts(config, world_size, options, folder):
        parts.append(part)
        if part.differs:
            break
    _print(parts, f"{options.steps} + {options.steps} steps")
    if not part.differs:
        return
    assert part.comparison is not None
    meaning, step = part.meaning, part.comparison.step
    if step is not None and step <= options.steps:
        meaning = NOT_REPRODUCIBLE  # no interruption came before that
    else:
        log.info("once more without interruption, to see whether the run repeats its own numbers")
        again = variant(config, folder / "again", 2 * options.steps)
        train(again, world_size)
        if compare_runs(parts[0].run_dir, Path(again.run_dir)).difference:
            meaning = NOT_REPRODUCIBLE
    raise _error(part, parts[0].run_dir, meaning)


def _parts(config: TrainConfig, world_size: int, options: ResumeCheckConfig, folder: Path) -> Iterator[Part]:
    """Every run, when it is done."""
    steps = options.steps
    started = time.perf_counter()
    straight = Path(config.run_dir)
    train(config, world_size)
    yield Part("not interrupted", straight, time.perf_counter() - started)
    rows = read_metrics(straight / METRICS)
    if rows and rows[-1]["skipped_steps"] == 2 * steps:
        log.warning(
            "all %d steps were skipped (inf or nan in the gradients; fp16 begins so), so no weight has changed: raise "
            "resume_check.steps",
            2 * steps,
        )

    started = time.perf_counter()
    for stop_after in (steps, 2 * steps):
        stopped = variant(config, folder / "stopped", stop_after)
        train(stopped, world_size)
    comparison = compare_runs(straight, folder / "stopped")
    yield Part(f"stopped at {steps}, resumed", folder / "stopped", time.perf_counter() - started, comparison)
    shutil.rmtree(folder / "stopped")  # equal to the first: room for what follows

    if not options.kill:
        return
    started = time.perf_counter()
    killed = variant(config, folder / "killed", 2 * steps, save_every=steps)
    last = train_and_kill(killed, world_size, steps)
    comparison = compare_rows(rows, read_metrics(folder / "killed" / METRICS), whole=False)
    if comparison.difference:
        seconds = time.perf_counter() - started
        yield Part(f"saved at {steps}, went on", folder / "killed", seconds, comparison, NOT_UNTOUCHED)
    train(killed, world_size)
    comparison = compare_runs(straight, folder / "killed")
    where = f"in step {last + 1}" if last < 2 * steps else f"while saving step {last}"
    yield Part(f"killed {where}, resumed at {steps}", folder / "killed", time.perf_counter() - started, comparison)


def _compare_finished(options: ResumeCheckConfig, overrides: Sequence[str]) -> None:
    """Compare two runs that the user made."""
    if overrides:
        raise ConfigError(f"resume_check.compare trains nothing: leave out {' '.join(overrides)}")
    first, second = map(Path, options.compare)
    for run_dir in (first, second):
        if not (run_dir / METRICS).is_file():
            raise ConfigError(f"resume_check.compare: {run_dir} holds no {METRICS}: is it a training's run directory?")
    if first.resolve() == second.resolve():
        raise ConfigError(f"resume_check.compare: {first} twice: name a run that was interrupted and one that was not")
    started = time.perf_counter()
    comparison = compare_runs(first, second)
    parts = [Part(str(first), first, 0.0), Part(str(second), second, time.perf_counter() - started, comparison, EITHER)]
    _print(parts, "two runs")
    if comparison.difference:
        raise _error(parts[1], first, EITHER)


def _error(part: Part, reference: Path, meaning: str) -> ResumeCheckError:
    assert part.comparison is not None
    found = [part.comparison.difference]
    found += [line for line in describe_tensors(reference, part.run_dir) if line not in found]
    return ResumeCheckError(f"{part.name}: other numbers than {reference}\n  " + "\n  ".join(found) + f"\n{meaning}")


@contextmanager
def _workspace(directory: str | None) -> Iterator[Path]:
    """A temporary folder, removed in the end unless a `ResumeCheckError` is to be looked into."""
    if directory is not None and not Path(directory).is_dir():
        raise ConfigError(f"resume_check.directory: there is no folder {directory}")
    try:
        folder = Path(tempfile.mkdtemp(prefix="megalite-resume-check-", dir=directory))
    except OSError as error:
        raise ResourceError(f"resume_check.directory: no folder can be made there: {error}") from None
    # As an interrupt does: through the blocks that end ranks and remove folders.
    previous = signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    kept = False
    try:
        yield folder
    except ResumeCheckError as error:
        kept = True
        raise ResumeCheckError(f"{error}\nKept to be looked into: {folder}", error.exit_code) from None
    finally:
        signal.signal(signal.SIGTERM, previous)
        if not kept:
            shutil.rmtree(folder, ignore_errors=True)


def _warn_of_a_small_disk(config: TrainConfig, folder: Path) -> None:
    from megalite.models import count_parameters

    needed = _CHECKPOINTS * _BYTES_A_PARAMETER * count_parameters(config.model)
    free = shutil.disk_usage(folder).free
    if free < needed:
        log.warning(
            "%s: %.1f GB are free, but the checkpoints take %.1f GB; name another place with resume_check.directory",
            folder,
            free / 1e9,
            needed / 1e9,
        )


def _what_runs(config: TrainConfig, world_size: int, steps: int) -> str:
    parallel, trainer = config.parallel, config.trainer
    data = world_size // (parallel.tensor * parallel.context)
    return (
        f"{steps} + {steps} steps of {trainer.global_batch_size} sequences of {config.data.sequence_length} tokens, "
        f"tensor {parallel.tensor} x context {parallel.context} x data {data}, ZeRO {config.engine.zero_stage}, "
        f"{config.engine.precision}, dropout {config.model.dropout}, in {Path(config.run_dir).parent}; without "
        "evaluation and other logs"
    )


def _print(parts: Sequence[Part], title: str) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table("run", title=title, caption="bit for bit: loss, gradient norm and the like; weights and moments")
    for heading in ("steps", "tensors", "MB", "seconds"):
        table.add_column(heading, justify="right")
    table.add_column("")
    for part in parts:
        found = part.comparison or Comparison()
        counts = [f"{found.num_steps:,}", f"{found.num_tensors:,}", f"{found.num_bytes / 1e6:,.1f}"]
        mark = Text("DIFFERS", "bold red") if part.differs else Text("same", "green")
        shown = [count if part.comparison and count.strip("0.") else "–" for count in counts]
        table.add_row(part.name, *shown, f"{part.seconds:.1f}", mark if part.comparison else "")
    Console().print(table)
