"""A sweep before its trainings: its directory, each training's folder, name and checked configuration."""

import dataclasses
import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import xxhash

from megalite.config.compose import SAFE, compose_config, compose_train
from megalite.config.place import count_gpus
from megalite.config.schema import TrainConfig
from megalite.config.schema_sweep import SweepConfig, SweepKeys
from megalite.config.sweep import Dimension, combinations, read_sweep
from megalite.config.validate_sweep import validate_sweep
from megalite.errors import ConfigError, MegaliteError
from megalite.metrics.base import EVALUATION, FIGURES

from ..prepare import Training, prepare

_LABEL_LENGTH = 100  # of a folder's name, and with the sweep's at most 200 in run_name


@dataclass(frozen=True)
class Sweep:
    """What a command line with -m says."""

    settings: SweepConfig
    name: str
    directory: Path
    dimensions: tuple[Dimension, ...]
    single: tuple[str, ...]  # the overrides with one value, which all trainings share
    arguments: tuple[str, ...]  # all that was said

    @property
    def keys(self) -> list[str]:
        """The keys that differ between the trainings."""
        return [dimension.key for dimension in self.dimensions]


@dataclass(frozen=True)
class Job:
    """One training of a sweep."""

    label: str  # its folder's name in the sweep's directory
    values: tuple[str, ...]  # of the sweep's keys, as texts of a command line
    training: Training  # checked
    command: str  # for a shell: the same training on its own, in a folder of its own

    @property
    def run_dir(self) -> Path:
        """Where it writes."""
        return Path(self.training.config.run_dir)


def read_command(arguments: Sequence[str]) -> Sweep:
    """A sweep from the arguments of `megalite train -m`. Raises `ConfigError`."""
    own = [argument for argument in arguments if argument.startswith(("sweep.", "sweep="))]
    settings = compose_config("sweep", SweepKeys, own).sweep
    single, dimensions = read_sweep([argument for argument in arguments if argument not in own])
    dimensions = sorted(dimensions, key=lambda one: one.key)  # said in another order it is the same sweep
    validate_sweep(settings, dimensions)
    if settings.trials and (given := [line for line in single if _key(line) in ("run_dir", "run_name")]):
        raise ConfigError(f"{given[0]}: the trainings of a search have folders and names of their own; see sweep.dir")
    name = settings.name or _name(single, dimensions, is_search=settings.trials is not None)
    return Sweep(
        settings,
        name,
        Path(settings.dir or f"outputs/sweeps/{name}"),
        tuple(dimensions),
        tuple(single),
        tuple(arguments),
    )


def plan_grid(sweep: Sweep) -> list[Job]:
    """Every combination as a checked training. Raises one error, naming the training, before any of them starts."""
    jobs = [build_job(sweep, label_of(sweep, values), values) for values in combinations(sweep.dimensions)]
    for what in ("run_dir", "run_name"):
        seen: dict[str, Job] = {}
        for job in jobs:
            value = getattr(job.training.config, what)
            if value in seen:
                raise ConfigError(
                    f"{what}: {seen[value].label} and {job.label} would both have {value}; leave {what} to the sweep, "
                    f"or let it hold what differs, such as ${{{sweep.keys[0]}}}"
                )
            seen[value] = job
    check_alike(jobs)
    return jobs


def check_alike(jobs: Sequence[Job]) -> None:
    """Raise `ConfigError` when trainings of one array would ask different things of Slurm."""
    launches = [job.training.config.launch for job in jobs]
    if any(launch.name == "slurm" for launch in launches):
        for job, launch in zip(jobs, launches, strict=True):
            if launch != launches[0]:
                raise ConfigError(
                    f"launch: with launch=slurm all trainings of a sweep are tasks of one array, but {job.label} asks "
                    f"for other things than {jobs[0].label}"
                )


def build_job(sweep: Sweep, label: str, values: Sequence[str]) -> Job:
    """A training with `values` for the sweep's keys; raises what is wrong with it, and says of which one."""
    swept = [f"{key}={value}" for key, value in zip(sweep.keys, values, strict=True)]
    given = {_key(line) for line in sweep.single}
    placed = {"run_dir": str(sweep.directory / label), "run_name": f"{sweep.name}-{label}"}
    own = [f"{key}={value}" for key, value in placed.items() if key not in given]
    try:
        config = _grouped(compose_train([*sweep.single, *swept, *own]), sweep.name)
        per_node = _ranks_per_node(sweep.settings, config)
        launch = dataclasses.replace(config.launch, nproc_per_node=per_node)
        training = prepare(dataclasses.replace(config, launch=launch))
    except MegaliteError as error:
        raise type(error)(f"{label}: {error}") from None
    return Job(label, tuple(values), training, command_of(sweep, label, values, per_node))


