"""One rank of a training run: `torchrun -m megalite.train key=value ...`, or called by `megalite train`."""

import contextlib
import dataclasses
import os
import socket
import sys
import time
from contextlib import AbstractContextManager
from pathlib import Path

import torch
import torch.distributed as dist

from megalite.config.compose import compose_train, config_digest, config_values
from megalite.config.frozen import FROZEN, sent_config
from megalite.config.place import Place, drop_local_rank, place_from_environment
from megalite.config.schema import GuardConfig, TrainConfig
from megalite.config.schema_launch import LaunchConfig
from megalite.config.validate import resolve_auto, validate_train
from megalite.data.format import TokenStore
from megalite.errors import CheckpointError, ConfigError, DataError, MegaliteError, Preempted, ResourceError
from megalite.guard.goodput import GOODPUT, GoodputClock, format_goodput, process_started
from megalite.guard.heartbeat import Heartbeat
from megalite.guard.lock import RunLock
from megalite.guard.run_state import LifeRecord
from megalite.guard.signals import StopSignals
from megalite.guard.stall import Limits
from megalite.guard.vitals import Vitals
from megalite.host import differences, package_versions
from megalite.log import errors_in_log, get_logger, setup_logging
from megalite.mesh import build_mesh
from megalite.preflight import preflight
from megalite.process import last_collectives, pick_device, start_process_group
from megalite.sharing import Sharing, find_sharing
from megalite.trainer import Trainer

log = get_logger(__name__)


def main(arguments: list[str] | None = None) -> int:
    """The rank's life under a launcher that is not ours; returns the exit code."""
    place = Place()
    try:
        place = place_from_environment()
        setup_logging(place.rank)
        config = _sent_or_composed(drop_local_rank(sys.argv[1:] if arguments is None else arguments))
        if FROZEN not in os.environ:
            _tell_of_unused_keys(config.launch, place)
        config = resolve_auto(config, "cuda" if torch.cuda.is_available() else "cpu", place.world_size)
        validate_train(config, place.world_size)
        is_alone = place.local_world_size == place.world_size and config.launch.nodes == 1
        train(preflight(config, is_alone), place)
    except MegaliteError as error:
        # All ranks find the same fault in the configuration; one in its machine only the rank that is there finds.
        if place.rank == 0 or isinstance(error, ResourceError | DataError | CheckpointError):
            sys.stderr.write(f"{type(error).__name__}: {error}\n")  # in one piece: `print` writes the newline apart
        return error.exit_code
    return 0


def _tell_of_unused_keys(launch: LaunchConfig, place: Place) -> None:
    """Keys that are for launchers of ours, where somebody else's has started the ranks. Raises `ConfigError`."""
    if launch.dry_run:
        raise ConfigError("launch.dry_run: found true, but the ranks have been started: give it to `megalite train`")
    if launch.nproc_per_node not in (None, place.local_world_size):
        log.warning(
            "launch.nproc_per_node=%s has no effect here: the launcher started %d ranks on this machine",
            launch.nproc_per_node,
            place.local_world_size,
        )
    defaults = LaunchConfig()
    own = ("name", "dry_run", "nproc_per_node", "nodes", "interface", "start_timeout")
    keys = [field.name for field in dataclasses.fields(launch) if field.name not in own]
    if unused := [f"launch.{key}" for key in keys if getattr(launch, key) != getattr(defaults, key)]:
        log.warning("%s: no effect here, for the ranks were started by another launcher", ", ".join(unused))


def train(config: TrainConfig, place: Place) -> None:
    """Train `config`, validated, resolved and complete, as the rank at `place`.

    Raises `Preempted` when a signal asked for a stop.
    """
    device = pick_device(place)
    validate_train(config, place.world_size, device.type)
    run_dir = Path(config.run_dir)
    clock = GoodputClock(place.started or process_started(), run_dir / GOODPUT if place.rank == 0 else None)
    with contextlib.ExitStack() as stack:
        life = None
        if place.rank == 0:
            stack.enter_context(contextlib.closing(RunLock(run_dir)))
            life = stack.enter_context(LifeRecord(run_dir, place.world_size))
        heartbeat = _start_heartbeat(config.guard, run_dir / "logs", place) if config.guard.watchdog else None
        if heartbeat:
            stack.enter_context(contextlib.closing(heartbeat))
        signals = stack.enter_context(contextlib.closing(StopSignals()))
        vitals = Vitals(clock, signals, heartbeat)
        vitals.enter("start", "process group")
        start_process_group(place, device, config.launch.interface, config.launch.start_timeout)
        stack.callback(dist.destroy_process_group)
        vitals.enter("start", "configuration")
        sharing = find_sharing(run_dir)
        stack.enter_context(_other_lock(sharing, run_dir))
        (run_dir / "logs").mkdir(exist_ok=True)
        _check_agreement(config)
        setup_logging(place.rank, run_dir / "logs" / f"rank_{place.rank}.log")
        if not sharing.is_whole:
            log.warning("%s", sharing.describe(run_dir))
        try:
            with errors_in_log(expected=Preempted):
                _run(config, device, vitals, sharing, life)
        except BaseException as error:
            # At once: a launcher kills all ranks as soon as one has gone.
            if life:
                life.end(error)
            if isinstance(error, Preempted):
                dist.barrier()  # until rank 0 has closed and written what it had to
            raise


