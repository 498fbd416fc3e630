"""`megalite jobs`: how the runs below a folder stand."""

import json
import math
import sys
import time
from dataclasses import asdict
from pathlib import Path

from rich.console import Console
from rich.live import Live
from rich.text import Text

from megalite.config.compose import compose_config
from megalite.config.schema_monitor import JobsConfig
from megalite.config.validate_commands import validate_jobs
from megalite.errors import EXIT_OK, ConfigError
from megalite.metrics.progress import human_count, human_time

from .log_entries import clean
from .run_status import RunStatus, Survey, ask_slurm, survey

_COLOURS = {
    "running": "green",
    "running?": "yellow",
    "finished": "cyan",
    "preempted": "yellow",
    "pending": "yellow",
    "starting": "green",
    "failed": "bold red",
    "died": "bold red",
    "unreadable": "red",
}
_FIGURES = range(2, 7)  # columns that stand to the right
_GAP = "  "
_LEAST = 16  # characters for the name of a run, and for its error as far as there is room
_PIPE_COLUMNS = 10_000  # nothing is cut


def jobs(arguments: list[str]) -> int:
    """Print a line for each run, or with `watch` keep a table of them on the terminal until Ctrl-C."""
    config = compose_config("jobs", JobsConfig, arguments)
    validate_jobs(config)
    folder = Path(config.folder)
    if not folder.is_dir():
        raise ConfigError(f"folder: {folder} is no directory; name one that holds runs, such as outputs")
    if config.format == "json":
        print(to_json(folder, look(folder)))
        return EXIT_OK
    console = Console(width=None if sys.stdout.isatty() else _PIPE_COLUMNS, highlight=False)

    def draw() -> Text:
        return to_table(folder, look(folder), console.width)

    if not config.watch:
        console.print(draw())
        return EXIT_OK
    try:
        with Live(draw(), console=console, auto_refresh=False, screen=console.is_terminal) as live:
            while True:
                time.sleep(config.watch)
                live.update(draw(), refresh=True)
    except KeyboardInterrupt:
        console.print(draw())  # Ctrl-C is the way to end it; what was seen last stays
        return EXIT_OK


def look(folder: Path) -> Survey:
    """All runs below `folder`, with Slurm's word where there is Slurm."""
    return ask_slurm(survey(folder))


def to_json(folder: Path, found: Survey) -> str:
    """One JSON document; what is not known is null, what is no finite number a text."""
    runs = [{key: _plain(value) for key, value in asdict(run).items()} for run in found.runs]
    return json.dumps({"folder": str(folder), "time": time.time(), "runs": runs, "notes": found.notes}, indent=1)


def to_table(folder: Path, found: Survey, width: int) -> Text:
    """A line for each run and one about all of them, none longer than `width` where that has room for the figures."""
    has_jobs = any(run.job for run in found.runs)
    headings = [
        "run",
        "state",
        "step",
        "loss",
        "tok/s",
        "ETA",
        "last row",
        *(["Slurm"] if has_jobs else []),
        "first error",
    ]
    rows = [[Text(heading, "bold") for heading in headings], *(_cells(run, has_jobs) for run in found.runs)]
    widths = [max(cell.cell_len for cell in column) for column in zip(*rows, strict=True)]
    free = width - sum(widths[1:-1]) - len(_GAP) * (len(widths) - 1)
    widths[0] = min(widths[0], max(_LEAST, free - _LEAST))
    widths[-1] = max(free - widths[0], 1)
    lines = []
    for row in rows if found.runs else []:
        for number, (cell, size) in enumerate(zip(row, widths, strict=True)):
            cell.truncate(size, overflow="ellipsis")
            if number < len(row) - 1:
                cell.align("right" if number in _FIGURES else "left", size)
        lines.append(Text(_GAP).join(row))
        lines[-1].rstrip()
    return Text("\n").join([*lines, Text(_summary(folder, found), "dim")])


def _cells(run: RunStatus, has_jobs: bool) -> list[Text]:
    step = "" if run.step is None else f"{run.step:,}"
    cells = [
        Text(clean(run.run)),
        Text(run.state, _COLOURS.get(run.state, "")),
        Text(f"{step or '0'}/{run.steps:,}" if run.steps else step),
        Text("" if run.loss is None else f"{run.loss:.4f}"),
        Text("" if run.tokens_per_second is None else human_count(run.tokens_per_second)),
        Text("" if run.eta_seconds is None else human_time(run.eta_seconds)),
        Text("" if run.row_age_seconds is None else human_time(run.row_age_seconds)),
    ]
    if has_jobs:
        cells.append(Text(f"{run.job} {run.job_state}".strip()))
    return [*cells, Text(run.error)]


def _summary(folder: Path, found: Survey) -> str:
    if not found.runs:
        return "; ".join([f"no runs in {folder}", *found.notes])
    counts: dict[str, int] = {}
    for run in found.runs:
        counts[run.state] = counts.get(run.state, 0) + 1
    parts = [f"{len(found.runs)} run{'s' if len(found.runs) > 1 else ''} in {folder}"]
    parts.append(", ".join(f"{count} {state}" for state, count in counts.items()))
    broken = next((run for run in found.runs if run.error), None)
    advice = [f"the whole story: megalite logs run_dir={broken.run_dir}"] if broken else []
    return "; ".join([": ".join(parts), *found.notes, *advice])


def _plain(value: object) -> object:
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
