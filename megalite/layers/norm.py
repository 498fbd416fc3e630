"""Normalisation over the hidden size; replicated on every tensor rank. Statistics are taken in at least fp32.

Legend: B batch, S sequence, D hidden size.
"""

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor, nn

from megalite.layers.shard import Init, Shard, make_parameter
from megalite.mesh import Axis


class LayerNorm(nn.Module):
    """y = (x - mean(x)) / sqrt(var(x) + eps) * weight + bias (Ba et al. 2016). Shapes: x_BSD -> (B, S, D)."""

    def __init__(self, hidden_size: int, eps: float, axis: Axis) -> None:
        super().__init__()
        self.eps = eps
        self.weight = make_parameter(Shard((hidden_size,)), Init(constant=1.0), axis)
        self.bias = make_parameter(Shard((hidden_size,)), Init(), axis)

    def forward(self, x_BSD: Tensor) -> Tensor:
        """See the class. torch's kernel computes in fp32 whatever the dtype of its input."""
        return F.layer_norm(x_BSD, self.weight.shape, self.weight, self.bias, self.eps)

    def extra_repr(self) -> str:
        """Size."""
        return f"{self.weight.shape[0]}, eps={self.eps}"


class RMSNorm(nn.Module):
    """y = x / sqrt(mean(x^2) + eps) * weight (Zhang and Sennrich 2019). Shapes: x_BSD -> (B, S, D)."""

    def __init__(self, hidden_size: int, eps: float, axis: Axis) -> None:
        super().__init__()
        self.eps = eps
        self.weight = make_parameter(Shard((hidden_size,)), Init(constant=1.0), axis)

    def forward(self, x_BSD: Tensor) -> Tensor:
        """See the class. torch's kernel computes in fp32 whatever the dtype of its input."""
        return F.rms_norm(x_BSD, self.weight.shape, self.weight, self.eps)

    def extra_repr(self) -> str:
        """Size."""
        return f"{self.weight.shape[0]}, eps={self.eps}"


NORMS: dict[str, Callable[[int, float, Axis], nn.Module]] = {"layernorm": LayerNorm, "rmsnorm": RMSNorm}
