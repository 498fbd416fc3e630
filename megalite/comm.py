"""Conjugate collectives over one mesh axis: each knows its own backward.

| function | forward                   | backward                  | used                                          |
|----------|---------------------------|---------------------------|-----------------------------------------------|
| copy     | identity                  | all-reduce (sum)          | before a layer whose columns are split        |
| reduce   | all-reduce (sum)          | identity                  | after a layer whose rows are split            |
| enter    | all-gather along dim      | reduce-scatter along dim  | as copy, from parts of the sequence           |
| leave    | reduce-scatter along dim  | all-gather along dim      | as reduce, to parts of the sequence           |
| gather   | all-gather along dim      | own slice                 | to make replicated what is split              |
| scatter  | own slice along dim       | all-gather along dim      | to split what is replicated                   |
| exchange | all-to-all, split to join | all-to-all, join to split | to split another dim instead                  |

`copy` and `reduce` are f and g of Shoeybi et al. 2019 (Megatron-LM, section 3), `enter` and `leave` are g and its
conjugate of Korthikanti et al. 2022 (section 4.2.2). All are the identity on an axis of size one. They are built from
functional collectives inside `autograd.Function`s with an explicit wait, so that `torch.compile(fullgraph=True)` traces
through them without a break.
"""

import math
from typing import Any

import torch
import torch.distributed._functional_collectives  # registers torch.ops._c10d_functional
from torch import Tensor

from megalite.mesh import Axis

_FunctionCtx = Any  # autograd's context takes any attribute


def copy(x: Tensor, axis: Axis) -> Tensor:
    """Identity; the backward sums the gradient over the axis. `x` must be equal on all its ranks."""
    return x if axis.size == 1 else _Copy.apply(x, axis)


def reduce(x: Tensor, axis: Axis) -> Tensor:
    """Sum of `x` over the axis, on every rank; the backward is the identity."""
    return x if axis.size == 1 else _Reduce.apply(x, axis)


def gather(x: Tensor, axis: Axis, dim: int) -> Tensor:
    """Concatenate every rank's `x` along `dim`, in rank order; the backward keeps this rank's slice.

    The gradient of the result must be equal on all ranks, which it is where everything after it is replicated.
    """
    return x if axis.size == 1 else _Gather.apply(x, axis, dim)


def scatter(x: Tensor, axis: Axis, dim: int) -> Tensor:
    """This rank's slice of a replicated `x` along `dim`; the backward gathers all slices' gradients.

    `x.shape[dim]` must be a multiple of the axis size.
    """
    return x if axis.size == 1 else _Scatter.apply(x, axis, dim)


def enter(x: Tensor, axis: Axis, dim: int) -> Tensor:
    """Concatenate every rank's `x` along `dim`, in rank order; the backward sums over ranks and keeps the own slice.

    The gradient of the result may differ from rank to rank, as it does before a layer whose columns are split.
    """
    return x if axis.size == 1 else _Enter.apply(x, axis, dim)


def leave(x: Tensor, axis: Axis, dim: int) -> Tensor:
    """This rank's slice along `dim` of the sum of `x` over the axis; the backward gathers all slices' gradients.

    `x.shape[dim]` must be a multiple of the axis size.
    """
    return x if axis.size == 1 else _Leave.apply(x, axis, dim)


def exchange(x: Tensor, axis: Axis, split: int, join: int) -> Tensor:
    """Split `x` along dim `split`, give each rank its part, and concatenate what comes along dim `join`, in rank order.

    The backward is the way back. `x.shape[split]` must be a multiple of the axis size.
    """
    return x if axis.size == 1 else _Exchange.apply(x, axis, split, join)


def all_reduce(x: Tensor, axis: Axis, op: str = "sum") -> Tensor:
    """`x` reduced over the axis by `op` (`sum` or `max`), as a new tensor; no gradient flows through it."""
    return x if axis.size == 1 else _all_reduce(x.detach(), axis, op)


def is_any(flag: bool, axis: Axis, device: torch.device) -> bool:
    """Whether `flag` is true on any rank of the axis; waits for the device."""
    return bool(all_reduce(torch.tensor(int(flag), device=device), axis, "max"))


def all_gather(x: Tensor, axis: Axis, dim: int) -> Tensor:
    """Every rank's `x` along `dim`, in rank order; no gradient flows through it."""
    return x if axis.size == 1 else all_gather_in(x, dim, axis.size, axis.group_name)


def reduce_scatter(x: Tensor, axis: Axis, dim: int) -> Tensor:
    """This rank's slice along `dim` of the sum of `x` over the axis; no gradient flows through it."""
    return x if axis.size == 1 else reduce_scatter_in(x, dim, axis.size, axis.group_name)


def all_gather_in(x: Tensor, dim: int, size: int, group_name: str) -> Tensor:
    """`all_gather` in the group of `size` ranks called `group_name`: for operations that cannot be given an `Axis`."""
    dim %= x.ndim
    stacked = _wait(torch.ops._c10d_functional.all_gather_into_tensor(x.contiguous(), size, group_name))
    # The collective stacks along dim 0; any other dim is a re-cut of that, and for a single row only a view.
    if math.prod(x.shape[:dim]) == 1:
        return stacked.view(*x.shape[:dim], size * x.shape[dim], *x.shape[dim + 1 :])
    return torch.cat(stacked.chunk(size, dim=0), dim=dim)


