"""The device mesh: which rank stands where on which axis, and the process group of each axis.

Ranks are numbered with the last axis innermost, so a tensor-parallel group is a run of consecutive ranks: on one host,
over its fastest links. The order of axes, outermost first: data, context, tensor. Further axes (pipeline, expert) join
the list in `build_mesh`; nothing else here knows how many there are.
"""

import itertools
import math
from dataclasses import dataclass

import torch
import torch.distributed as dist

from megalite.config.schema import ContextMethod, ParallelConfig
from megalite.config.validate_layout import divisors
from megalite.errors import ConfigError


@dataclass(frozen=True)
class Axis:
    """One axis of the mesh as this rank sees it.

    `rank` counts along the axis, 0 <= rank < size. `group` holds the ranks that differ from this one on this axis
    alone; it is None only where torch.distributed is not initialised. `sequence`, for the tensor axis: between the
    split layers each rank holds its part of the sequence (sequence parallelism, Korthikanti et al. 2022) instead of
    all of it.
    """

    name: str
    size: int
    rank: int
    group: dist.ProcessGroup | None
    sequence: bool = False

    @property
    def group_name(self) -> str:
        """The name under which functional collectives look the group up."""
        assert self.group is not None, f"axis {self.name}: no process group; torch.distributed was not initialised"
        return self.group.group_name


@dataclass(frozen=True)
class Mesh:
    """All axes, outermost first, and this process's place: global rank, world size, device.

    `replica` is data and context together: the ranks that hold the same parameters and different tokens. ZeRO shards
    over it, and gradients, losses and token counts are summed over it.
    """

    axes: tuple[Axis, ...]
    replica: Axis
    rank: int
    world_size: int
    device: torch.device
    context_method: ContextMethod = "auto"

    def axis(self, name: str) -> Axis:
        """The axis called `name`; KeyError if the mesh has none."""
        for axis in self.axes:
            if axis.name == name:
                return axis
        raise KeyError(f"no axis {name!r}; this mesh has {', '.join(axis.name for axis in self.axes)}")

    @property
    def tensor(self) -> Axis:
        """Ranks that hold different shards of the same layers and see the same data."""
        return self.axis("tensor")

    @property
    def context(self) -> Axis:
        """Ranks that hold the same shards and see different parts of the same sequences."""
        return self.axis("context")

    @property
    def data(self) -> Axis:
        """Ranks that hold the same shards and see different sequences."""
        return self.axis("data")

    @property
    def world(self) -> Axis:
        """All ranks: what they must agree on."""
        return Axis("world", self.world_size, self.rank, dist.group.WORLD if self.axes[0].group else None)

    @property
    def mpu(self) -> "Mpu":
        """The mesh under the method names that `deepspeed.initialize(mpu=...)` calls."""
        return Mpu(self)


class Mpu:
    """A model-parallel unit for DeepSpeed 0.19: exactly the getters that it calls.

    It has no sequence-parallel getters: an mpu that can initialise sequence parallelism makes ZeRO drop its own groups.
    """

    def __init__(self, mesh: Mesh) -> None:
        self._mesh = mesh

    def get_model_parallel_rank(self) -> int:
        """Rank among the ranks that hold one replica; the tensor axis, until there is a pipeline axis."""
        return self._mesh.tensor.rank

    def get_model_parallel_group(self) -> dist.ProcessGroup | None:
        """Group of the ranks that hold one replica."""
        return self._mesh.tensor.group

    def get_model_parallel_world_size(self) -> int:
        """Number of ranks that hold one replica."""
        return self._mesh.tensor.size

    def get_tensor_model_parallel_rank(self) -> int:
        """Rank on the tensor axis."""
        return self._mesh.tensor.rank

    def get_tensor_model_parallel_group(self) -> dist.ProcessGroup | None:
        """Group of the tensor axis."""
        return self._mesh.tensor.group

    def get_tensor_model_parallel_world_size(self) -> int:
        """Size of the tensor axis."""
        return self._mesh.tensor.size

    def get_data_parallel_rank(self) -> int:
        """Rank on the axis that ZeRO shards over."""
        return self._mesh.replica.rank

    def get_data_parallel_group(self) -> dist.ProcessGroup | None:
        """Group that ZeRO shards and averages over."""
        return self._mesh.replica.group

    def get_data_parallel_world_size(self) -> int:
        """Size of the axis that ZeRO shards over."""
        return self._mesh.replica.size

    def get_data_parallel_group_ranks(self) -> list[int]:
        """Global ranks of the data-parallel group."""
        group = self._mesh.replica.group
        return [self._mesh.rank] if group is None else dist.get_process_group_ranks(group)


