"""Where the figures of a run go: metrics.jsonl always, TensorBoard and Weights & Biases as configured."""

from pathlib import Path
from typing import Any

from megalite.config.schema import LoggingConfig
from megalite.metrics.base import GuardedSink, Sink
from megalite.metrics.jsonl import JsonlSink, read_metrics

METRICS_FILE = "metrics.jsonl"


def build_sinks(
    logging: LoggingConfig, run_dir: Path, run_name: str, resume_step: int, config: dict[str, Any]
) -> list[Sink]:
    """All sinks of a run; to be called on rank 0 alone, after the checkpoint to resume from is known.

    `resume_step` is the number of steps that the resumed checkpoint holds (0: a new run): later rows of an earlier
    session are dropped, so that every step stands once. `config` is the run's configuration as plain values; it is
    redacted before it leaves. Raises `ConfigError` when a library is missing. Everything that fails later is one
    warning, and the training goes on.
    """
    sinks: list[Sink] = [GuardedSink(JsonlSink(run_dir / METRICS_FILE, resume_step))]
    if logging.tensorboard:
        from megalite.metrics.tensorboard import TensorboardSink

        sinks.append(GuardedSink(TensorboardSink(run_dir / "tensorboard", resume_step)))
    if logging.wandb.mode != "disabled":
        from megalite.metrics.wandb import build_wandb_sink

        sink = build_wandb_sink(logging.wandb, run_dir, run_name, resume_step, config)
        if sink:
            guarded = GuardedSink(sink)
            # A killed run takes the last seconds of its wandb file with it: what wandb lacks is logged now.
            for row in read_metrics(run_dir / METRICS_FILE):
                guarded.log(row["step"], {key: value for key, value in row.items() if key != "step"})
            sinks.append(guarded)
    return sinks
