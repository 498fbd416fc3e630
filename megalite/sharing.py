"""Which ranks have one run directory: hosts that share no file system each have one of their own, under the same name.

It is tried, and not configured: all ranks want to make the same new file, and who finds another's shares its directory.
"""

import secrets
import socket
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist

from megalite.errors import ResourceError
from megalite.guard.stall import name_ranks


@dataclass(frozen=True)
class Sharing:
    """As `rank` sees it. `firsts`: for every rank, the lowest of those whose run directory is the same as its own."""

    rank: int
    firsts: tuple[int, ...]
    hosts: tuple[str, ...]  # the name of every rank's host

    @property
    def is_first(self) -> bool:
        """Whether this rank acts for its directory."""
        return self.firsts[self.rank] == self.rank

    @property
    def is_whole(self) -> bool:
        """Whether there is one directory for all."""
        return not any(self.firsts)

    @property
    def with_rank_0(self) -> list[int]:
        """The ranks that see what rank 0 writes, itself among them."""
        return [rank for rank, first in enumerate(self.firsts) if first == 0]

    def describe(self, run_dir: Path) -> str:
        """What it means that directories are several."""
        others = [rank for rank, first in enumerate(self.firsts) if first]
        hosts = sorted({self.hosts[rank] for rank in others})
        return (
            f"run_dir: {run_dir.absolute()} is not that of {self.hosts[0]} for {name_ranks(others)} on "
            f"{', '.join(hosts[:8])}{', ...' if len(hosts) > 8 else ''}: checkpoints and metrics are kept on "
            f"{self.hosts[0]}, and checkpoints are sent to the others when the run is resumed; logs stay on each host, "
            "and its watchdog sees its own ranks"
        )


def find_sharing(run_dir: Path) -> Sharing:
    """Find out; `run_dir` is made where it is missing. Collective. Raises `ResourceError`, on every rank, for a disk.

    A file is made by one rank alone on every file system that keeps O_EXCL, as NFS does since version 3.
    """
    rank = dist.get_rank()
    names = [f".ranks-{secrets.token_hex(8)}"]
    dist.broadcast_object_list(names, src=0)
    mark, is_mine, problem = run_dir / names[0], False, ""
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        with suppress(FileExistsError), open(mark, "x", encoding="utf-8") as file:
            is_mine = True
            file.write(str(rank))
    except OSError as error:
        problem = str(error)
    dist.barrier()  # each mark has been made, and holds its maker's number
    maker = -1
    try:
        maker = int(mark.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        problem = problem or str(error)
    told: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(told, (maker, socket.gethostname(), problem))
    if is_mine:
        mark.unlink(missing_ok=True)
    makers, hosts, problems = zip(*told, strict=True)
    for host, text in zip(hosts, problems, strict=True):
        if text:
            raise ResourceError(f"run_dir: {host} cannot write and read a file in {run_dir.absolute()}: {text}")
    return Sharing(rank, tuple(makers.index(maker) for maker in makers), hosts)
