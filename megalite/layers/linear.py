"""Linear layers whose weight is split over the tensor axis (Shoeybi et al. 2019, section 3).

A column-parallel layer followed by a row-parallel one needs one all-reduce forward and one backward, or their halves:
the first leaves its output split, the second takes it so.
"""

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from megalite.layers.region import column_linear, replicated, sum_partial
from megalite.layers.shard import Init, Shard, make_parameter
from megalite.mesh import Axis


class ColumnParallelLinear(nn.Module):
    """Y = X A^T + b with the rows of A (outputs) split: rank i computes Y_i = X A_i^T + b_i.

    `parts` are the sizes of the outputs fused into one matrix, e.g. (query, key, value): each is split by itself, so
    that a rank's output is its share of each, side by side.

    Shapes: x_BSD, equal on all ranks or parts of the sequence -> (B, S, sum(parts) / size), split.
    Communication: see `region.column_linear`.
    """

    def __init__(self, inputs: int, parts: Sequence[int], bias: bool, axis: Axis, init: Init) -> None:
        super().__init__()
        self.inputs, self.parts, self.axis = inputs, tuple(parts), axis
        assert all(part % axis.size == 0 for part in parts), f"{parts} do not split over {axis.size} ranks"
        outputs = sum(parts)
        self.weight = make_parameter(Shard((outputs, inputs), 0, self.parts), init, axis)
        self.bias = make_parameter(Shard((outputs,), 0, self.parts), Init(), axis) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        """See the class."""
        return column_linear(x, self.weight, self.bias, self.axis)

    def extra_repr(self) -> str:
        """Unsharded size and this rank's place."""
        parts = "+".join(str(part) for part in self.parts)
        return f"{self.inputs} -> {parts}, bias={self.bias is not None}, rank {self.axis.rank} of {self.axis.size}"


class RowParallelLinear(nn.Module):
    """Y = X A^T + b with the columns of A (inputs) split: Y = sum over i of X_i A_i^T, plus b once, after the sum.

    Shapes: x (B, S, inputs / size), split -> (B, S, outputs), equal on all ranks or parts of the sequence.
    Communication: see `region.sum_partial`.
    """

    def __init__(self, inputs: int, outputs: int, bias: bool, axis: Axis, init: Init) -> None:
        super().__init__()
        self.inputs, self.outputs, self.axis = inputs, outputs, axis
        assert inputs % axis.size == 0, f"{inputs} inputs do not split over {axis.size} ranks"
        self.weight = make_parameter(Shard((outputs, inputs), 1, (inputs,)), init, axis)
        self.bias = make_parameter(Shard((outputs,)), Init(), axis) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        """See the class."""
        y = sum_partial(F.linear(x, self.weight), self.axis)
        return y if self.bias is None else y + replicated(self.axis, self.bias, partial=self.axis.sequence)[0]

    def extra_repr(self) -> str:
        """Unsharded size and this rank's place."""
        bias = self.bias is not None
        return f"{self.inputs} -> {self.outputs}, bias={bias}, rank {self.axis.rank} of {self.axis.size}"
