"""`megalite parity`: does a layout change the numbers of my model?

A small model with all its switches runs as one plain process and under every layout asked for; losses, gradient norms
and every gradient are compared.
"""

import dataclasses
import itertools
import json
import math
import os
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megalite.config.compose import compose_train
from megalite.config.place import count_gpus
from megalite.config.schema import ContextMethod, EngineConfig, ParallelConfig, TrainConfig
from megalite.config.shrink import shrink
from megalite.config.validate_layout import resolve_context_method, validate_layout
from megalite.errors import EXIT_FAILURE, EXIT_OK, ConfigError
from megalite.log import get_logger, setup_logging

from .spawn import spawn_ranks

log = get_logger(__name__)

SWEPT = ("parallel", "engine")  # keys whose values may be lists with commas: every combination is a layout
# Largest differences that are rounding, by figure: absolute of a loss in nats, relative of the others. `gradients` are
# those of the engine in fp32, `float64` those of the layers without it (see `_gradient_distances`).
LIMITS = {"loss": 1e-5, "grad norm": 1e-4, "gradients": 1e-4, "float64": 1e-9}


@dataclass(frozen=True)
class Verdict:
    """One layout against one process. `reason` tells why it was refused, or how it failed to run."""

    layout: str
    processes: int
    figures: dict[str, float] = dataclasses.field(default_factory=dict)
    first: str = ""  # the first parameter, in the order of the model, whose gradient differs
    reason: str = ""
    refused: bool = False

    @property
    def passed(self) -> bool:
        """All figures within rounding."""
        return not self.reason and all(self.figures[name] <= limit for name, limit in LIMITS.items())


def parity(arguments: list[str]) -> int:
    """Print a line for each layout; returns 0 when all that can run agree with one process."""
    setup_logging()
    configs = [compose_train(["data.train=unused", *overrides]) for overrides in expand(arguments)]
    _without_gpus(max(map(_num_processes, configs)))
    from megalite.engine import preload

    if not count_gpus():
        preload()
    verdicts = compare(configs)
    _print(verdicts)
    return EXIT_OK if any(v.passed for v in verdicts) and all(v.passed or v.refused for v in verdicts) else EXIT_FAILURE


def expand(arguments: Sequence[str]) -> list[list[str]]:
    """Every combination of `parallel.*` and `engine.*` values that are given with commas.

    >>> expand(["parallel.tensor=1,2", "model=tiny"])
    [['parallel.tensor=1', 'model=tiny'], ['parallel.tensor=2', 'model=tiny']]
    """
    choices = []
    for argument in arguments:
        key, _, value = argument.partition("=")
        swept = key.split(".")[0] in SWEPT and "," in value and value[0] not in "[{"
        choices.append([f"{key}={part}" for part in value.split(",")] if swept else [argument])
    return [list(combination) for combination in itertools.product(*choices)]


def compare(configs: Sequence[TrainConfig]) -> list[Verdict]:
    """Run one process and every layout, in turn, and compare."""
    verdicts: list[Verdict | None] = []
    for config in configs:
        try:
            validate_layout(dataclasses.replace(config, engine=_fp32(config.engine)), _num_processes(config))
            verdicts.append(None)
        except ConfigError as error:
            verdicts.append(Verdict(_name(config), _num_processes(config), reason=str(error), refused=True))
    running = [config for config, verdict in zip(configs, verdicts, strict=True) if verdict is None]
    if not running:
        return [verdict for verdict in verdicts if verdict]
    small = [_shrunk(config, running) for config in running]
    engine = EngineConfig(zero_stage=0, precision="fp32", grad_clip=small[0].engine.grad_clip)
    alone = dataclasses.replace(small[0], parallel=ParallelConfig(), engine=engine)
    reference = _run(alone, 1)
    if isinstance(reference, str):
        raise ConfigError(f"one process alone did not run: {reference}")
    found = iter(
        _verdict(config, _num_processes(config), _run(config, _num_processes(config)), reference) for config in small
    )
    return [verdict or next(found) for verdict in verdicts]


