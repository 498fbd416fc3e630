"""What a sink of figures is: it takes one row for each logged step, and cannot stop the training."""

from collections.abc import Mapping
from typing import Protocol

from megalite.log import get_logger
from megalite.redaction import redact_text

Row = Mapping[str, float | int | None]  # None: not known on this machine (MFU on a CPU)

# metrics.jsonl key -> panel of wandb and TensorBoard, and the factor from our unit to the panel's.
_PANELS: dict[str, tuple[str, float]] = {
    "loss": ("train/loss", 1),
    "tokens_seen": ("train/tokens_seen", 1),
    "skipped_steps": ("train/skipped_steps", 1),
    "learning_rate": ("optim/lr", 1),
    "grad_norm": ("optim/grad_norm", 1),
    "tokens_per_second": ("perf/tokens_per_s", 1),
    "step_seconds": ("perf/step_seconds", 1),
    "data_wait_seconds": ("perf/data_wait_seconds", 1),
    "mfu": ("perf/mfu", 1),
    "memory_bytes": ("mem/max_gib", 2.0**-30),
}

FIGURES = tuple(_PANELS)  # of a training's row
EVALUATION = ("loss", "perplexity", "bits_per_byte")  # of each source, as eval/<source>/<figure>


class Sink(Protocol):
    """Takes the figures of a run.

    `log` is called once for each logged step, steps rising, with all of the step's figures in one row: those of
    training, and `eval/<source>/<figure>` where the step was evaluated.
    """

    def log(self, step: int, row: Row) -> None:
        """Record the figures of `step`."""

    def close(self) -> None:
        """Write out what is pending. No call follows."""


def panels(row: Row) -> dict[str, float]:
    """The row under the panel names of wandb and TensorBoard; a figure that is not known is left out."""
    named: dict[str, float] = {}
    for key, value in row.items():
        if value is not None:
            panel, factor = _PANELS.get(key, (key if "/" in key else f"train/{key}", 1))
            named[panel] = value * factor
    return named


class GuardedSink:
    """Turns every exception of a sink into one warning: a full disk or a lost network must not end a run."""

    def __init__(self, sink: Sink) -> None:
        """Guard `sink`."""
        self.sink = sink
        self._warned = False

    def log(self, step: int, row: Row) -> None:
        """Record the figures of `step`, if the sink can."""
        try:
            self.sink.log(step, row)
        except Exception as error:
            self._warn(f"could not record step {step}", error)

    def close(self) -> None:
        """Close the sink, if it can be closed."""
        try:
            self.sink.close()
        except Exception as error:
            self._warn("could not be closed", error)

    def _warn(self, what: str, error: Exception) -> None:
        if not self._warned:
            self._warned = True
            message = redact_text(f"{type(error).__name__}: {error}")
            get_logger(__name__).warning(
                "%s %s: %s. Training goes on; this is said once.", type(self.sink).__name__, what, message
            )
