"""Normalisation over the hidden size; its parameters are on every tensor rank. Computed in at least fp32, rounded once.

The weight is stored as its distance from one. Around one, bf16 has steps of 1/128, and a weight kept there would not
move for the first dozens of steps of a run (measured: it alone took the loss of a bf16 run 3e-3 from that of fp32,
everything else together 3e-4); around zero the steps are as fine as the updates.

Legend: B batch, S sequence, D hidden size.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megalite.layers.region import replicated
from megalite.layers.shard import Init, Shard, make_parameter
from megalite.mesh import Axis


class LayerNorm(nn.Module):
    """y = (x - mean(x)) / sqrt(var(x) + eps) * (1 + weight_offset) + bias (Ba et al. 2016).

    Shapes: x_BSD -> (B, S, D).
    """

    def __init__(self, hidden_size: int, eps: float, axis: Axis) -> None:
        super().__init__()
        self.eps, self.axis = eps, axis
        self.weight_offset = make_parameter(Shard((hidden_size,)), Init(), axis)
        self.bias = make_parameter(Shard((hidden_size,)), Init(), axis)

    def forward(self, x_BSD: Tensor) -> Tensor:
        """See the class."""
        offset, bias = replicated(self.axis, _wide(self.weight_offset), _wide(self.bias), partial=self.axis.sequence)
        return F.layer_norm(_wide(x_BSD), bias.shape, 1 + offset, bias, self.eps).to(x_BSD.dtype)

    def extra_repr(self) -> str:
        """Size."""
        return f"{self.bias.shape[0]}, eps={self.eps}"


class RMSNorm(nn.Module):
    """y = x / sqrt(mean(x^2) + eps) * (1 + weight_offset) (Zhang and Sennrich 2019), over the last dim.

    Shapes: x_BSD -> (B, S, D). `of_own_heads`: D is a head's size, and each tensor rank has other heads.
    """

    def __init__(self, hidden_size: int, eps: float, axis: Axis, of_own_heads: bool = False) -> None:
        super().__init__()
        self.eps, self.axis, self.of_own_heads = eps, axis, of_own_heads
        self.weight_offset = make_parameter(Shard((hidden_size,)), Init(), axis)

    def forward(self, x_BSD: Tensor) -> Tensor:
        """See the class."""
        (offset,) = replicated(self.axis, _wide(self.weight_offset), partial=self.of_own_heads or self.axis.sequence)
        return F.rms_norm(_wide(x_BSD), offset.shape, 1 + offset, self.eps).to(x_BSD.dtype)

    def extra_repr(self) -> str:
        """Size."""
        return f"{self.weight_offset.shape[0]}, eps={self.eps}"


def _wide(x: Tensor) -> Tensor:
    """In at least fp32: rounded before weight and bias too, a bf16 run ended 2.6e-3 from fp32 instead of 1e-3."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


NORMS: dict[str, Callable[[int, float, Axis], nn.Module]] = {"layernorm": LayerNorm, "rmsnorm": RMSNorm}
