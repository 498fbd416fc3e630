"""`megalite report`: a run's curves, figures and samples as one HTML file that needs nothing else."""

import math
import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import yaml

from megalite.config.compose import compose_config, config_values
from megalite.config.frozen import read_config
from megalite.config.schema import ReportConfig, TrainConfig
from megalite.errors import DataError
from megalite.guard.goodput import GOODPUT, goodput_table, read_lives

from .charts import build_charts, save_png
from .page import render_page

REPORT_FILE = "report.html"
LOSS_CURVE_FILE = "loss_curve.png"
SAMPLES_FILE = "samples.txt"


def report(arguments: list[str]) -> int:
    """Write run_dir/report.html and run_dir/loss_curve.png."""
    config = compose_config("report", ReportConfig, arguments)
    page = write_report(Path(config.run_dir))
    print(f"{page}\n{page.with_name(LOSS_CURVE_FILE)}")
    return 0


def write_report(run_dir: Path) -> Path:
    """Draw what `run_dir` holds so far, of a run at work too; returns the page's path.

    Raises `ConfigError` when `run_dir` is no run directory and `DataError` when nothing was logged yet.
    """
    from megalite.metrics.jsonl import read_metrics
    from megalite.metrics.sinks import METRICS_FILE
    from megalite.redaction import redact

    config = read_config(run_dir / "config.yaml")
    rows = read_metrics(run_dir / METRICS_FILE)
    charts = build_charts(rows)
    if not charts:
        raise DataError(f"{run_dir / METRICS_FILE} holds no figures yet: train first, or lower trainer.log_every")
    samples = run_dir / SAMPLES_FILE
    page = run_dir / REPORT_FILE
    content = render_page(
        title=config.run_name,
        subtitle=_subtitle(config, rows),
        facts=_facts(config, rows, run_dir),
        evaluations=_evaluations(rows),
        charts=charts,
        samples=samples.read_text(encoding="utf-8", errors="replace") if samples.exists() else None,
        commands=_commands(run_dir),
        config=yaml.safe_dump(redact(config_values(config)), sort_keys=False, allow_unicode=True),
    )
    temporary = page.with_name(page.name + ".tmp")
    temporary.write_text(content, encoding="utf-8")
    temporary.replace(page)
    save_png(charts[0], run_dir / LOSS_CURVE_FILE)
    return page


def _subtitle(config: TrainConfig, rows: Sequence[Mapping[str, Any]]) -> str:
    done, steps = rows[-1]["step"], config.trainer.steps
    state = "finished" if done >= steps else f"{100 * done / steps:.0f}% done"
    return f"{done:,} of {steps:,} steps, {state}"


def _facts(config: TrainConfig, rows: Sequence[Mapping[str, Any]], run_dir: Path) -> list[tuple[str, str]]:
    """The run card: what was trained, on how much, how it went."""
    from megalite.metrics.progress import human_count, human_time
    from megalite.models.counts import count_parameters

    model = config.model
    facts = [
        ("Parameters", f"{human_count(count_parameters(model))}"),
        (
            "Model",
            f"{model.num_layers} layers × {model.hidden_size}, {model.num_attention_heads} heads, "
            f"vocabulary {model.known_vocab_size:,}",
        ),
        ("Batch", f"{config.trainer.global_batch_size:,} sequences × {config.data.sequence_length:,} tokens"),
        ("Optimizer", f"{config.optimizer.name}, lr {config.optimizer.lr:g}, {config.schedule.name}"),
        ("Layout", ", ".join(_layout(config))),
    ]
    training = [row for row in rows if row.get("loss") is not None]
    if training:
        last, best = training[-1], min(training, key=_loss_or_infinity)
        speeds = [row["tokens_per_second"] for row in training if row.get("tokens_per_second") is not None]
        facts += [
            ("Training loss", f"{last['loss']:.4f}, best {best['loss']:.4f} at step {best['step']:,}"),
            ("Tokens seen", human_count(last.get("tokens_seen"))),
            ("Time in steps", human_time(_seconds(training))),
            ("Throughput", f"{human_count(median(speeds) if speeds else None)} tokens/s (median)"),
            ("Skipped steps", f"{last.get('skipped_steps') or 0:,}"),
        ]
    if lives := read_lives(run_dir / GOODPUT):
        table = goodput_table(lives)
        total = sum(table.values()) or 1.0
        shares = [f"{name} {seconds / total:.1%}" for name, seconds in table.items() if seconds / total >= 0.001]
        starts = f" in {len(lives)} starts" if len(lives) > 1 else ""
        facts.append(("Where the time went", f"{human_time(total)}{starts}: {', '.join(shares)}"))
    return [*facts, ("Run directory", str(run_dir))]


def _layout(config: TrainConfig) -> Iterator[str]:
    parallel, engine = config.parallel, config.engine
    yield f"tensor {parallel.tensor}" + (" and sequence" if parallel.tensor > 1 and parallel.sequence else "")
    if parallel.context > 1:
        yield f"context {parallel.context} ({parallel.context_method})"
    yield f"ZeRO {engine.zero_stage}"
    yield engine.precision
    if engine.recompute != "none":
        yield f"recompute {engine.recompute}"
    if engine.compile:
        yield "compiled"


def _loss_or_infinity(row: Mapping[str, Any]) -> float:
    return row["loss"] if math.isfinite(row["loss"]) else math.inf


def _seconds(rows: Sequence[Mapping[str, Any]]) -> float:
    """The time of all steps: each row tells the mean step time since the row before it."""
    befores = [0, *(row["step"] for row in rows[:-1])]
    return sum(
        (row["step"] - before) * (row.get("step_seconds") or 0.0) for row, before in zip(rows, befores, strict=True)
    )


def _evaluations(rows: Sequence[Mapping[str, Any]]) -> list[tuple[str, ...]]:
    """For each source: name, and loss, perplexity and bits per byte of its last evaluation, and the best."""
    latest: dict[str, Mapping[str, Any]] = {}
    best: dict[str, tuple[float, int]] = {}
    for row in rows:
        for source in (found[1] for key in row if (found := re.fullmatch(r"eval/(.+)/bits_per_byte", key))):
            latest[source] = row
            best[source] = min(best.get(source, (float("inf"), 0)), (row[f"eval/{source}/bits_per_byte"], row["step"]))
    return [
        (
            source,
            *(_figure(row.get(f"eval/{source}/{name}")) for name in ("loss", "perplexity", "bits_per_byte")),
            f"{best[source][0]:.4f} at step {best[source][1]:,}",
        )
        for source, row in latest.items()
    ]


def _figure(value: float | None) -> str:
    return "–" if value is None else f"{value:.4f}" if value < 100 else f"{value:.4g}"


def _commands(run_dir: Path) -> list[tuple[str, str]]:
    path = shlex.quote(str(run_dir))
    return [
        ("Let it write", f'megalite generate run_dir={path} prompt="Once"'),
        ("Evaluate it", f"megalite eval run_dir={path}"),
        ("Draw this page again", f"megalite report run_dir={path}"),
    ]
