"""One rank that looks at its host and at the way to the others: `torchrun ... -m megalite.node_checks`.

Under srun: `srun python -m megalite.node_checks`, one task a rank. It takes the keys of `megalite doctor`, whose own
all-reduce is measured here too.
"""

import fcntl
import os
import socket
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from megalite.bandwidth import Bandwidth, measure_all_reduce
from megalite.config.compose import compose_config
from megalite.config.place import Place, drop_local_rank, place_from_environment
from megalite.config.schema import DoctorConfig
from megalite.config.validate_commands import validate_doctor
from megalite.errors import EXIT_OK, EXIT_RESOURCE, MegaliteError
from megalite.host import differences, package_versions, shared_mark, write_mark
from megalite.log import get_logger, setup_logging
from megalite.process import pick_device, start_process_group

T = TypeVar("T")

_CLOCK_LOOKS = 5
_SEEN_SECONDS = 10.0  # a network file system may show others an old directory for a few seconds
_POLL_SECONDS = 0.02

log = get_logger(__name__)


@dataclass(frozen=True)
class Node:
    """What one rank found on its host."""

    rank: int
    local_rank: int
    name: str
    device: str
    interface: str
    versions: dict[str, str] = field(default_factory=dict)
    clock: float = 0.0  # seconds ahead of rank 0
    sees: float | None = None  # seconds until it saw a new file of rank 0 in run_dir; None: it never did
    sees_rename: float | None = None  # and another file put in its place
    is_kept_out: bool = True  # by a lock of rank 0; where not, nothing keeps a second training out of run_dir


def main(arguments: list[str] | None = None) -> int:
    """Compare the hosts of all ranks; rank 0 prints. Returns EXIT_RESOURCE where they cannot train together."""
    try:
        place = place_from_environment()
        setup_logging(place.rank)
        config = compose_config(
            "doctor", DoctorConfig, drop_local_rank(sys.argv[1:] if arguments is None else arguments)
        )
        validate_doctor(config)
        if config.nproc_per_node not in (None, place.local_world_size):
            log.warning(
                "nproc_per_node=%s has no effect here: the launcher started %d ranks on this machine",
                config.nproc_per_node,
                place.local_world_size,
            )
        run_dir = Path(config.run_dir)
        device = pick_device(place)
        start_process_group(place, device)
    except MegaliteError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return error.exit_code
    try:
        nodes, trouble = look_at_nodes(place, device, run_dir)
        bandwidth = measure_all_reduce(config.size_mib << 20, device) if place.world_size > 1 else None
    finally:
        dist.destroy_process_group()
    problems = list(find_problems(nodes, run_dir, trouble))
    if place.rank == 0:
        warnings = list(find_warnings(nodes, run_dir, trouble))
        _print(nodes, bandwidth, problems, warnings, has_looked=not trouble)
    return EXIT_RESOURCE if problems else EXIT_OK


