"""Bugs to plant in the communication, one a rank calls before it runs: each must turn a comparison red."""

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

from megalite import comm
from megalite.layers import linear, norm


def copy_forgets_backward() -> None:
    comm._Copy.backward = staticmethod(lambda ctx, grad: (grad, None))


def reduce_forgets_forward() -> None:
    comm._Reduce.forward = staticmethod(lambda ctx, x, axis: x.clone())


def reduce_sums_backward() -> None:
    def forward(ctx: Any, x: Any, axis: Any) -> Any:
        ctx.axis = axis
        return comm._all_reduce(x, axis, "sum")

    comm._Reduce.forward = staticmethod(forward)
    comm._Reduce.backward = staticmethod(lambda ctx, grad: (comm._all_reduce(grad, ctx.axis, "sum"), None))


def cross_entropy_forgets_sum() -> None:
    honest = comm.all_reduce
    comm.all_reduce = lambda x, axis, op="sum": x if op == "sum" else honest(x, axis, op)


PLANTS: list[Callable[[], None]] = [
    copy_forgets_backward,
    reduce_forgets_forward,
    reduce_sums_backward,
    cross_entropy_forgets_sum,
]


def replicated_forgets_sum() -> None:
    """Norm weights and biases used on parts of the sequence keep each rank's own gradient."""
    for room in (norm, linear):
        room.replicated = lambda axis, *parameters, partial: parameters


def reduce_scatter_forgets_sum() -> None:
    """Forward after a row-parallel layer, backward before a column-parallel one."""

    def own_slice(x: Any, dim: int, size: int, group_name: str) -> Any:
        return x.chunk(size, dim=dim)[dist.get_rank()].contiguous()

    comm.reduce_scatter_in = own_slice


def gather_repeats_own_part() -> None:
    """Parts of the sequence do not travel before a column-parallel layer."""
    comm.all_gather_in = lambda x, dim, size, group_name: torch.cat([x] * size, dim)


SEQUENCE_PLANTS: list[Callable[[], None]] = [
    replicated_forgets_sum,
    reduce_scatter_forgets_sum,
    gather_repeats_own_part,
    cross_entropy_forgets_sum,
]