def reduce_scatter_in(x: Tensor, dim: int, size: int, group_name: str) -> Tensor:
    """`reduce_scatter` in the group of `size` ranks called `group_name`."""
    dim %= x.ndim
    assert x.shape[dim] % size == 0, f"dim {dim} of {tuple(x.shape)} does not split into {size}"
    shape = (*x.shape[:dim], x.shape[dim] // size, *x.shape[dim + 1 :])
    stacked = x if math.prod(x.shape[:dim]) == 1 else torch.cat(x.chunk(size, dim=dim), dim=0)
    stacked = stacked.reshape(size * shape[0], *shape[1:]).contiguous()
    return _wait(torch.ops._c10d_functional.reduce_scatter_tensor(stacked, "sum", size, group_name))


def _all_to_all(x: Tensor, axis: Axis, split: int, join: int) -> Tensor:
    assert x.shape[split] % axis.size == 0, f"dim {split} of {tuple(x.shape)} does not split into {axis.size}"
    stacked = torch.stack(x.chunk(axis.size, dim=split))
    sizes = [1] * axis.size
    received = _wait(torch.ops._c10d_functional.all_to_all_single(stacked, sizes, sizes, axis.group_name))
    return torch.cat(received.unbind(), dim=join)


def _all_reduce(x: Tensor, axis: Axis, op: str) -> Tensor:
    return _wait(torch.ops._c10d_functional.all_reduce(x.contiguous(), op, axis.group_name))


def _wait(x: Tensor) -> Tensor:
    return torch.ops._c10d_functional.wait_tensor(x)


def _own_slice(x: Tensor, axis: Axis, dim: int) -> Tensor:
    assert x.shape[dim] % axis.size == 0, f"dim {dim} of {tuple(x.shape)} does not split into {axis.size}"
    return x.chunk(axis.size, dim=dim)[axis.rank].contiguous()


class _Copy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: _FunctionCtx, x: Tensor, axis: Axis) -> Tensor:
        ctx.axis = axis
        return x.view_as(x)

    @staticmethod
    def backward(ctx: _FunctionCtx, grad: Tensor) -> tuple[Tensor, None]:
        return _all_reduce(grad, ctx.axis, "sum"), None


class _Reduce(torch.autograd.Function):
    @staticmethod
    def forward(ctx: _FunctionCtx, x: Tensor, axis: Axis) -> Tensor:
        return _all_reduce(x, axis, "sum")

    @staticmethod
    def backward(ctx: _FunctionCtx, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: _FunctionCtx, x: Tensor, axis: Axis, dim: int) -> Tensor:
        ctx.axis, ctx.dim = axis, dim
        return all_gather(x, axis, dim)

    @staticmethod
    def backward(ctx: _FunctionCtx, grad: Tensor) -> tuple[Tensor, None, None]:
        return _own_slice(grad, ctx.axis, ctx.dim), None, None


class _Scatter(torch.autograd.Function):
    @staticmethod
    def forward(ctx: _FunctionCtx, x: Tensor, axis: Axis, dim: int) -> Tensor:
        ctx.axis, ctx.dim = axis, dim
        return _own_slice(x, axis, dim)

    @staticmethod
    def backward(ctx: _FunctionCtx, grad: Tensor) -> tuple[Tensor, None, None]:
        return all_gather(grad, ctx.axis, ctx.dim), None, None


class _Enter(torch.autograd.Function):
    @staticmethod
    def forward(ctx: _FunctionCtx, x: Tensor, axis: Axis, dim: int) -> Tensor:
        ctx.axis, ctx.dim = axis, dim
        return all_gather(x, axis, dim)

    @staticmethod
    def backward(ctx: _FunctionCtx, grad: Tensor) -> tuple[Tensor, None, None]:
        return reduce_scatter(grad, ctx.axis, ctx.dim), None, None


class _Leave(torch.autograd.Function):
    @staticmethod
    def forward(ctx: _FunctionCtx, x: Tensor, axis: Axis, dim: int) -> Tensor:
        ctx.axis, ctx.dim = axis, dim
        return reduce_scatter(x, axis, dim)

    @staticmethod
    def backward(ctx: _FunctionCtx, grad: Tensor) -> tuple[Tensor, None, None]:
        return all_gather(grad, ctx.axis, ctx.dim), None, None


class _Exchange(torch.autograd.Function):
    @staticmethod
    def forward(ctx: _FunctionCtx, x: Tensor, axis: Axis, split: int, join: int) -> Tensor:
        ctx.axis, ctx.split, ctx.join = axis, split, join
        return _all_to_all(x, axis, split, join)

    @staticmethod
    def backward(ctx: _FunctionCtx, grad: Tensor) -> tuple[Tensor, None, None, None]:
        return _all_to_all(grad, ctx.axis, ctx.join, ctx.split), None, None, None
