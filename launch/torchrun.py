"""`launch=torchrun`: the ranks of this host under torchrun; on several hosts the command is given on each of them."""

import os
import shlex
import sys

from megalite.config.frozen import FROZEN, config_to_send
from megalite.config.schema import TrainConfig
from megalite.network import PORT_SECONDS, addresses_of, await_port, is_own, outer_address

from .hosts import MeetingPoint, meet
from .lives import run_lives
from .prepare import Training, given_environment
from .supervise import clean_environment, supervise

PORT = 29400  # torchrun's own default


def start_torchrun(training: Training) -> int:
    """Run this host's torchrun to its end, again where ranks died; returns the run's exit code."""
    config, point = training.config, _meeting_point(training)
    return run_lives(lambda: run_on_host(config, training.ranks_per_node, point), config)


def run_on_host(config: TrainConfig, nproc: int, point: MeetingPoint | None) -> int:
    """Meet the other hosts, if there are any, and run torchrun with `nproc` ranks to its end; returns the exit code.

    Raises `ResourceError` when a host is missing or unfit.
    """
    environment = rank_environment(config)
    own = None
    if point:
        own = host_address(config, point)
        meet(config, point, own)
    elif config.launch.port:
        await_port("127.0.0.1", config.launch.port, PORT_SECONDS)
    return supervise(torchrun_command(config, nproc, point, own), environment, config.launch.grace)


def torchrun_command(config: TrainConfig, nproc: int, point: MeetingPoint | None, own: str | None) -> list[str]:
    """The command line of one host, whose own address between hosts is `own`, where there are several."""
    launch = config.launch
    command = [
        sys.executable, "-m", "megalite.launch.torchrun_agent", f"--nnodes={launch.nodes}", f"--nproc-per-node={nproc}",
        "--max-restarts=0", "--rdzv-backend=c10d",
    ]  # fmt: skip
    if point is None:
        # Not --standalone, which asks for the host's own name: in a container it may mean nothing.
        port = launch.port or 0
        command += [f"--rdzv-endpoint=127.0.0.1:{port}", "--rdzv-conf=is_host=true", "--local-addr=127.0.0.1"]
    else:
        is_first = "true" if is_own(point.address) else "false"
        command += [
            f"--rdzv-endpoint={point.address}:{point.port}",
            f"--rdzv-conf=is_host={is_first},join_timeout={launch.start_timeout:.0f},last_call_timeout=1",
            f"--rdzv-id={config.run_name}",
            f"--local-addr={own}",
        ]
    return [*command, "-m", "megalite.train"]


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
    """What `start_torchrun` runs on this host."""
    config, point = training.config, _meeting_point(training)
    own = host_address(config, point) if point else None
    return shlex.join(torchrun_command(config, training.ranks_per_node, point, own))