def _other_lock(sharing: Sharing, run_dir: Path) -> AbstractContextManager[object]:
    """That of a directory which rank 0 does not see, for the first who does. Collective: it is refused for all."""
    lock, problem = None, ""
    try:
        lock = RunLock(run_dir) if sharing.is_first and sharing.rank != 0 else None
    except ResourceError as error:
        problem = f"{sharing.hosts[sharing.rank]}: {error}"
    problems: list[str] = [problem]
    if not sharing.is_whole:
        problems = [""] * dist.get_world_size()
        dist.all_gather_object(problems, problem)
    if found := next(filter(None, problems), ""):
        if lock:
            lock.close()
        raise ResourceError(found)
    return contextlib.closing(lock) if lock else contextlib.nullcontext()


def _run(config: TrainConfig, device: torch.device, vitals: Vitals, sharing: Sharing, life: LifeRecord | None) -> None:
    """`life`: on rank 0."""
    trainer = Trainer(config, build_mesh(config.parallel, device), vitals, sharing)
    try:
        trainer.run()
    finally:
        if life:
            life.stands(trainer.counters.step, trainer.last_step, config.trainer.steps)
            log.info("where the time went, in all lives of the run:\n%s", format_goodput(vitals.clock.table()))


def _sent_or_composed(arguments: list[str]) -> TrainConfig:
    """What a launcher of ours sent along; under anybody else's, every rank composes the same arguments."""
    config = sent_config()
    if config is None:
        return compose_train(arguments)
    if arguments:
        raise ConfigError(f"{arguments[0]}: the environment variable {FROZEN} gives the whole configuration; unset it")
    return config


def _start_heartbeat(config: GuardConfig, logs: Path, place: Place) -> Heartbeat:
    limits = Limits(timeout=config.timeout, start=config.start_timeout)
    # A rank that a person started from a shell may outlive it.
    has_launcher = place.init_method is not None
    heartbeat = Heartbeat(
        logs, place.rank, place.local_rank, place.world_size, limits=limits, has_launcher=has_launcher,
        meeting=place.meeting,
    )  # fmt: skip
    heartbeat.watch_collectives(last_collectives)
    return heartbeat


@dataclasses.dataclass(frozen=True)
class _Said:
    """What a rank says of itself to the others."""

    host: str
    clock: float
    config: str  # the configuration's digest
    versions: dict[str, str]
    stores: dict[str, str]  # path -> digest


def _check_agreement(config: TrainConfig) -> None:
    """Every rank has its own configuration, packages, clock, and sight of the stores: all are equal.

    Hosts that have met know already; ranks of srun or of another launcher meet here first.
    """
    stores = {store.path: TokenStore.open(store.path).digest for store in (*config.data.train, *config.data.validation)}
    dist.barrier()  # all leave it at about the same time
    said = _Said(socket.gethostname(), time.time(), config_digest(config_values(config)), package_versions(), stores)
    everyone = [said] * dist.get_world_size()
    dist.all_gather_object(everyone, said)
    first = everyone[0]
    if different := [rank for rank, one in enumerate(everyone) if one.config != first.config]:
        raise ConfigError(f"ranks {different} were started with another configuration than rank 0")
    for path, digest in first.stores.items():
        if hosts := sorted({one.host for one in everyone if one.stores[path] != digest}):
            raise DataError(f"{path}: on {', '.join(hosts)} it is another store than on {first.host}; copy it again")
    for one in everyone:
        ahead = one.clock - first.clock if one.host != first.host else 0.0
        if problems := differences(one.host, one.versions, ahead, first.host, first.versions):
            raise ResourceError("\n".join(problems))


if __name__ == "__main__":
    sys.exit(main())
