"""The run on the terminal: a moving bar on a tty, one line for each logged step elsewhere."""

import logging
import sys
from typing import Protocol

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TaskProgressColumn, TextColumn
from rich.progress import Progress as RichProgress

from megalite.log import get_logger
from megalite.metrics.base import Row

_LOG = get_logger(__name__)


class Progress(Protocol):
    """Shows how far a run is. `log` takes the row that the sinks take, `advance` one finished step."""

    def advance(self) -> None:
        """One step is done; costs no host synchronisation."""

    def log(self, step: int, row: Row) -> None:
        """Show the figures of `step`."""

    def close(self) -> None:
        """Leave the terminal as it was."""


def build_progress(total_steps: int, start_step: int, num_devices: int, console: Console | None = None) -> Progress:
    """The bar where standard error is a terminal, lines through the logger elsewhere (rank 0 only).

    `start_step` steps are done already; with more than one device the lines tell tokens per second of one device too.
    """
    console = Console(stderr=True) if console is None else console
    if console.is_terminal:
        return BarProgress(total_steps, start_step, num_devices, console)
    return LineProgress(total_steps, num_devices)


class LineProgress:
    """One line for each logged step, in human units."""

    def __init__(self, total_steps: int, num_devices: int) -> None:
        """For a run of `total_steps` steps."""
        self._total, self._num_devices, self._eta = total_steps, num_devices, _Eta(total_steps)

    def advance(self) -> None:
        """Nothing to move."""

    def log(self, step: int, row: Row) -> None:
        """Print the step's line, and one for each evaluated source."""
        for line in format_lines(step, self._total, row, self._num_devices, self._eta.update(step, row)):
            _LOG.info("%s", line)

    def close(self) -> None:
        """Nothing to undo."""


class BarProgress:
    """A bar with the newest loss, tokens per second and the time left; evaluations scroll above it."""

    def __init__(self, total_steps: int, start_step: int, num_devices: int, console: Console) -> None:
        """Show the bar at `start_step` of `total_steps`."""
        self._total, self._num_devices, self._eta = total_steps, num_devices, _Eta(total_steps)
        self._bar = RichProgress(
            TextColumn("training"),
            BarColumn(bar_width=None),
            TaskProgressColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[figures]}"),
            console=console,
            refresh_per_second=4,
            expand=True,
        )
        self._task = self._bar.add_task("training", total=total_steps, completed=start_step, figures="")
        self._bar.start()
        # The logger's terminal handler holds the real stream; through rich's stand-in its lines scroll above the bar.
        self._handlers = [
            (handler, handler.setStream(sys.stderr))
            for handler in logging.getLogger("megalite").handlers
            if type(handler) is logging.StreamHandler
        ]

    def advance(self) -> None:
        """Move the bar by one step."""
        self._bar.advance(self._task)

    def log(self, step: int, row: Row) -> None:
        """Show the newest figures beside the bar, and evaluations above it."""
        eta = self._eta.update(step, row)
        _, *evaluations = format_lines(step, self._total, row, self._num_devices, eta)
        if row.get("loss") is not None:
            figures = [f"loss {row['loss']:.4f}", f"{human_count(row.get('tokens_per_second'))} tok/s"]
            figures += [f"ETA {human_time(eta)}"] if eta is not None else []
            self._bar.update(self._task, completed=step, figures="  ".join(figures))
        for line in evaluations:
            self._bar.console.print(line, highlight=False, markup=False)

    def close(self) -> None:
        """Stop the bar and give the logger its stream back."""
        for handler, stream in self._handlers:
            if stream is not None:
                handler.setStream(stream)
        self._bar.stop()


def format_lines(step: int, total_steps: int, row: Row, num_devices: int = 1, eta: float | None = None) -> list[str]:
    """The line of a step, and one line for each source it was evaluated on; `eta` in seconds."""
    head = f"step {step:>{len(str(total_steps))}}/{total_steps}"
    speed = row.get("tokens_per_second")
    per_device = f" ({human_count(speed / num_devices)}/device)" if speed is not None and num_devices > 1 else ""
    known = [
        ("loss", "loss {:.4f}"),
        ("learning_rate", "lr {:.2e}"),
        ("grad_norm", "grad norm {:.3f}"),
    ]
    parts = [head, *(form.format(row[key]) for key, form in known if row.get(key) is not None)]
    if speed is not None:
        parts.append(f"{human_count(speed)} tok/s{per_device}")
    if (used := row.get("mfu")) is not None:
        parts.append(f"MFU {100 * used:.1f}%")
    if (memory := row.get("memory_bytes")) is not None:
        parts.append(f"mem {memory / 2**30:.2f} GiB")
    if (skipped := row.get("skipped_steps")) is not None:
        parts.append(f"skipped {skipped}")
    if eta is not None:
        parts.append(f"ETA {human_time(eta)}")
    sources = dict.fromkeys(key.split("/")[1] for key in row if key.startswith("eval/"))
    return ["  ".join(parts), *(_evaluation_line(head, source, row) for source in sources)]


def human_count(value: float | None) -> str:
    """Three figures and a unit: 950, 12.3k, 4.56M."""
    if value is None:
        return "?"
    for limit, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= 0.9995 * limit:  # 999,600 is 1M, not 1000k
            return f"{value / limit:.3g}{unit}"
    return f"{value:.3g}"


def human_time(seconds: float) -> str:
    """The two largest units: 42s, 3m 05s, 2h 10m, 4d 03h."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m {whole % 60:02d}s"
    if whole < 86400:
        return f"{whole // 3600}h {whole % 3600 // 60:02d}m"
    return f"{whole // 86400}d {whole % 86400 // 3600:02d}h"


def _evaluation_line(head: str, source: str, row: Row) -> str:
    names = (("loss", "loss"), ("perplexity", "ppl"), ("bits_per_byte", "bits/byte"))
    figures = [f"{name} {value:.4g}" for key, name in names if (value := row.get(f"eval/{source}/{key}")) is not None]
    return f"{head}  eval {source}: {'  '.join(figures)}"


class _Eta:
    """The time left, from a running mean of the step time."""

    def __init__(self, total_steps: int) -> None:
        self._total = total_steps
        self._mean: float | None = None

    def update(self, step: int, row: Row) -> float | None:
        """Seconds left after `step`; None before a step time is known."""
        seconds = row.get("step_seconds")
        if seconds is not None:
            self._mean = seconds if self._mean is None else 0.7 * self._mean + 0.3 * seconds
        return None if self._mean is None else self._mean * (self._total - step)
