"""`launch=torchrun`: the ranks of this host under torchrun; on several hosts the command is given on each of them."""

import os
import shlex
import sys
from collections.abc import Sequence

from megalite.config.frozen import FROZEN, config_to_send
from megalite.config.schema import TrainConfig
from megalite.network import PORT_SECONDS, addresses_of, await_port, is_own, outer_address

from .hosts import MeetingPoint, meet
from .lives import run_lives
from .prepare import Training, given_environment
from .supervise import clean_environment, supervise
from .torchrun_agent import LOOPBACK

PORT = 29400  # torchrun's own default


def start_torchrun(training: Training) -> int:
    """Run this host's torchrun to its end, again where ranks died; returns the run's exit code."""
    config, point = training.config, _meeting_point(training)
    return run_lives(lambda: run_on_host(config, training.ranks_per_node, point), config)


def run_on_host(config: TrainConfig, nproc: int, point: MeetingPoint | None, save_seconds: float = 0.0) -> int:
    """Meet the other hosts, if there are any, and run torchrun with `nproc` ranks to its end; returns the exit code.

    `save_seconds`: what ranks that are asked to stop have for it, where that is more than `launch.grace`. Raises
    `ResourceError` when a host is missing or unfit.
    """
    environment, launch = rank_environment(config), config.launch
    if point:
        own = host_address(config, point)
        hosts = [host.address for host in meet(config, point, own)]
        meeting = _between_hosts(config, f"{hosts[0]}:{point.port}", hosts.index(own), own)
    else:
        if launch.port:
            await_port("127.0.0.1", launch.port, PORT_SECONDS)
        meeting = _on_one_host(config)
    return supervise(_command(config, nproc, meeting), environment, launch.grace, save_seconds=save_seconds)


def _command(config: TrainConfig, nproc: int, meeting: Sequence[str]) -> list[str]:
    """torchrun on one host; `meeting`: how its ranks and those of other hosts find each other."""
    module = "megalite.launch.torchrun_agent"
    sizes = [f"--nnodes={config.launch.nodes}", f"--nproc-per-node={nproc}", "--max-restarts=0"]
    return [sys.executable, "-m", module, *sizes, *meeting, "-m", "megalite.train"]


def _on_one_host(config: TrainConfig) -> list[str]:
    """On the loopback, where nobody else listens in; a port of 0 is any free one."""
    return [f"--rdzv-backend={LOOPBACK}", f"--rdzv-endpoint=127.0.0.1:{config.launch.port or 0}"]


def _between_hosts(config: TrainConfig, endpoint: str, number: int | str, own: str) -> list[str]:
    """Hosts have met, and are numbered in the order of the meeting, the first one 0; `own`: this one's address.

    The backend c10d would number them by the text of their addresses, 10.0.0.10 before 10.0.0.9 (torch 2.13,
    dynamic_rendezvous.py): rank 0 would be on any of them, and neighbours in Slurm's order none.
    """
    return [
        "--rdzv-backend=static", f"--rdzv-endpoint={endpoint}", f"--node-rank={number}",
        f"--rdzv-conf=timeout={config.launch.start_timeout:.0f}", f"--rdzv-id={config.run_name}", f"--local-addr={own}",
    ]  # fmt: skip


def rank_environment(config: TrainConfig) -> dict[str, str]:
    """The variables of ranks: this process's, those of `launch.environment`, and the frozen configuration."""
    given = given_environment(config.launch)
    return clean_environment() | {"OMP_NUM_THREADS": _threads()} | given | {FROZEN: config_to_send(config)}


def _threads() -> str:
    """torchrun sets 1 where nothing is set, and says so each time; a rank sets its own share once it knows it."""
    return os.environ.get("OMP_NUM_THREADS", "1")


def host_address(config: TrainConfig, point: MeetingPoint) -> str:
    """This host's address in the network between the hosts."""
    interface = config.launch.interface
    return addresses_of(interface)[0] if interface else outer_address(point.address)


def _meeting_point(training: Training) -> MeetingPoint | None:
    launch = training.config.launch
    return MeetingPoint(str(launch.address), launch.port or PORT) if launch.nodes > 1 else None


def describe_torchrun(training: Training) -> str:
    """What `start_torchrun` runs on this host; which number another than the first has, the meeting tells."""
    config, point = training.config, _meeting_point(training)
    if point:
        number = 0 if is_own(point.address) else "N"
        meeting = _between_hosts(config, f"{point.address}:{point.port}", number, host_address(config, point))
    else:
        meeting = _on_one_host(config)
    return shlex.join(_command(config, training.ranks_per_node, meeting))
