"""The results of a sweep: a table on the terminal, sweep.csv and sweep.html in its directory, and the best of them."""

import csv
import io
import math
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING

from megalite.metrics.jsonl import read_metrics

from .plan import Sweep, short_names
from .state import METRICS, Row

if TYPE_CHECKING:
    from ..report.charts import Chart

CSV_FILE = "sweep.csv"
HTML_FILE = "sweep.html"
_SHOWN_ERROR = 160  # characters on the terminal; the files have all of it


def best_of(rows: Sequence[Row], metric: str, direction: str) -> Row | None:
    """The training at its end with the best finite `metric`, the first of several equal ones; None without any."""
    return next((row for row in _ranked(rows, metric, direction) if row.is_done), None)


def _ranked(rows: Sequence[Row], metric: str, direction: str) -> list[Row]:
    """Those with a finite `metric`, the best first."""
    sign = -1 if direction == "maximize" else 1
    fit = [row for row in rows if math.isfinite(row.figures.get(metric, math.nan))]
    return sorted(fit, key=lambda row: sign * row.figures[metric])


def show(sweep: Sweep, rows: Sequence[Row], metric: str) -> None:
    """Print the table and write both files, whole or not at all."""
    best = best_of(rows, metric, sweep.settings.direction)
    columns = _columns(rows, metric)
    _print(sweep, rows, columns, best, metric)
    sweep.directory.mkdir(parents=True, exist_ok=True)
    _write(sweep.directory / CSV_FILE, _csv(sweep, rows, columns, best))
    _write(sweep.directory / HTML_FILE, _page(sweep, rows, columns, best, metric))
    print(f"{sweep.directory / CSV_FILE}\n{sweep.directory / HTML_FILE}")
    if best is not None:
        print(f"best: {best.label}, {metric} {best.figures[metric]:.6g}; the same training again:\n{best.command}")
    else:
        print(f"best: none, for no training has come to its end with a finite {metric}")
        if old := [row.label for row in rows if row.is_done and metric not in row.figures]:
            print(f"{', '.join(old)}: trained without {metric}, perhaps by a command with other keys than this one")


def _columns(rows: Sequence[Row], metric: str) -> list[str]:
    """The figures that get a column: what is compared first, then every loss, and the speed."""
    found = {key for row in rows for key in row.figures}
    losses = sorted(key for key in found if key == "loss" or (key.startswith("eval/") and key.endswith("/loss")))
    return list(dict.fromkeys([metric, *losses, *(["tokens_per_second"] if "tokens_per_second" in found else [])]))


def _print(sweep: Sweep, rows: Sequence[Row], columns: list[str], best: Row | None, metric: str) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(title=f"sweep {sweep.name}, in {sweep.directory}")
    labels = ["trial"] if sweep.settings.trials else []  # other labels say what stands in the row
    for heading in (*labels, *short_names(sweep.keys), "state"):
        table.add_column(Text(heading), overflow="fold")
    for heading in ("step", *(_heading(name) for name in columns)):
        table.add_column(Text(heading), justify="right", overflow="fold")
    for row in rows:
        figures = [_figure(row, name) for name in columns]
        style = "bold green" if row is best else "red" if row.state in ("failed", "died") else None
        state = f"{row.state}, best" if row is best else row.state
        label = [row.label.removeprefix("trial_")] if labels else []
        cells = [*label, *map(_short, row.values), state, f"{row.step:,} of {row.steps:,}", *figures]
        table.add_row(*(Text(cell) for cell in cells), style=style)
    console = Console()
    console.print(table)
    for row in rows:
        if row.error:
            print(f"{row.label}: {' '.join(row.error.split())[:_SHOWN_ERROR]} ({row.run_dir}/logs)")


def _figure(row: Row, name: str) -> str:
    """A figure for a reader; a dash where there is none."""
    value = row.figures.get(name)
    if value is None:
        return "–"
    return f"{value:,.0f}" if name == "tokens_per_second" else f"{value:.4f}" if abs(value) < 100 else f"{value:.4g}"


