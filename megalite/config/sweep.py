"""What a sweep goes over, as Hydra's grammar says it: `a,b`, `range(1,4)`, `glob(llama*)`, `tag(log,interval(1e-5,1))`.

Hydra 1.3.8 starts no launcher from a module outside a package named hydra_plugins, which would be one for all of
site-packages; so its parser reads the values, and the combinations are made here, in the order of Hydra's own sweeper.
"""

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from megalite.config.compose import split_sweep
from megalite.errors import ConfigError

MOST = 10_000  # values of a key, and combinations: each is composed and checked before the first training starts


@dataclass(frozen=True)
class Dimension:
    """One key of a sweep, and the values that it may take."""

    key: str
    line: str  # as the user gave it
    choices: tuple[str, ...] = ()  # as they stand on a command line, quoted where needed; none: an interval of numbers
    # Of a range and of an interval: both ends are included; whole numbers where the user gave such.
    ends: tuple[float, float] | tuple[int, int] | None = None
    step: float | int | None = None  # between the values of a range; None: any number
    log: bool = False  # values are spread evenly over orders of magnitude


def read_sweep(overrides: Sequence[str]) -> tuple[list[str], list[Dimension]]:
    """The overrides with one value as they stand, and a dimension for each key with several.

    Raises `ConfigError` for unknown keys and choices, and for ranges that hold nothing.
    """
    single, several = split_sweep(overrides)
    return single, [_dimension(key, override) for key, override in several.items()]


def combinations(dimensions: Sequence[Dimension]) -> Iterator[tuple[str, ...]]:
    """One value for each dimension, as texts of a command line; the last dimension changes fastest."""
    return itertools.product(*(dimension.choices for dimension in dimensions))


def _dimension(key: str, override: Any) -> Dimension:
    from hydra.errors import HydraException

    line, sweep = str(override.input_line), override.value()
    if override.is_interval_sweep():
        low, high, log = sweep.start, sweep.end, "log" in sweep.tags
        if not low < high or (log and low <= 0):
            raise ConfigError(f"{line}: the ends of an interval must rise{', from above 0' if log else ''}")
        return Dimension(key, line, (), (low, high), None, log)
    if override.is_range_sweep() and sweep.step == 0:
        raise ConfigError(f"{line}: the step of a range is not 0")
    try:
        choices = tuple(itertools.islice(override.sweep_string_iterator(), MOST + 1))
    except HydraException as error:
        raise ConfigError(f"{line}: {' '.join(str(error).split())}") from None
    if not 0 < len(choices) <= MOST:
        raise ConfigError(f"{line}: stands for {f'more than {MOST:,} values' if choices else 'no value'}")
    if not override.is_range_sweep():
        return Dimension(key, line, choices)
    values, log = list(override.sweep_iterator()), "log" in sweep.tags
    if log and (min(values) <= 0 or sweep.step != 1):
        raise ConfigError(f"{line}: tag(log) needs values above 0, and a step of 1")
    return Dimension(key, line, choices, (min(values), max(values)), abs(sweep.step), log)
