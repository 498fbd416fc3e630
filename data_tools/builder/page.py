"""The page of a build's report: one HTML file that needs nothing else."""

from collections.abc import Iterable, Sequence
from html import escape

from .report import BuildReport, StoreReport

_STYLE = """
:root { color-scheme: light dark; --soft: color-mix(in srgb, currentColor 60%, transparent);
  --line: color-mix(in srgb, currentColor 15%, transparent); --bar: #4c78a8; }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.5rem; margin: 0; } h2 { font-size: 1.1rem; margin: 2rem 0 .5rem; }
.soft { color: var(--soft); }
.wide { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; }
th, td { text-align: left; padding: .3rem .8rem .3rem 0; border-bottom: 1px solid var(--line); vertical-align: top; }
td.number, th.number { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
figure { margin: 1rem 0; } figcaption { color: var(--soft); }
rect { fill: var(--bar); } text { fill: currentColor; font-size: 11px; }
"""
_HEIGHT, _BAR = 150, 28


def build_page(report: BuildReport) -> str:
    """The whole page; every text is escaped here, whatever it holds."""
    total = sum(store.tokens for store in report.stores.values())
    parts = [
        f"<header><h1>{escape(report.output)}</h1><div class='soft'>{report.documents_read:,} documents from "
        f"{report.files:,} files, {total:,} tokens in {len(report.stores):,} stores</div></header>",
        _table("Stores", ("store", "documents", "tokens", "bytes", "bytes per token", "unknown"), _stores(report)),
        _table("What was left out", ("stage", "documents in", "left out", "share"), _stages(report)),
        _table("What cleaning did", ("step", "times"), _counted(report.cleaning)),
        _table("Rows that could not be read", ("reason", "rows"), _counted(report.skipped)),
        _table(
            "Some duplicates",
            ("kept", "left out", "similarity"),
            [(pair.kept, pair.dropped, f"{pair.similarity:.3f}") for pair in report.duplicates],
        ),
        _table(
            "Some that were left out",
            ("stage", "document"),
            [(stage, text) for stage, texts in report.examples.items() for text in texts],
        ),
        "<section><h2>Tokens in a document</h2>",
        *(_histogram(name, store) for name, store in report.stores.items()),
        "</section>",
    ]
    return (
        "<!DOCTYPE html>\n<html lang='en'><head><meta charset='utf-8'>"
        "<meta name='viewport' content='width=device-width, initial-scale=1'>"
        # Texts of the corpus stand on this page: even a mistake in the escaping must run nothing.
        "<meta http-equiv='Content-Security-Policy' content=\"default-src 'none'; style-src 'unsafe-inline'\">"
        f"<title>{escape(report.output)} · MegaLite</title><style>{_STYLE}</style></head>\n"
        f"<body>{''.join(parts)}</body></html>\n"
    )


def _stores(report: BuildReport) -> list[tuple[str, ...]]:
    return [
        (
            name,
            f"{store.documents:,}",
            f"{store.tokens:,}",
            f"{store.bytes:,}",
            f"{store.bytes_per_token:.2f}",
            f"{store.unknown_tokens:,}",
        )
        for name, store in report.stores.items()
    ]


def _stages(report: BuildReport) -> list[tuple[str, ...]]:
    return [
        (stage, f"{before:,}", f"{before - after:,}", f"{(before - after) / max(before, 1):.2%}")
        for stage, before, after in report.stages
    ]


def _counted(counts: dict[str, int]) -> list[tuple[str, ...]]:
    return [(name, f"{count:,}") for name, count in counts.items()]


def _table(heading: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table whose cells with figures stand to the right; nothing where there are no rows."""
    if not rows:
        return ""
    figures = [all(row[i][:1].isdigit() for row in rows) for i in range(len(columns))]
    lines = [_row("th", columns, figures), *(_row("td", row, figures) for row in rows)]
    return f"<section><h2>{escape(heading)}</h2><div class='wide'><table>{''.join(lines)}</table></div></section>"


def _row(tag: str, cells: Iterable[str], figures: Sequence[bool]) -> str:
    kinds = [" class='number'" if number else "" for number in figures]
    content = "".join(f"<{tag}{kind}>{escape(cell)}</{tag}>" for cell, kind in zip(cells, kinds, strict=True))
    return f"<tr>{content}</tr>"


def _histogram(name: str, store: StoreReport) -> str:
    """Documents by length: a bar for each power of two."""
    if not store.lengths:
        return ""
    known = [int(length) for length in store.lengths]
    lengths = [2**power for power in range(min(known).bit_length() - 1, max(known).bit_length())]
    most = max(store.lengths.values())
    bars = []
    for i, length in enumerate(lengths):
        count = store.lengths.get(str(length), 0)
        height = round(_HEIGHT * count / most, 1)
        x = i * (_BAR + 8)
        bars.append(
            f"<g><title>{count:,} of up to {length:,} tokens</title>"
            f"<rect x='{x}' y='{16 + _HEIGHT - height}' width='{_BAR}' height='{height}' rx='2'></rect>"
            f"<text x='{x + _BAR / 2}' y='{_HEIGHT + 32}' text-anchor='middle'>{_short(length)}</text></g>"
        )
    width = max(len(lengths) * (_BAR + 8), 1)
    return (
        f"<figure><figcaption>{escape(name)}: up to so many tokens, the highest bar {most:,} documents</figcaption>"
        f"<svg role='img' aria-label='{escape(name)}' viewBox='0 0 {width} {_HEIGHT + 40}' width='{width}' "
        f"style='max-width:100%'>{''.join(bars)}</svg></figure>"
    )


def _short(length: int) -> str:
    for size, unit in ((1 << 30, "G"), (1 << 20, "M"), (1 << 10, "k")):
        if length >= size:
            return f"{length // size}{unit}"
    return str(length)