def build_mesh(parallel: ParallelConfig, device: torch.device) -> Mesh:
    """The mesh of this process; makes one process group an axis, of size-1 axes too.

    Collective: every rank calls it, in the same order as its other calls that make groups. Without torch.distributed it
    is a world of one, without groups. Raises `ConfigError` if the world does not divide into the axes.
    """
    rank, world_size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    inner = {"context": parallel.context, "tensor": parallel.tensor}
    shared = math.prod(inner.values())
    if shared < 1 or world_size % shared != 0:
        raise ConfigError(
            f"parallel.tensor={parallel.tensor} x parallel.context={parallel.context}: {world_size} ranks cannot be "
            f"divided into groups of {shared}. Make the product a divisor of the number of ranks "
            f"({divisors(world_size)}), or change launch.nproc_per_node."
        )
    sizes = {"data": world_size // shared} | inner
    names = list(sizes)

    def new_axis(name: str, *parts: str) -> Axis:
        lines = axis_lines(tuple(sizes.values()), tuple(names.index(part) for part in parts))
        line = next(line for line in lines if rank in line)
        sequence = name == "tensor" and len(line) > 1 and parallel.sequence
        return Axis(name, len(line), line.index(rank), _new_group(lines, rank), sequence)

    axes = tuple(new_axis(name, name) for name in names)
    replica = new_axis("replica", "data", "context") if parallel.context > 1 else axes[0]
    return Mesh(axes, replica, rank, world_size, device, parallel.context_method)


def single_mesh(device: torch.device) -> Mesh:
    """A world of one, without process groups, whatever torch.distributed says: to count or convert a whole model."""
    axes = tuple(Axis(name=name, size=1, rank=0, group=None) for name in ("data", "context", "tensor"))
    return Mesh(axes=axes, replica=axes[0], rank=0, world_size=1, device=device)


def axis_lines(sizes: tuple[int, ...], axes: tuple[int, ...]) -> list[list[int]]:
    """The groups of one axis, or of several together, as lists of global ranks, for a mesh of `sizes`, outermost first.

    >>> axis_lines((2, 3), (1,))
    [[0, 1, 2], [3, 4, 5]]
    >>> axis_lines((2, 3), (0,))
    [[0, 3], [1, 4], [2, 5]]
    >>> axis_lines((2, 1, 2), (0, 1))
    [[0, 2], [1, 3]]
    """
    ranks = list(itertools.product(*(range(size) for size in sizes)))  # places, in the order of global ranks
    lines: dict[tuple[int, ...], list[int]] = {}
    for rank, place in enumerate(ranks):
        others = tuple(number for axis, number in enumerate(place) if axis not in axes)
        lines.setdefault(others, []).append(rank)
    return list(lines.values())


def _new_group(lines: list[list[int]], rank: int) -> dist.ProcessGroup | None:
    if not dist.is_initialized():
        return None
    # torch.distributed wants every rank to make every group, in the same order, also those it does not belong to.
    groups = [dist.new_group(line) for line in lines]
    return next(group for line, group in zip(lines, groups, strict=True) if rank in line)
