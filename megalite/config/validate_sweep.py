"""The rules of `sweep.*`; each training of a sweep has those of `validate.py`."""

import math
import re
from collections.abc import Iterator, Sequence

from megalite.config.schema_sweep import SweepConfig
from megalite.config.sweep import MOST, Dimension
from megalite.errors import ConfigError


def validate_sweep(settings: SweepConfig, dimensions: Sequence[Dimension]) -> None:
    """Raise one `ConfigError` with a line for every setting of a sweep over `dimensions` that cannot work."""
    if problems := list(_rules(settings, dimensions)):
        raise ConfigError("\n".join(problems))


def _rules(settings: SweepConfig, dimensions: Sequence[Dimension]) -> Iterator[str]:
    if not dimensions:
        yield "-m: no key has several values, such as optimizer.lr=1e-4,3e-4; leave out -m for one training"
    # It begins the names of runs, which the rule of run_name limits.
    if settings.name is not None and not re.fullmatch(r"[\w=+-][\w.,=+-]{0,79}", settings.name):
        yield f"sweep.name: found {settings.name!r}, allowed: letters, digits and _ . , = + - (at most 80)"
    if settings.dir is not None and not settings.dir:
        yield "sweep.dir: is empty, name a directory"
    for key in ("parallel", "trials"):
        if (number := getattr(settings, key)) is not None and number < 1:
            yield f"sweep.{key}: found {number}, allowed: 1 or more"
    if not 0 <= settings.seed < 2**32:
        yield f"sweep.seed: found {settings.seed}, allowed: 0 or more and below 2^32"
    for dimension in dimensions if settings.trials else ():
        if "shuffle(" in dimension.line:
            yield f"{dimension.line}: a search chooses among values in any order, and each worker has to see the same"
    if settings.trials is None:
        if (number := math.prod(len(dimension.choices) for dimension in dimensions)) > MOST:
            yield f"-m: {number:,} combinations, at most {MOST:,} are taken; sweep.trials=N tries some of them"
        if settings.prune:
            yield "sweep.prune: found true, which needs sweep.trials"
        for dimension in dimensions:
            if not dimension.choices:
                yield (
                    f"{dimension.line}: has no end of values: say with sweep.trials=N how many trainings may be tried, "
                    "or name values"
                )
