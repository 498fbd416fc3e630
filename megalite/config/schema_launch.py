"""The dataclasses of the conf group `launch`: how ranks are started, on this machine or on many."""

from dataclasses import dataclass, field
from typing import Any, Literal


@dataclass(frozen=True, kw_only=True)
class SlurmConfig:
    """What `launch=slurm` asks of Slurm; null leaves it to the cluster's own default."""

    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    constraint: str | None = None  # features that the nodes must have
    time: str | None = None  # limit of one life of the job as sbatch takes it: minutes, HH:MM:SS or D-HH:MM:SS
    gpus_per_node: int | None = None  # null: none, the ranks run on CPUs
    cpus_per_task: int | None = None  # a task is what `tasks` says
    memory: str | None = None  # of a node, such as 64G
    exclusive: bool = False  # no other job on the nodes
    tasks: Literal["node", "rank"] = "node"  # srun starts torchrun once on every node, or every rank itself
    signal_seconds: int = 120  # so long before the time limit the run is told to save and to end
    requeue: bool = True  # a run that was stopped, or whose node was lost, goes back into the queue and continues
    after: tuple[str, ...] = ()  # jobs that must have ended well before this one starts; they may make its stores
    container: str | None = None  # image for Pyxis' srun --container-image; null: none
    mounts: tuple[str, ...] = ()  # for the container, as SOURCE:TARGET
    modules: tuple[str, ...] = ()  # loaded by `module load` before anything else
    setup: tuple[str, ...] = ()  # lines of shell after that, such as `source venv/bin/activate`
    options: tuple[str, ...] = ()  # further options of sbatch, such as --reservation=night


@dataclass(frozen=True, kw_only=True)
class LaunchConfig:
    """How `megalite train` starts ranks."""

    name: Literal["local", "torchrun", "deepspeed", "slurm"] = "local"
    nodes: int = 1  # hosts; with torchrun give the same command on each of them
    nproc_per_node: int | None = None  # null: the number of GPUs, or 1 without one
    dry_run: bool = False  # show the layout, its sizes and what would be started, and start nothing
    wait: bool = False  # slurm: until the job has ended, and return its exit code
    restarts: int = 0  # so many times in a row, without a new checkpoint, ranks that died are started again
    address: str | None = None  # where ranks of several hosts meet: the first host's name; slurm and deepspeed know it
    port: int | None = None  # there; null: a free one on one host, 29400 on several
    interface: str | None = None  # between hosts, such as ib0; null: the one that leads to the first host
    start_timeout: float = 300.0  # seconds that hosts, and then their ranks, wait for one another
    grace: float = 60.0  # seconds that ranks have to save and end before they are killed
    hostfile: str | None = None  # deepspeed: hosts and their slots, one a line
    environment: dict[str, Any] = field(default_factory=dict)  # variables for the ranks, such as NCCL_DEBUG; printed
    slurm: SlurmConfig = field(default_factory=SlurmConfig)
