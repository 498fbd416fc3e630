"""Where a process stands among the ranks: what launchers say in environment variables, read in this one place."""

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from megalite.errors import ConfigError

# What launchers tell a rank of its place.
PLACES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


@dataclass(frozen=True)
class Place:
    """One rank's place. `init_method` is what `torch.distributed.init_process_group` takes."""

    rank: int = 0
    local_rank: int = 0
    world_size: int = 1
    local_world_size: int = 1  # ranks on this machine
    init_method: str | None = None  # None: a world of one that needs no rendezvous
    address: str | None = None  # of the host where ranks meet, when that may be another one
    port: int = 0  # there
    started: float | None = None  # when the command was, in seconds since 1970; None: with this process

    @property
    def meeting(self) -> str:
        """HOST:PORT of where ranks meet; empty where it is a file, or nowhere."""
        return f"{self.address}:{self.port}" if self.address else ""


def place_from_environment(environment: Mapping[str, str] | None = None) -> Place:
    """The place that torchrun, the deepspeed launcher or srun gave this process; a world of one without a launcher.

    Raises `ConfigError` when only some of the variables are set, or one is no number.
    """
    environment = os.environ if environment is None else environment
    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE")
    found = [name for name in names if name in environment]
    if not found:
        # Of the step that srun started; a batch script has SLURM_PROCID too, and is one process.
        return _place_of_slurm(environment) if _number(environment, "SLURM_STEP_NUM_TASKS", 1) > 1 else Place()
    missing = [name for name in (*names, "MASTER_ADDR", "MASTER_PORT") if name not in environment]
    if missing:
        raise ConfigError(f"the environment sets {', '.join(found)} but not {', '.join(missing)}: a launcher sets all")
    rank, local_rank, world_size, port = (_number(environment, name) for name in (*names, "MASTER_PORT"))
    if not 0 <= local_rank <= rank < world_size:
        raise ConfigError(
            f"the environment sets LOCAL_RANK={local_rank}, RANK={rank}, WORLD_SIZE={world_size}; a launcher sets "
            "0 <= LOCAL_RANK <= RANK < WORLD_SIZE"
        )
    # The deepspeed launcher does not tell; on one machine, which is where it matters (CPU threads), all are local.
    local_world_size = _number(environment, "LOCAL_WORLD_SIZE") if "LOCAL_WORLD_SIZE" in environment else world_size
    return Place(rank, local_rank, world_size, local_world_size, "env://", environment["MASTER_ADDR"], port)


def is_one_of_several(environment: Mapping[str, str] | None = None) -> bool:
    """Whether srun or torchrun has started this process, as one of several or to be a rank."""
    environment = os.environ if environment is None else environment
    return "TORCHELASTIC_RUN_ID" in environment or _number(environment, "SLURM_STEP_NUM_TASKS", 1) > 1


def _place_of_slurm(environment: Mapping[str, str]) -> Place:
    """One task a rank: `srun python -m megalite.train`. Ranks meet on the step's first host."""
    names = ("SLURM_PROCID", "SLURM_LOCALID", "SLURM_NODEID", "SLURM_STEP_TASKS_PER_NODE", "SLURM_STEP_NODELIST")
    if missing := [name for name in (*names, "SLURM_JOB_ID") if name not in environment]:
        raise ConfigError(f"the environment sets SLURM_STEP_NUM_TASKS but not {', '.join(missing)}: srun sets all")
    address = environment.get("MASTER_ADDR") or first_host(environment["SLURM_STEP_NODELIST"])
    port = _number(environment, "MASTER_PORT", port_of_job(_number(environment, "SLURM_JOB_ID")))
    on_nodes = _tasks_per_node(environment["SLURM_STEP_TASKS_PER_NODE"])
    return Place(
        _number(environment, "SLURM_PROCID"),
        _number(environment, "SLURM_LOCALID"),
        _number(environment, "SLURM_STEP_NUM_TASKS"),
        on_nodes[_number(environment, "SLURM_NODEID")],
        f"tcp://{address}:{port}",
        address,
        port,
    )


def own_job() -> str:
    """The Slurm job that this process is in: its number, or ARRAY_TASK; empty outside of Slurm.

    Of an array one task has the number of the whole, which would mean all of them.
    """
    array = os.environ.get("SLURM_ARRAY_JOB_ID")
    return f"{array}_{os.environ.get('SLURM_ARRAY_TASK_ID')}" if array else os.environ.get("SLURM_JOB_ID", "")


def port_of_job(job: int) -> int:
    """Where the ranks of a Slurm job meet; with the port above it no other's, for jobs with numbers side by side."""
    return 20000 + 2 * (job % 6000)


def first_host(hosts: str) -> str:
    """The first name of a list as Slurm writes it: `gpu[03-05,9],login` begins with gpu03."""
    name, bracket, rest = hosts.partition("[")
    if not bracket or "," in name:
        return name.partition(",")[0]
    return first_host(name + re.split(r"[-,\]]", rest, maxsplit=1)[0] + rest.partition("]")[2])


def _tasks_per_node(text: str) -> list[int]:
    """`2(x3),1` is 2, 2, 2, 1."""
    parts = re.findall(r"(\d+)(?:\(x(\d+)\))?", text)
    return [int(tasks) for tasks, times in parts for _ in range(int(times or 1))]


def _number(environment: Mapping[str, str], name: str, default: int | None = None) -> int:
    if default is not None and name not in environment:
        return default
    try:
        return int(environment[name])
    except ValueError:
        raise ConfigError(f"{name}={environment[name]!r} in the environment is not a whole number") from None


def count_cores() -> int:
    """Processor cores that this process may use: a batch system or a container may have left it a few."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def count_gpus(environment: Mapping[str, str] | None = None) -> int:
    """NVIDIA GPUs that a process started here would see, counted without torch."""
    environment = os.environ if environment is None else environment
    present = len([device for device in Path("/dev").glob("nvidia[0-9]*") if device.name[6:].isdigit()])
    if (visible := environment.get("CUDA_VISIBLE_DEVICES")) is not None:
        named = [device for device in visible.split(",") if device.strip() and device.strip() != "-1"]
        return min(len(named), present)  # a variable left over from another machine makes no GPU
    return present


def drop_local_rank(arguments: list[str]) -> list[str]:
    """The arguments without the `--local_rank=N`, or `--local_rank N`, that the deepspeed launcher adds."""
    names = ("--local_rank", "--local-rank")
    kept = []
    for number, argument in enumerate(arguments):
        value_of_last = number > 0 and arguments[number - 1] in names
        if not value_of_last and not argument.startswith(names):
            kept.append(argument)
    return kept