def _shrunk(config: TrainConfig, configs: Sequence[TrainConfig]) -> TrainConfig:
    """`config` as small as all of `configs` allow, so that they have the same model and batches."""
    sizes = [(c.parallel.tensor, c.parallel.context) for c in configs]
    heads = [c.parallel.tensor * (c.parallel.context if _method(c) == "ulysses" else 1) for c in configs]
    length_split = 2 * math.lcm(*(tensor * context for tensor, context in sizes))
    data = [_num_processes(c) // (tensor * context) for c, (tensor, context) in zip(configs, sizes, strict=True)]
    small = shrink(config, math.lcm(*heads), length_split, math.lcm(*data))
    return dataclasses.replace(small, parallel=dataclasses.replace(small.parallel, context_method=_method(config)))


def _method(config: TrainConfig) -> ContextMethod:
    parallel = config.parallel
    return resolve_context_method(parallel.context_method, config.model, parallel.tensor, parallel.context)


def _num_processes(config: TrainConfig) -> int:
    """As many as asked for; else two replicas, so that sums over data are seen."""
    return config.launch.nproc_per_node or 2 * config.parallel.tensor * config.parallel.context


def _fp32(engine: EngineConfig) -> EngineConfig:
    return dataclasses.replace(engine, precision="fp32")


def _without_gpus(num_processes: int) -> None:
    if 0 < count_gpus() < num_processes:
        log.warning("%d GPUs are fewer than %d processes: everything runs on the CPU", count_gpus(), num_processes)
        os.environ["CUDA_VISIBLE_DEVICES"] = ""


def _run(config: TrainConfig, num_processes: int) -> tuple[dict[str, Any], dict[str, Any]] | str:
    """What `megalite.parity.measure` found: figures and gradients; or how it ended."""
    from safetensors.torch import load_file

    from megalite.parity import GRADIENTS, RESULT, measure

    with tempfile.TemporaryDirectory(prefix="megalite-parity-") as name:
        folder = Path(name)
        code = spawn_ranks(lambda place: measure(config, place, folder), num_processes)
        if code:
            return f"the ranks ended with exit code {code}"
        return json.loads((folder / RESULT).read_text()), load_file(folder / GRADIENTS)


def _verdict(config: TrainConfig, processes: int, found: Any, reference: Any) -> Verdict:
    if isinstance(found, str):
        return Verdict(_name(config), processes, reason=found)
    (figures, gradients), (wanted, wanted_gradients) = found, reference
    losses = [*zip(figures["losses"], wanted["losses"], strict=True), (figures["loss"], wanted["loss"])]
    norms = zip(figures["grad_norms"], wanted["grad_norms"], strict=True)
    worst, first = {}, ""
    for name, kind in (("float64", "float64/"), ("gradients", "engine/")):
        distances = _gradient_distances(gradients, wanted_gradients, kind)
        worst[name] = max(distances.values())
        differing = (parameter for parameter, distance in distances.items() if not distance <= LIMITS[name])
        first = first or next(differing, "")
    return Verdict(
        _name(config),
        processes,
        {
            "loss": max(abs(a - b) for a, b in losses),
            "grad norm": max(abs(a / b - 1) for a, b in norms),
            **worst,
        },
        first,
    )


def _gradient_distances(found: Any, wanted: Any, kind: str) -> dict[str, float]:
    """|g - g'| over max(|g|, 1e-3 of the whole gradient), by parameter: a key's bias has no gradient but rounding."""
    names = [name for name in wanted if name.startswith(kind)]
    whole = math.sqrt(sum(float(wanted[name].double().norm()) ** 2 for name in names))
    return {
        name.removeprefix(kind): float((found[name].double() - wanted[name].double()).norm())
        / max(float(wanted[name].double().norm()), 1e-3 * whole)
        for name in names
    }


def _name(config: TrainConfig) -> str:
    """The layout in the abbreviations of the field: tensor, sequence, context and data parallel."""
    parallel, engine = config.parallel, config.engine
    parts = [f"tp{parallel.tensor}"]
    parts += ["sp"] if parallel.tensor > 1 and parallel.sequence else []
    parts += [f"cp{parallel.context}-{_method(config)}"] if parallel.context > 1 else []
    parts += [f"dp{_num_processes(config) // (parallel.tensor * parallel.context)}", f"zero{engine.zero_stage}"]
    parts += [f"recompute-{engine.recompute}"] if engine.recompute != "none" else []
    parts += ["compiled"] if engine.compile else []
    parts += [f"offload-{engine.offload}"] if engine.offload != "none" else []
    return " ".join(parts)


def _print(verdicts: Sequence[Verdict]) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console()
    table = Table(
        "layout", title="against one process", caption="largest differences; gradients relative, by parameter"
    )
    for heading in LIMITS:
        table.add_column(heading, justify="right")
    table.add_column("")
    for verdict in verdicts:
        figures = [f"{verdict.figures[name]:.0e}" if verdict.figures else "–" for name in LIMITS]
        mark = Text("same", "green") if verdict.passed else Text("refused", "yellow")
        if not (verdict.passed or verdict.refused):
            mark = Text("DIFFERS" if verdict.figures else "FAILED", "bold red")
        table.add_row(verdict.layout, *figures, mark)
    console.print(table)
    for verdict in verdicts:
        if verdict.first:
            console.print(f"{verdict.layout}: the first gradient to differ is that of {verdict.first}", highlight=False)
        for line in verdict.reason.splitlines():
            console.print(f"{verdict.layout}: {line}", highlight=False, markup=False)
