"""The keys of a sweep, `megalite train -m`: beside those of the training that it repeats."""

from dataclasses import dataclass, field
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class SweepConfig:
    """Several trainings by one command."""

    name: str | None = None  # null: the experiment's, and a digest of the keys that change numbers
    dir: str | None = None  # null: outputs/sweeps/NAME; each training has a folder in it
    parallel: int | None = None  # side by side, on devices of their own; null: 1, in a grid's array all
    trials: int | None = None  # so many trainings with values that Optuna chooses; null: one for every combination
    metric: str | None = None  # what is compared; null: eval/SOURCE/loss of the first of data.validation, else loss
    direction: Literal["minimize", "maximize"] = "minimize"  # what a good value of it is
    prune: bool = False  # trials: stop those whose metric is worse than the median of the others at the same step
    seed: int = 1234  # trials: of what Optuna draws


@dataclass(frozen=True, kw_only=True)
class SweepKeys:
    """The keys of a sweep as they stand on the command line."""

    sweep: SweepConfig = field(default_factory=SweepConfig)
