"""The curves of a run, drawn by matplotlib: as SVG that takes the page's colours, and as one PNG."""

import io
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from pathlib import Path
from typing import Any

# Distinct for colour-blind readers (after Okabe and Ito 2008), and readable on white and on near-black.
COLOURS = ("#2f7fd6", "#e0712c", "#159a73", "#b565c8", "#c9971c", "#d14f6a")
# Drawn with these, then replaced in the SVG by the page's own colours, which follow the reader's theme.
_INK, _GRID = "#010203", "#040506"
_SMOOTH_FROM = 60  # points from which on a running mean is drawn over a faint raw curve


@dataclass(frozen=True)
class Series:
    """One curve: `points` are (step, value) with finite values, steps rising."""

    label: str
    points: list[tuple[int, float]]
    colour: str
    is_training: bool = True  # evaluations are few: each point gets a mark


@dataclass(frozen=True)
class Chart:
    """One picture; `unit` stands beside the title, the last three tell of the vertical axis and the curves."""

    title: str
    unit: str
    series: list[Series]
    logarithmic: bool = False
    from_zero: bool = False
    smooth: bool = False  # long training curves get a running mean


def build_charts(rows: Sequence[Mapping[str, Any]]) -> list[Chart]:
    """The charts for which the rows of metrics.jsonl have figures; the loss first."""
    sources = list(dict.fromkeys(key.split("/")[1] for row in rows for key in row if key.startswith("eval/")))
    colours = dict(zip(sources, (COLOURS[1 + i % (len(COLOURS) - 1)] for i in range(len(sources))), strict=True))

    def training(key: str, factor: float = 1.0) -> list[Series]:
        return [Series("training", points_of(rows, key, factor), COLOURS[0])]

    def evaluation(key: str) -> list[Series]:
        return [Series(name, points_of(rows, f"eval/{name}/{key}"), colours[name], False) for name in sources]

    norms = [value for _, value in points_of(rows, "grad_norm") if value > 0]
    spread = bool(norms) and max(norms) > 30 * min(norms)
    charts = [
        Chart("Loss", "nats per token", training("loss") + evaluation("loss"), smooth=True),
        Chart("Bits per byte", "validation, by source", evaluation("bits_per_byte")),
        Chart("Gradient norm", "before clipping", training("grad_norm"), logarithmic=spread, smooth=True),
        Chart("Learning rate", "", training("learning_rate"), from_zero=True),
        Chart("Throughput", "tokens per second", training("tokens_per_second"), from_zero=True, smooth=True),
        Chart("Model FLOPs utilisation", "% of the devices' bf16 peak", training("mfu", 100), from_zero=True),
        Chart("Memory", "GiB at most, one device", training("memory_bytes", 2.0**-30), from_zero=True),
    ]
    filled = [replace(chart, series=[series for series in chart.series if series.points]) for chart in charts]
    return [chart for chart in filled if chart.series]


def chart_svg(chart: Chart, width: float, height: float) -> str:
    """The chart as an inline `<svg>` of `width` x `height` inches, its colours taken from the page's CSS."""
    import matplotlib

    # The salt makes the ids inside the SVG the same at every drawing, and different from those of other charts.
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": chart.title, "font.family": "sans-serif"}):
        figure = _draw(chart, width, height, _INK, _GRID)
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    svg = buffer.getvalue()
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg[svg.index("<svg") :], flags=re.DOTALL)
    svg = re.sub(r'<g id="[^"]*"', "<g", svg)  # nothing refers to them, and they occur in every chart
    svg = re.sub(
        r'<svg [^>]*?(viewBox="[^"]*")[^>]*>', rf'<svg \1 role="img" aria-label="{chart.title}">', svg, count=1
    )
    return svg.replace(_INK, "var(--ink)").replace(_GRID, "var(--grid)")


def save_png(chart: Chart, path: Path) -> None:
    """The chart as a picture of 1600 x 900 pixels on white."""
    import matplotlib

    with matplotlib.rc_context({"font.family": "sans-serif"}):
        figure = _draw(chart, 8, 4.5, "#333333", "#e3e3e3")
        title = f"{chart.title} ({chart.unit})" if chart.unit else chart.title
        figure.suptitle(title, x=0.02, ha="left", fontsize=12, fontweight="bold", color="#333333")
        figure.savefig(path, format="png", dpi=200, facecolor="white")


def _draw(chart: Chart, width: float, height: float, ink: str, grid: str) -> Any:
    from matplotlib.figure import Figure
    from matplotlib.ticker import EngFormatter, MaxNLocator

    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.add_subplot()
    for series in chart.series:
        _draw_series(axes, series, chart.smooth)
    if chart.logarithmic:
        axes.set_yscale("log")
    elif max(abs(value) for series in chart.series for _, value in series.points) >= 1000:
        axes.yaxis.set_major_formatter(EngFormatter(sep=""))
    axes.xaxis.set_major_locator(MaxNLocator(nbins=8 if width > 6 else 5, integer=True, steps=[1, 2, 5, 10]))
    axes.set_xlabel("step", color=ink, fontsize=9)
    axes.grid(axis="y", color=grid, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(which="both", colors=ink, labelsize=9, length=0)
    for side in ("top", "left", "right"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color(grid)
    axes.margins(y=0.08)
    axes.set_xlim(0, 1.02 * max(step for series in chart.series for step, _ in series.points))
    axes.yaxis.get_offset_text().set_color(ink)
    if chart.from_zero:
        axes.set_ylim(bottom=0)
    if len(chart.series) > 1 or not chart.series[0].is_training:
        # Above the curves, where it can cover none of them.
        columns = 4 if max(len(series.label) for series in chart.series) < 24 else 2
        axes.legend(
            loc="lower left", bbox_to_anchor=(0, 1), ncols=columns, frameon=False, fontsize=9, labelcolor=ink,
            borderpad=0,
        )  # fmt: skip
    return figure


def _draw_series(axes: Any, series: Series, smooth: bool) -> None:
    steps, values = zip(*series.points, strict=True)
    label = series.label.replace("$", r"\$")  # no formula
    if smooth and series.is_training and len(steps) >= _SMOOTH_FROM:
        axes.plot(steps, values, color=series.colour, linewidth=0.8, alpha=0.35)
        axes.plot(steps, _smoothed(values), color=series.colour, linewidth=1.8, label=f"{label} (smoothed)")
        return
    marks = "o" if not series.is_training or len(steps) == 1 else ""
    axes.plot(steps, values, color=series.colour, linewidth=1.8, marker=marks, markersize=4, label=label)


def _smoothed(values: Sequence[float]) -> list[float]:
    """A mean over a centred window of a thirtieth of the curve, narrower near the ends: it does not lag behind."""
    half = len(values) // 60
    sums = list(accumulate(values, initial=0.0))
    smooth = []
    for i in range(len(values)):
        reach = min(half, i, len(values) - 1 - i)
        smooth.append((sums[i + reach + 1] - sums[i - reach]) / (2 * reach + 1))
    return smooth


def points_of(rows: Sequence[Mapping[str, Any]], key: str, factor: float = 1.0) -> list[tuple[int, float]]:
    """The curve of a figure: (step, value) where it is finite, times `factor`."""
    values = ((row["step"], row.get(key)) for row in rows)
    return [(step, value * factor) for step, value in values if value is not None and math.isfinite(value)]
