"""Into and out of the layers that are split over the tensor axis, from replicated activations or parts of a sequence.

Between the split layers every rank holds either all of an activation, or, where `axis.sequence` says so, its part of
the sequence: norms, dropout and residuals then cost 1/t of the memory and the time, and the same bytes travel as before
(Korthikanti et al. 2022, section 4.2.2).

| from             | `column_linear`, forward / backward         | `sum_partial`, forward / backward |
|------------------|---------------------------------------------|-----------------------------------|
| replicated       | - / all-reduce                              | all-reduce / -                    |
| sequence parts   | all-gather / reduce-scatter and all-gather  | reduce-scatter / all-gather       |

The second all-gather is what it costs to keep only the own part of a layer's input for the backward pass.

Legend: B batch, S sequence, D hidden size.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from megalite import comm
from megalite.mesh import Axis

SEQUENCE_DIM = 1  # of x_BSD


def column_linear(x: Tensor, weight: Tensor, bias: Tensor | None, axis: Axis) -> Tensor:
    """X A^T + b with this rank's rows of A, for the whole sequence: (B, S, inputs) -> (B, S, outputs / size).

    `x` is replicated, or this rank's part of the sequence, (B, S / size, inputs), where `axis.sequence`.
    """
    if axis.sequence:
        return _gathered_linear(x, weight, bias, axis.size, axis.group_name)
    return F.linear(comm.copy(x, axis), weight, bias)


def sum_partial(x_BSD: Tensor, axis: Axis) -> Tensor:
    """The sum of every rank's `x_BSD`: all of it on each, or its part of the sequence where `axis.sequence`."""
    return comm.leave(x_BSD, axis, SEQUENCE_DIM) if axis.sequence else comm.reduce(x_BSD, axis)


def own_part(x_SD: Tensor, axis: Axis) -> Tensor:
    """Of something replicated, (S, D) or (B, S, D), what goes with this rank's part of the sequence."""
    return comm.scatter(x_SD, axis, x_SD.ndim - 2) if axis.sequence else x_SD


def replicated(axis: Axis, *parameters: Tensor, partial: bool) -> tuple[Tensor, ...]:
    """Replicated vectors of one size, about to be used.

    `partial`: on a part of the sequence or of the heads, so that each rank finds a part of their gradient. It is summed
    over the axis here, inside autograd, so that ZeRO 2 and 3, which take gradients as they come, see whole ones. One
    all-reduce for all of them.
    """
    if not partial or axis.size == 1:
        return parameters
    return comm.copy(torch.stack(parameters), axis).unbind()


# One operation to autograd, so that it keeps the part of the input and not the whole, and to selective recomputation,
# which keeps its output and repeats nothing of it.
@torch.library.custom_op("megalite::gathered_linear", mutates_args=())
def _gathered_linear(x: Tensor, weight: Tensor, bias: Tensor | None, size: int, group_name: str) -> Tensor:
    return F.linear(comm.all_gather_in(x, SEQUENCE_DIM, size, group_name), weight, bias)


@_gathered_linear.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor | None, size: int, group_name: str) -> Tensor:
    return x.new_empty(x.shape[0], x.shape[1] * size, weight.shape[0])


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, bias, ctx.size, ctx.group_name = inputs
    ctx.save_for_backward(x, weight)
    ctx.has_bias = bias is not None


def _backward(ctx: Any, grad_BSD: Tensor) -> tuple[Tensor, Tensor, Tensor | None, None, None]:
    x_part, weight = ctx.saved_tensors
    grad_x = comm.reduce_scatter_in(grad_BSD @ weight, SEQUENCE_DIM, ctx.size, ctx.group_name)
    x = comm.all_gather_in(x_part, SEQUENCE_DIM, ctx.size, ctx.group_name)
    grad = grad_BSD.flatten(0, 1)
    grad_bias = grad.sum(0) if ctx.has_bias else None
    return grad_x, grad.t() @ x.flatten(0, 1), grad_bias, None, None


_gathered_linear.register_autograd(_backward, setup_context=_keep)
