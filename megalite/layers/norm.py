"""Normalisation over the hidden size; replicated on every tensor rank. Statistics are taken in at least fp32.

The weight is stored as its distance from one. Around one, bf16 has steps of 1/128, and a weight kept there would not
move for the first dozens of steps of a run (measured: it alone took the loss of a bf16 run 3e-3 from that of fp32,
everything else together 3e-4); around zero the steps are as fine as the updates.

Legend: B batch, S sequence, D hidden size.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megalite.layers.shard import Init, Shard, make_parameter
from megalite.mesh import Axis


class LayerNorm(nn.Module):
    """y = (x - mean(x)) / sqrt(var(x) + eps) * (1 + weight_offset) + bias (Ba et al. 2016).

    Shapes: x_BSD -> (B, S, D).
    """

    def __init__(self, hidden_size: int, eps: float, axis: Axis) -> None:
        super().__init__()
        self.eps = eps
        self.weight_offset = make_parameter(Shard((hidden_size,)), Init(), axis)
        self.bias = make_parameter(Shard((hidden_size,)), Init(), axis)

    def forward(self, x_BSD: Tensor) -> Tensor:
        """See the class. torch's kernel computes in fp32 whatever the dtype of its input."""
        y_BSD = F.layer_norm(x_BSD, self.bias.shape, eps=self.eps)
        return torch.addcmul(y_BSD + self.bias, y_BSD, self.weight_offset)

    def extra_repr(self) -> str:
        """Size."""
        return f"{self.bias.shape[0]}, eps={self.eps}"


class RMSNorm(nn.Module):
    """y = x / sqrt(mean(x^2) + eps) * (1 + weight_offset) (Zhang and Sennrich 2019). Shapes: x_BSD -> (B, S, D)."""

    def __init__(self, hidden_size: int, eps: float, axis: Axis) -> None:
        super().__init__()
        self.eps = eps
        self.weight_offset = make_parameter(Shard((hidden_size,)), Init(), axis)

    def forward(self, x_BSD: Tensor) -> Tensor:
        """See the class. torch's kernel computes in fp32 whatever the dtype of its input."""
        y_BSD = F.rms_norm(x_BSD, self.weight_offset.shape, eps=self.eps)
        return torch.addcmul(y_BSD, y_BSD, self.weight_offset)

    def extra_repr(self) -> str:
        """Size."""
        return f"{self.weight_offset.shape[0]}, eps={self.eps}"


NORMS: dict[str, Callable[[int, float, Axis], nn.Module]] = {"layernorm": LayerNorm, "rmsnorm": RMSNorm}