def look_at_nodes(place: Place, device: torch.device, run_dir: Path) -> tuple[list[Node], str]:
    """What every rank found, by rank, and why rank 0 could not work in `run_dir`; the same on all ranks."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    variable = "NCCL_SOCKET_IFNAME" if device.type == "cuda" else "GLOO_SOCKET_IFNAME"
    interface = os.environ.get(variable) or "not set"
    clock = _clock_offset()
    sees, sees_rename, is_kept_out, trouble = _look_at_directory(place, run_dir)
    own = Node(
        place.rank,
        place.local_rank,
        socket.gethostname(),
        name,
        interface,
        package_versions(),
        clock,
        sees,
        sees_rename,
        is_kept_out,
    )
    return _gather(own), trouble


def find_problems(nodes: Sequence[Node], run_dir: Path, trouble: str = "") -> Iterator[str]:
    """Why the hosts of the ranks cannot train together; `trouble`: why rank 0 could not work in `run_dir`."""
    first = nodes[0]
    if trouble:
        yield f"run_dir: {first.name} cannot write, rename and lock in {run_dir.absolute()}: {trouble}"
    for node in nodes:
        if node.local_rank != 0:
            continue
        yield from differences(node.name, node.versions, node.clock, first.name, first.versions)
        if trouble:
            continue
        if node.sees is None:
            continue  # it has a directory of its own
        if node.sees_rename is None:
            yield (
                f"run_dir: {node.name} does not see within {_SEEN_SECONDS:.0f} s that {first.name} put another file in "
                f"the place of one in {run_dir.absolute()}: its file system holds on to old data for too long"
            )
        elif not node.is_kept_out:
            yield (
                f"run_dir: {node.name} gets a lock in {run_dir.absolute()} that {first.name} holds, so that two "
                "trainings could write to one directory: mount it with locks that all hosts share (Lustre: -o flock)"
            )


def find_warnings(nodes: Sequence[Node], run_dir: Path, trouble: str = "") -> Iterator[str]:
    """What is good to know, and keeps no hosts from training together; `trouble`: as for `find_problems`."""
    blind = [node.name for node in nodes if node.local_rank == 0 and node.sees is None]
    if blind and not trouble:
        yield (
            f"run_dir: {run_dir.absolute()} is not the same directory on {', '.join(blind)} as on {nodes[0].name}: "
            f"checkpoints are kept on {nodes[0].name}, and sent to the others when the run is resumed; logs stay on "
            "each host"
        )


def _clock_offset() -> float:
    """Seconds by which this host's clock is ahead of rank 0's, within the time that ranks take to leave a barrier."""
    offsets = []
    for _ in range(_CLOCK_LOOKS):
        dist.barrier()
        times = _gather(time.time())
        offsets.append(times[dist.get_rank()] - times[0])
    return statistics.median(offsets)


def _look_at_directory(place: Place, run_dir: Path) -> tuple[float | None, float | None, bool, str]:
    """After how many seconds this rank saw a file, and a rename, of rank 0's; whether a lock held; rank 0's trouble.

    Every rank takes part in the same collectives, whatever a disk does.
    """
    with ExitStack() as stack:
        name = trouble = ""
        try:
            if place.rank == 0:
                mark = stack.enter_context(shared_mark(run_dir, "first"))
                fcntl.flock(stack.enter_context(open(mark, encoding="utf-8")), fcntl.LOCK_EX | fcntl.LOCK_NB)
                name = mark.name
        except OSError as error:
            trouble = str(error)
        name, trouble = _tell((name, trouble))
        if trouble:
            return None, None, False, trouble
        mark = run_dir / name
        sees = _seconds_until(lambda: _reads(mark) == "first")
        is_kept_out = place.rank == 0 or sees is None or not _gets_lock(mark)
        _gather(None)  # everybody has looked
        try:
            if place.rank == 0:
                write_mark(mark, "second")
        except OSError as error:
            trouble = str(error)
        trouble = _tell(trouble)
        sees_rename = None if sees is None or trouble else _seconds_until(lambda: _reads(mark) == "second")
        _gather(None)
    return sees, sees_rename, is_kept_out, trouble


def _print(
    nodes: Sequence[Node],
    bandwidth: Bandwidth | None,
    problems: Sequence[str],
    warnings: Sequence[str],
    has_looked: bool,
) -> None:
    from rich.console import Console

    console = Console(soft_wrap=True, highlight=False, markup=False)
    rows = [("host", "ranks", "device", "interface", "clock", "run_dir", "rename", "lock"), *_rows(nodes, has_looked)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    for row in rows:
        console.print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
    console.print(", ".join(f"{name} {version}" for name, version in nodes[0].versions.items()))
    if bandwidth:
        console.print(f"all-reduce: {bandwidth}")
    for warning in warnings:
        console.print(f"warning: {warning}", style="yellow")
    for problem in problems:
        console.print(f"failed: {problem}", style="bold red")
    if not problems:
        console.print("these hosts can train together", style="green")


def _rows(nodes: Sequence[Node], has_looked: bool) -> Iterator[tuple[str, ...]]:
    for name in dict.fromkeys(node.name for node in nodes):
        here = [node for node in nodes if node.name == name]
        head = here[0]
        ranks = f"{here[0].rank}-{here[-1].rank}" if len(here) > 1 else str(head.rank)
        directory = (
            "not shared" if head.sees is None else f"seen after {head.sees:.2f} s",
            "not seen" if head.sees_rename is None else f"seen after {head.sees_rename:.2f} s",
            "?" if head.sees is None else "holds" if head.is_kept_out else "does not hold",
        )
        seen = directory if has_looked else ("?",) * len(directory)
        yield name, ranks, f"{len(here)} x {head.device}", head.interface, f"{head.clock:+.3f} s", *seen


def _gather(value: T) -> list[T]:
    """The value of every rank."""
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, value)
    return everyone


def _tell(value: Any) -> Any:
    """Rank 0's value, on all ranks."""
    said = [value]
    dist.broadcast_object_list(said, src=0)
    return said[0]


def _seconds_until(condition: Callable[[], bool]) -> float | None:
    started = time.monotonic()
    while time.monotonic() - started < _SEEN_SECONDS:
        if condition():
            return time.monotonic() - started
        time.sleep(_POLL_SECONDS)
    return None


def _reads(path: Path) -> str | None:
    with suppress(OSError):
        return path.read_text(encoding="utf-8")
    return None


def _gets_lock(path: Path) -> bool:
    try:
        with open(path, encoding="utf-8") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


if __name__ == "__main__":
    sys.exit(main())
