"""`megalite parity`: does a layout change the numbers of my model?

A small model with all its switches runs as one plain process and under every layout asked for; losses, gradient norms
and every gradient are compared.
"""

import dataclasses
import itertools
import json
import math
import os
import signal
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megalite.config.compose import compose_train
from megalite.config.place import count_gpus
from megalite.config.schema import ContextMethod, EngineConfig, ParallelConfig, TrainConfig
from megalite.config.shrink import shrink
from megalite.config.validate import validate_untrained
from megalite.config.validate_layout import resolve_context_method
from megalite.errors import EXIT_FAILURE, EXIT_OK, ConfigError
from megalite.log import get_logger, setup_logging

from .spawn import spawn_ranks

log = get_logger(__name__)

_STOPPED = (128 + signal.SIGINT, 128 + signal.SIGTERM)  # exit codes of ranks that somebody stopped
SWEPT = ("parallel", "engine")  # keys whose values may be lists with commas: every combination is a layout
# Largest differences that are rounding, by figure: absolute of a loss in nats, relative of the others. `gradients` are
# those of the engine in fp32, `updates` what its steps change of the weights, `float64` gradients of the layers without
# it (see `_distances`).
LIMITS = {"loss": 1e-5, "grad norm": 1e-4, "gradients": 1e-4, "updates": 1e-4, "float64": 1e-9}


@dataclass(frozen=True)
class Verdict:
    """One layout against one process. `reason` tells why it was refused, or how it failed to run."""

    layout: str
    processes: int
    figures: dict[str, float] = dataclasses.field(default_factory=dict)
    first: str = ""  # what differs first: a figure and a parameter, in the order of the model
    reason: str = ""
    refused: bool = False

    @property
    def passed(self) -> bool:
        """All figures within rounding."""
        return not (self.reason or self.first)


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
            validate_untrained(config, _num_processes(config))
            verdicts.append(None)
        except ConfigError as error:
            verdicts.append(Verdict(_name(config), _num_processes(config), reason=str(error), refused=True))
    running = [config for config, verdict in zip(configs, verdicts, strict=True) if verdict is None]
    if not running:
        return [verdict for verdict in verdicts if verdict]
    small = [_shrunk(config, running) for config in running]
    log.info("%s", _what_it_is(small[0]))
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


def _what_it_is(small: TrainConfig) -> str:
    model = small.model
    return (
        f"made small: {model.num_layers} layers of width {model.hidden_size}, {model.num_attention_heads} query and "
        f"{model.num_kv_heads} key heads, vocabulary {model.known_vocab_size}, sequences of "
        f"{small.data.sequence_length}; dropout 0, fp32, no clipping, optimizer.lr={small.optimizer.lr} and "
        f"optimizer.eps={small.optimizer.eps}, with which Adam steps as SGD does"
    )


def _method(config: TrainConfig) -> ContextMethod:
    parallel = config.parallel
    return resolve_context_method(parallel.context_method, config.model, parallel.tensor, parallel.context)


def _num_processes(config: TrainConfig) -> int:
    """As many as asked for; else two replicas, so that sums over data are seen."""
    return config.launch.nproc_per_node or 2 * config.parallel.tensor * config.parallel.context


def _without_gpus(num_processes: int) -> None:
    if 0 < count_gpus() < num_processes:
        log.warning("%d GPUs are fewer than %d processes: everything runs on the CPU", count_gpus(), num_processes)
        os.environ["CUDA_VISIBLE_DEVICES"] = ""


def _run(config: TrainConfig, num_processes: int) -> tuple[dict[str, Any], dict[str, Any]] | str:
    """What `megalite.parity.measure` found: figures and tensors; or how it ended."""
    from safetensors.torch import load_file

    from megalite.parity import RESULT, TENSORS, measure

    with tempfile.TemporaryDirectory(prefix="megalite-parity-") as name:
        folder = Path(name)
        code = spawn_ranks(lambda place: measure(config, place, folder), num_processes)
        if code in _STOPPED:
            raise SystemExit(code)
        if code:
            return f"the ranks ended with exit code {code}"
        return json.loads((folder / RESULT).read_text()), load_file(folder / TENSORS)


def _verdict(config: TrainConfig, processes: int, found: Any, reference: Any) -> Verdict:
    if isinstance(found, str):
        return Verdict(_name(config), processes, reason=found)
    (figures, tensors), (wanted, wanted_tensors) = found, reference
    losses = zip([*figures["losses"], figures["loss"]], [*wanted["losses"], wanted["loss"]], strict=True)
    norms = zip(figures["grad_norms"], wanted["grad_norms"], strict=True)
    worst = {
        "loss": _worst(abs(a - b) for a, b in losses),
        "grad norm": _worst(_relative(abs(a - b), b) for a, b in norms),
    }
    first = ""
    for kind in ("float64", "gradients", "updates"):
        distances = _distances(tensors, wanted_tensors, kind, wanted["names"])
        worst[kind] = _worst(distances.values())
        differing = (name for name, distance in distances.items() if not distance <= LIMITS[kind])
        name = next(differing, "")
        first = first or (name and f"{kind} of {name}")
    figures_off = [name for name, limit in LIMITS.items() if not worst[name] <= limit]
    return Verdict(_name(config), processes, worst, first or ", ".join(figures_off))


def _distances(found: Any, wanted: Any, kind: str, names: Sequence[str]) -> dict[str, float]:
    """|g - g'| over max(|g|, 1e-3 of all of them), by parameter: a key's bias has no gradient but rounding."""
    wholes = {name: wanted[f"{kind}/{name}"].double() for name in names}
    least = 1e-3 * math.sqrt(sum(float(whole.norm()) ** 2 for whole in wholes.values()))
    return {
        name: _relative(float((found[f"{kind}/{name}"].double() - whole).norm()), max(float(whole.norm()), least))
        for name, whole in wholes.items()
    }


def _relative(distance: float, size: float) -> float:
    return distance / size if size else math.inf if distance else 0.0


def _worst(distances: Iterable[float]) -> float:
    """The largest; infinity when one is not a number, which `max` would not see."""
    return max((distance if distance == distance else math.inf for distance in distances), default=0.0)


def _name(config: TrainConfig) -> str:
    """The layout in the abbreviations of the field: tensor, sequence, context and data parallel."""
    parallel, engine = config.parallel, config.engine
    parts = [f"tp{parallel.tensor}"]
    parts += ["sp"] if parallel.tensor > 1 and parallel.sequence else []
    parts += [f"cp{parallel.context}-{_method(config)}"] if parallel.context > 1 else []
    data = _num_processes(config) // max(parallel.tensor * parallel.context, 1)
    parts += [f"dp{data}", f"zero{engine.zero_stage}"]
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
        "layout", title="against one process", caption="largest differences; of tensors relative, by parameter"
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
            console.print(f"{verdict.layout}: first to differ: {verdict.first}", highlight=False, markup=False)
        for line in verdict.reason.splitlines():
            console.print(f"{verdict.layout}: {line}", highlight=False, markup=False)
