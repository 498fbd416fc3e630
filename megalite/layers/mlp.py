"""The position-wise MLP, its width split over the tensor axis.

Legend: B batch, S sequence, D hidden size.
"""

from collections.abc import Callable
from functools import partial

import torch.nn.functional as F
from torch import Tensor, nn

from megalite.layers.linear import ColumnParallelLinear, RowParallelLinear
from megalite.layers.shard import Init
from megalite.mesh import Axis


def relu_squared(x: Tensor) -> Tensor:
    """max(x, 0)^2 (So et al. 2021, Primer)."""
    return F.relu(x).square()


def swiglu(x: Tensor) -> Tensor:
    """silu(gate) * up, of the two halves of the last dim (Shazeer 2020)."""
    gate, up = x.chunk(2, dim=-1)
    return F.silu(gate) * up


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
    "relu_squared": relu_squared,
    "swiglu": swiglu,
}
GATED = frozenset({"swiglu"})  # these take a gate beside the value: two matrices fused into one


class MLP(nn.Module):
    """Y = act(X A^T + a) B^T + b, with A split by columns and B by rows; a gated activation has (gate, up) as its A.

    Shapes: x_BSD -> (B, S, D), equal on all ranks; with sequence parallelism each rank's own part of S.
    Communication: forward one all-reduce (after B), backward one (before A); with sequence parallelism an all-gather
    (before A) and a reduce-scatter (after B), backward the same the other way round and the gather again.
    """

    def __init__(
        self, hidden_size: int, ffn_size: int, activation: str, bias: bool, axis: Axis, init: Init, output_init: Init
    ) -> None:
        super().__init__()
        self.activation = ACTIVATIONS[activation]
        parts = (ffn_size, ffn_size) if activation in GATED else (ffn_size,)
        self.up = ColumnParallelLinear(hidden_size, parts, bias, axis, init)
        self.down = RowParallelLinear(ffn_size, hidden_size, bias, axis, output_init)

    def forward(self, x_BSD: Tensor) -> Tensor:
        """See the class."""
        return self.down(self.activation(self.up(x_BSD)))
