"""`megalite logs`: what all ranks of a run wrote, by time, and first of all what went wrong first."""

import time
from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path

from rich.console import Console
from rich.text import Text

from megalite.config.compose import compose_config
from megalite.config.schema_monitor import LogsConfig
from megalite.config.validate_commands import validate_logs
from megalite.errors import EXIT_OK, ConfigError
from megalite.guard.run_state import RunState

from .first_error import FirstError, errors_of, find_first_error
from .log_entries import ERRORS, Entry, OtherLog, merge, other_logs, rank_logs, read_rank, read_stalls
from .run_status import RunStatus, Survey, ask_slurm, look_at, read_record

_COLOURS = {"WARNING": "yellow", "ERROR": "bold red", "CRITICAL": "bold red"}
_MOST_LINES = 40  # of one message
_OTHER_LOGS = 2  # the newest


def logs(arguments: list[str]) -> int:
    """Print the first error of the run's last life, then the end of all logs."""
    config = compose_config("logs", LogsConfig, arguments)
    validate_logs(config)
    run_dir = Path(config.run_dir)
    if not run_dir.is_dir():
        raise ConfigError(f"run_dir: {run_dir} is no directory; name that of a run, such as outputs/quickstart")
    chosen = _chosen(config, run_dir)
    console = Console(soft_wrap=True, highlight=False, markup=False)
    record = read_record(run_dir)
    (status,) = ask_slurm(Survey([look_at(run_dir, str(run_dir))], [])).runs
    console.print(_headline(status, record))
    first = find_first_error(run_dir, record, config.ranks)
    for line in _first_lines(first) if first else ["no error since its last start"]:
        console.print(line)
    ranks = (read_rank(rank, path) for rank, path in chosen.items())
    stalls = [] if config.ranks else [read_stalls(run_dir / "logs")]
    levels = ERRORS if config.errors else None
    entries = merge((part for parts in (ranks, stalls) for part in parts), config.lines, levels)
    what = "errors" if config.errors else "lines"
    console.print(
        f"\nthe newest {what} of {len(chosen)} rank{'s' if len(chosen) > 1 else ''}, in {run_dir / 'logs'}:"
        if entries
        else "\nnothing in the logs of ranks"
    )
    for line in _lines(entries, set(chosen)):
        console.print(line)
    for log in [] if config.ranks else other_logs(run_dir)[:_OTHER_LOGS]:
        _print_other(console, log, config)
    return EXIT_OK


def _chosen(config: LogsConfig, run_dir: Path) -> dict[int, Path]:
    found = rank_logs(run_dir / "logs")
    if missing := sorted(set(config.ranks) - set(found)):
        raise ConfigError(f"ranks: found {missing}, but {run_dir / 'logs'} holds logs of ranks {_ranges(found) or '-'}")
    return {rank: path for rank, path in found.items() if not config.ranks or rank in config.ranks}


def _headline(run: RunStatus, record: RunState | None) -> str:
    step = "" if run.step is None else f", step {run.step:,}" + (f" of {run.steps:,}" if run.steps else "")
    since = f", last start {_date(record.started)} {_clock(record.started)[:8]}" if record else ""
    return f"{run.run}: {run.state}{step}{since}" + (f", job {run.job} {run.job_state}" if run.job else "").rstrip()


def _first_lines(first: FirstError) -> Iterator[Text]:
    host = f" on {first.host}" if first.host else ""
    when = f", {_date(first.time)} {_clock(first.time)}" if first.time is not None else ""
    yield Text(f"first error: {first.who}{host}{when}", _COLOURS["ERROR"])
    if first.entry is None:
        yield Text(f"  {first.text}")
    for entry in first.context:
        for line in _lines([entry], set(), with_date=False):
            yield Text("> " if entry is first.entry else "  ").append(line)
    for note in first.notes:
        yield Text(f"  {note}")


def _lines(entries: Sequence[Entry], everyone: set[int], with_date: bool = True) -> Iterator[Text]:
    """The entries as lines, under the date where it changes."""
    labels = [_label(entry, everyone) for entry in entries]
    width = max(map(len, labels), default=0)
    dates = ["", *(_date(entry.time) for entry in entries)]
    for (before, date), entry, label in zip(pairwise(dates), entries, labels, strict=True):
        if with_date and date != before:
            yield Text(date, "dim")
        colour = _COLOURS.get(entry.level, "")
        level = "" if entry.level == "INFO" else f"{entry.level} "
        head = f"{_clock(entry.time)} {label:<{width}} "
        yield Text(head, "dim").append(level + entry.lines[0], colour)
        for line in entry.lines[1:_MOST_LINES]:
            yield Text(" " * len(head)).append(line, colour)
        if len(entry.lines) > _MOST_LINES:
            yield Text(f"{' ' * len(head)}... {len(entry.lines) - _MOST_LINES} more lines", "dim")


def _print_other(console: Console, log: OtherLog, config: LogsConfig) -> None:
    lines = errors_of(log) if config.errors else log.lines[-config.lines :]
    if lines:
        console.print(f"\n{log.name}, written to until {_date(log.modified)} {_clock(log.modified)[:8]}:")
    for line in lines:
        console.print(Text(line))


def _label(entry: Entry, everyone: set[int]) -> str:
    if not entry.ranks:
        return "watchdog"
    if len(entry.ranks) > 1 and set(entry.ranks) == everyone:
        return "all ranks"
    return f"rank {_ranges(entry.ranks)}"


def _ranges(ranks: Sequence[int] | dict[int, Path]) -> str:
    """`0-3,7`."""
    parts: list[list[int]] = []
    for rank in ranks:
        if parts and rank == parts[-1][-1] + 1:
            parts[-1][1:] = [rank]
        else:
            parts.append([rank])
    return ",".join("-".join(map(str, part)) for part in parts)


def _date(seconds: float) -> str:
    return time.strftime("%Y-%m-%d", time.localtime(seconds))


def _clock(seconds: float) -> str:
    return time.strftime("%H:%M:%S", time.localtime(seconds)) + f".{int(seconds * 1000) % 1000:03d}"
