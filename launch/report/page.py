"""The HTML of a report: one file, no script, nothing loaded from elsewhere, light or dark as the reader has it."""

from collections.abc import Sequence
from html import escape

from .charts import Chart, chart_svg

_STYLE = """
:root { color-scheme: light dark; --paper: #fff; --ink: #2b2f36; --soft: #667; --grid: #e2e5ea; --panel: #f6f7f9; }
@media (prefers-color-scheme: dark) {
  :root { --paper: #15181d; --ink: #d9dde3; --soft: #98a0ac; --grid: #333942; --panel: #1d2127; }
}
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 68rem; padding: 2rem 1.25rem 4rem; background: var(--paper); color: var(--ink);
  font: 16px/1.5 system-ui, "Noto Sans", "Noto Sans CJK SC", sans-serif; }
h1 { margin: 0; font-size: 1.7rem; overflow-wrap: anywhere; }
h2 { margin: 0 0 .6rem; font-size: 1.05rem; }
h2 small, .soft { color: var(--soft); font-weight: normal; font-size: .85rem; }
section { margin-top: 2rem; }
dl { display: grid; grid-template-columns: repeat(auto-fit, minmax(15rem, 1fr)); gap: .9rem 1.5rem; margin: 1.5rem 0 0;
  padding: 1.1rem 1.3rem; background: var(--panel); border-radius: .6rem; }
dt { color: var(--soft); font-size: .82rem; }
dd { margin: 0; overflow-wrap: anywhere; }
.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(26rem, 100%), 1fr)); gap: 2rem 2.5rem; }
.charts .wide { grid-column: 1 / -1; overflow-x: auto; }
.wide svg { min-width: 40rem; }
.charts section { margin: 0; min-width: 0; }
svg { display: block; width: 100%; height: auto; }
svg text { font-family: inherit !important; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { padding: .4rem 1rem .4rem 0; border-bottom: 1px solid var(--grid); text-align: right; white-space: nowrap; }
th { color: var(--soft); font-weight: normal; font-size: .85rem; }
th:first-child, td:first-child { text-align: left; }
tr.best td { font-weight: bold; background: var(--panel); }
pre { margin: 0; padding: 1rem 1.2rem; background: var(--panel); border-radius: .6rem; overflow-x: auto;
  font: .88rem/1.55 ui-monospace, "DejaVu Sans Mono", "Noto Sans Mono CJK SC", monospace; }
pre.text { white-space: pre-wrap; overflow-wrap: anywhere; max-height: 34rem; overflow-y: auto; }
summary { cursor: pointer; margin-bottom: .6rem; }
"""


def render_page(
    title: str,
    subtitle: str,
    facts: Sequence[tuple[str, str]],
    evaluations: Sequence[tuple[str, ...]],
    charts: Sequence[Chart],
    samples: str | None,
    commands: Sequence[tuple[str, str]],
    config: str,
) -> str:
    """The whole page; every text is escaped here, whatever it holds."""
    cards = "".join(f"<div><dt>{escape(name)}</dt><dd>{escape(value)}</dd></div>" for name, value in facts)
    parts = [
        f"<header><h1>{escape(title)}</h1><div class='soft'>{escape(subtitle)}</div></header><dl>{cards}</dl>",
        _evaluation_table(evaluations) if evaluations else "",
        f"<section class='charts'>{''.join(render_chart(one, wide=i == 0) for i, one in enumerate(charts))}</section>",
        _section("Text it wrote", f"<pre class='text'>{escape(samples)}</pre>") if samples else "",
        _section("What next", f"<pre>{_command_lines(commands)}</pre>"),
        f"<section><details><summary>Configuration</summary><pre>{escape(config)}</pre></details></section>",
    ]
    return render_document(title, "".join(parts))


def render_document(title: str, body: str) -> str:
    """A page of the house around `body`, which is HTML."""
    return (
        "<!DOCTYPE html>\n<html lang='en'><head><meta charset='utf-8'>"
        "<meta name='viewport' content='width=device-width, initial-scale=1'>"
        # Texts that a model or a user wrote stand on this page: even a mistake in the escaping must run nothing.
        "<meta http-equiv='Content-Security-Policy' content=\"default-src 'none'; style-src 'unsafe-inline'\">"
        f"<title>{escape(title)} · MegaLite</title><style>{_STYLE}</style></head>\n"
        f"<body>{body}</body></html>\n"
    )


def _section(heading: str, content: str) -> str:
    return f"<section><h2>{escape(heading)}</h2>{content}</section>"


def render_chart(chart: Chart, wide: bool) -> str:
    """A section with one picture; a wide one has the page's full width."""
    unit = f" <small>{escape(chart.unit)}</small>" if chart.unit else ""
    svg = chart_svg(chart, 10.5, 4.0) if wide else chart_svg(chart, 5.2, 2.9)
    return f"<section{' class=wide' if wide else ''}><h2>{escape(chart.title)}{unit}</h2>{svg}</section>"


def _evaluation_table(evaluations: Sequence[tuple[str, ...]]) -> str:
    headings = ("Source", "Loss", "Perplexity", "Bits per byte", "Best bits per byte")
    head = "".join(f"<th>{heading}</th>" for heading in headings)
    body = "".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in evaluations)
    return _section("Validation", f"<div class='scroll'><table><tr>{head}</tr>{body}</table></div>")


def _command_lines(commands: Sequence[tuple[str, str]]) -> str:
    return "\n".join(f"<span class='soft'># {escape(what)}</span>\n{escape(command)}" for what, command in commands)