def _heading(column: str) -> str:
    return "tokens/s" if column == "tokens_per_second" else column


def _short(value: str) -> str:
    """A value for a reader: numbers that Optuna drew have seventeen digits."""
    try:
        return value if len(value) < 9 else f"{float(value):.4g}"
    except ValueError:
        return value


def _csv(sweep: Sweep, rows: Sequence[Row], columns: list[str], best: Row | None) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["job", *sweep.keys, "state", "step", "steps", *columns, "best", "run_dir", "error", "command"])
    for row in rows:
        figures = [repr(row.figures[name]) if name in row.figures else "" for name in columns]
        mark = "best" if row is best else ""
        state = [row.state, row.step, row.steps]
        writer.writerow([row.label, *row.values, *state, *figures, mark, row.run_dir, row.error, row.command])
    return text.getvalue()


def _curves(sweep: Sweep, rows: Sequence[Row], metric: str) -> "Chart | None":
    """How `metric`, or the loss where that was looked at once, came about in the best trainings.

    As many as colours can tell apart; None where nothing makes a curve.
    """
    from ..report.charts import COLOURS, Chart, Series, points_of

    best = _ranked(rows, metric, sweep.settings.direction)[: len(COLOURS)]
    for name in dict.fromkeys((metric, "loss")):
        curves = [points_of(read_metrics(row.run_dir / METRICS), name) for row in best]
        series = [
            Series(row.label, points, colour, not name.startswith("eval/"))
            for row, points, colour in zip(best, curves, COLOURS, strict=False)
            if len(points) > 1
        ]
        if series:
            title = name if len(series) == len(rows) else f"{name}, the best {len(series)} of {len(rows)}"
            return Chart(title, "", series, smooth=True)
    return None


def _page(sweep: Sweep, rows: Sequence[Row], columns: list[str], best: Row | None, metric: str) -> str:
    from ..report.page import render_chart, render_document

    labels = ["trial"] if sweep.settings.trials else []
    headings = [*labels, *sweep.keys, "state", "step", *map(_heading, columns), "run directory"]
    head = "".join(f"<th>{escape(name)}</th>" for name in headings)
    lines = []
    for row in rows:
        figures = [_figure(row, name) for name in columns]
        label = [row.label.removeprefix("trial_")] if labels else []
        cells = [*label, *row.values, row.state, f"{row.step:,} of {row.steps:,}", *figures, str(row.run_dir)]
        shown = "".join(f"<td>{escape(cell)}</td>" for cell in cells)
        lines.append(f"<tr class='best'>{shown}</tr>" if row is best else f"<tr>{shown}</tr>")
    parts = [
        f"<header><h1>{escape(sweep.name)}</h1><div class='soft'>{escape(_subtitle(rows))}</div></header>",
        f"<section><div class='scroll'><table><tr>{head}</tr>{''.join(lines)}</table></div></section>",
    ]
    if best is not None:
        heading = f"Best: {best.label}, {metric} {best.figures[metric]:.6g}"
        parts.append(f"<section><h2>{escape(heading)}</h2><pre class='text'>{escape(best.command)}</pre></section>")
    if chart := _curves(sweep, rows, metric):
        parts.append(render_chart(chart, wide=True))
    if errors := [f"{row.label}: {row.error}" for row in rows if row.error]:
        parts.append(f"<section><h2>Errors</h2><pre class='text'>{escape(chr(10).join(errors))}</pre></section>")
    return render_document(sweep.name, "".join(parts))


def _subtitle(rows: Sequence[Row]) -> str:
    states = [row.state for row in rows]
    counts = [f"{states.count(state)} {state}" for state in dict.fromkeys(states)]
    return f"{len(rows)} trainings: {', '.join(counts)}"


def _write(path: Path, text: str) -> None:
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)