def command_of(sweep: Sweep, label: str, values: Sequence[str], ranks_per_node: int | None) -> str:
    """For a shell: the training with `values` on its own, from the start, in a folder of its own."""
    swept = [f"{key}={value}" for key, value in zip(sweep.keys, values, strict=True)]
    shared = [line for line in sweep.single if _key(line) not in ("run_dir", "run_name", "launch.nproc_per_node")]
    own = f"launch.nproc_per_node={ranks_per_node}"
    ranks = [own] if ranks_per_node and "launch.nproc_per_node" not in sweep.keys else []
    again = [*shared, *swept, *ranks, f"run_dir={sweep.directory / 'repeated' / label}"]
    return shlex.join(["megalite", "train", *again])


def label_of(sweep: Sweep, values: Sequence[str]) -> str:
    """The folder of a combination: `lr=0.0001,model=tiny`; a digest at its end where that leaves something out."""
    whole = ",".join(f"{name}={value}" for name, value in zip(short_names(sweep.keys), values, strict=True))
    safe = re.sub(r"[^\w.,=+-]", "-", whole)
    if safe == whole and len(whole) <= _LABEL_LENGTH:
        return whole
    digest = xxhash.xxh3_64_hexdigest(whole.encode())[:8]
    return f"{safe[: _LABEL_LENGTH - 9]}-{digest}"


def short_names(keys: Sequence[str]) -> list[str]:
    """The last part of each key, or all of it where two end in the same."""
    last = [key.rpartition(".")[2] for key in keys]
    return [key if last.count(name) > 1 else name for key, name in zip(keys, last, strict=True)]


def _name(single: Sequence[str], dimensions: Sequence[Dimension], is_search: bool) -> str:
    """The same for commands whose trainings have the same numbers."""
    lines = sorted(
        [*numbers_of(single), *(dimension.line for dimension in dimensions), *(["search"] if is_search else [])]
    )
    experiment = next((line.partition("=")[2] for line in single if _key(line) == "experiment"), "sweep")
    return f"{experiment}-{xxhash.xxh3_64_hexdigest(chr(10).join(lines).encode())[:8]}"


def numbers_of(single: Sequence[str]) -> list[str]:
    """Of overrides those that change numbers: no layout, speed or logging."""
    return [line for line in single if not any(_key(line) == key or _key(line).startswith(f"{key}.") for key in SAFE)]


def _ranks_per_node(settings: SweepConfig, config: TrainConfig) -> int | None:
    """What `launch.nproc_per_node` is to be: trainings side by side share the GPUs of this machine."""
    launch, parallel = config.launch, settings.parallel or 1
    gpus = 0 if launch.name == "slurm" else count_gpus()
    if launch.name != "slurm" and launch.nodes > 1:
        raise ConfigError(f"launch.nodes: found {launch.nodes}, but a sweep runs on this machine, or launch=slurm")
    if not gpus or parallel == 1:
        return launch.nproc_per_node
    ranks = launch.nproc_per_node or gpus // parallel
    if ranks * parallel > gpus or not ranks:
        raise ConfigError(
            f"sweep.parallel: found {parallel}, but there are {gpus} GPUs for trainings of {max(1, ranks)} each"
        )
    return ranks


def _grouped(config: TrainConfig, name: str) -> TrainConfig:
    """On a page of Weights & Biases the trainings of a sweep stand together."""
    wandb = config.logging.wandb
    if wandb.group is not None:
        return config
    logging = dataclasses.replace(config.logging, wandb=dataclasses.replace(wandb, group=name))
    return dataclasses.replace(config, logging=logging)


def _key(line: str) -> str:
    return line.partition("=")[0]


def metric_of(settings: SweepConfig, config: TrainConfig) -> str:
    """The name in metrics.jsonl of what is compared. Raises `ConfigError` for one that no row will hold."""
    if settings.metric:
        sources = [store.source for store in config.data.validation]
        names = [*FIGURES, *(f"eval/{source}/{figure}" for source in sources for figure in EVALUATION)]
        if settings.metric not in names:
            raise ConfigError(f"sweep.metric: found {settings.metric!r}, allowed: {', '.join(names)}")
        return settings.metric
    return f"eval/{config.data.validation[0].source}/loss" if config.data.validation else "loss"
