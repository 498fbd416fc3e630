"""How a parameter is split over the tensor axis, and what it is at the start: carried by the parameter itself.

A parameter has one *logical* tensor, the same for every layout: what checkpoints hold, what is initialised, what other
programs read. Each tensor rank holds its slice of it, in places padded with zeros.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from megalite.mesh import Axis


@dataclass(frozen=True)
class Shard:
    """The map between a logical tensor and the local ones.

    `shape` is the logical shape, without padding. `dim` is split over the tensor axis; None: every rank holds it all.
    `parts` are consecutive pieces along `dim`, each split by itself: a fused (query, key, value) gives every rank its
    heads of each. Each part is padded with zeros to a multiple of `multiple` and of the axis size.
    """

    shape: tuple[int, ...]
    dim: int | None = None
    parts: tuple[int, ...] = ()
    multiple: int = 1

    def __post_init__(self) -> None:
        assert self.dim is None or sum(self.parts) == self.shape[self.dim], f"parts do not add up: {self}"

    def local_shape(self, size: int) -> tuple[int, ...]:
        """Shape of each rank's tensor on an axis of `size`."""
        if self.dim is None:
            return self.shape
        local = list(self.shape)
        local[self.dim] = sum(self._local_part(part, size) for part in self.parts)
        return tuple(local)

    def slice(self, full: Tensor, rank: int, size: int) -> Tensor:
        """What `rank` of `size` holds of the logical tensor `full`: a contiguous tensor, `full` itself if it is all."""
        if self.local_shape(size) == self.shape == tuple(full.shape):
            return full.contiguous()
        local = full.new_zeros(self.local_shape(size))
        self.slice_into(local, full, rank, size)
        return local

    def slice_into(self, local: Tensor, full: Tensor, rank: int, size: int) -> None:
        """Copy what `rank` of `size` holds of `full` into `local`, and leave the padding as it is."""
        assert tuple(full.shape) == self.shape, f"expected the logical shape {self.shape}, found {tuple(full.shape)}"
        assert tuple(local.shape) == self.local_shape(size), f"{tuple(local.shape)} is not a rank's shape"
        if self.dim is None:
            local.copy_(full)
            return
        source = target = 0
        for part in self.parts:
            width = self._local_part(part, size)
            start = min(rank * width, part)
            count = min(width, part - start)  # fewer or none where padding begins
            local.narrow(self.dim, target, count).copy_(full.narrow(self.dim, source + start, count))
            source, target = source + part, target + width

    def gather(self, locals_: Sequence[Tensor]) -> Tensor:
        """The logical tensor from every rank's local one, in rank order; the inverse of `slice`."""
        if self.dim is None:
            return locals_[0]
        pieces, start = [], 0
        for part in self.parts:
            width = self._local_part(part, len(locals_))
            whole = torch.cat([local.narrow(self.dim, start, width) for local in locals_], dim=self.dim)
            pieces.append(whole.narrow(self.dim, 0, part))
            start += width
        return torch.cat(pieces, dim=self.dim)

    def _local_part(self, part: int, size: int) -> int:
        padded = -(-part // self.multiple) * self.multiple
        return -(-padded // size)


@dataclass(frozen=True)
class Init:
    """Initial values: normal with mean 0 and this `std`; zeros where it is 0."""

    std: float = 0.0


def make_parameter(shard: Shard, init: Init, axis: Axis) -> nn.Parameter:
    """A parameter on the meta device (no storage yet) with this rank's shape, carrying `shard` and `init`.

    A split one also carries `tensor_model_parallel = True`, by which DeepSpeed counts each element once in norms.
    """
    parameter = nn.Parameter(torch.empty(shard.local_shape(axis.size), device="meta"))
    parameter.shard = shard  # type: ignore[attr-defined]
    parameter.init = init  # type: ignore[attr-defined]
    if shard.dim is not None:
        parameter.tensor_model_parallel = True  # type: ignore[attr-defined]
    return parameter


def shard_of(parameter: nn.Parameter) -> Shard:
    """How `parameter` is split, as `make_parameter` noted it."""
    return parameter.shard  # type: ignore[attr-defined]


def init_of(parameter: nn.Parameter) -> Init:
    """What `parameter` is at the start, as `make_parameter` noted it."""
    return parameter.init  # type: ignore[attr-defined]


def replace_parameter(module: nn.Module, name: str, value: Tensor) -> nn.Parameter:
    """Put `value` in the place of the parameter `module.<name>`, with all that the old one carried."""
    old = module._parameters[name]
    assert old is not None, f"no parameter {name}"
    assert old.shape == value.shape, f"{name}: {tuple(value.shape)} in the place of {tuple(old.shape)}"
    new = nn.Parameter(value, requires_grad=old.requires_grad)
    new.__dict__.update(old.__dict__)
    module.register_parameter(name, new)
    return new
