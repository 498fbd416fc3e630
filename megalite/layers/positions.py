"""What tells a model where a token stands: a learned table, fixed sinusoids, or rotations of queries and keys.

The fixed ones are computed from the positions in every forward pass: a few thousand numbers, and no buffer that could
be left on the meta device or rounded to bf16. Angles are taken in float64, since in fp32 an angle of 100,000 radians is
off by up to a hundredth.

Legend: B batch, S sequence, D hidden size, H heads, K head size.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megalite.config.schema import RotaryScalingConfig
from megalite.layers.shard import Init, Shard, make_parameter
from megalite.mesh import Axis


class LearnedPositions(nn.Module):
    """y = P[positions], with a table of one row a position; replicated.

    Shapes: positions_S -> (S, D), and with a batch before S likewise, as in all of this room.
    """

    def __init__(self, max_sequence_length: int, hidden_size: int, axis: Axis, init: Init) -> None:
        super().__init__()
        self.weight = make_parameter(Shard((max_sequence_length, hidden_size)), init, axis)

    def forward(self, positions_S: Tensor) -> Tensor:
        """See the class. Positions behind the table, where a sequence was padded, get its last row."""
        return F.embedding(positions_S.clamp(max=self.weight.shape[0] - 1), self.weight)

    def extra_repr(self) -> str:
        """Size."""
        return " x ".join(str(size) for size in self.weight.shape)


def sinusoids(positions_S: Tensor, hidden_size: int, dtype: torch.dtype) -> Tensor:
    """sin and cos of position / 10000^(2i/D), at columns 2i and 2i+1 (Vaswani et al. 2017, section 3.5).

    Shapes: positions_S -> (S, D) in `dtype`. `hidden_size` is even.
    """
    angles = positions_S.double()[..., None] * _frequencies(hidden_size, 10000.0, positions_S.device)
    return torch.stack([angles.sin(), angles.cos()], dim=-1).flatten(-2).to(dtype)


def rotary_tables(
    positions_S: Tensor, head_size: int, base: float, scaling: RotaryScalingConfig | None, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """cos and sin of position * frequency_i, frequency_i = base^(-2i/K) for i < K/2 (Su et al. 2021).

    Shapes: positions_S -> two tensors (S, K/2), for a model in `dtype`, but at least in fp32. `head_size` is even.
    """
    frequencies, scale = _frequencies(head_size, base, positions_S.device), 1.0
    if scaling is not None:
        frequencies, scale = _scaled(frequencies, base, scaling)
    angles = positions_S.double()[..., None] * frequencies
    table_dtype = torch.promote_types(dtype, torch.float32)
    return (scale * angles.cos()).to(table_dtype), (scale * angles.sin()).to(table_dtype)


def apply_rotary(x_BSHK: Tensor, cos_SK: Tensor, sin_SK: Tensor) -> Tensor:
    """Rotate the pairs (x_i, x_{i + K/2}) by their angle: the two-halves layout of GPT-NeoX, Llama in transformers.

    Shapes: x_BSHK, tables (S, K/2) or (B, S, K/2) -> (B, S, H, K) in x's dtype; computed in at least fp32.
    """
    cos, sin = cos_SK.unsqueeze(-2), sin_SK.unsqueeze(-2)
    first, second = x_BSHK.to(torch.promote_types(x_BSHK.dtype, torch.float32)).chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1).to(x_BSHK.dtype)


def _frequencies(size: int, base: float, device: torch.device) -> Tensor:
    exponents = torch.arange(0, size, 2, device=device, dtype=torch.float64) / size
    return torch.pow(base, -exponents)


def ntk_base(base: float, factor: float, head_size: int) -> float:
    """The base with which the slowest rotation of a head is slower by `factor` and the fastest the same."""
    return base * factor ** (head_size / (head_size - 2))


def _scaled(frequencies: Tensor, base: float, scaling: RotaryScalingConfig) -> tuple[Tensor, float]:
    """Frequencies for sequences `factor` times as long as those first trained on, and what cos and sin are scaled by.

    linear: position / factor (Chen et al. 2023). ntk: the base grows so that the slowest rotation is slowed by `factor`
    and the fastest kept (bloc97 2023, "NTK-aware"). yarn: `factor` for slow rotations, none for fast ones, a ramp
    between those that turn `beta_slow` and `beta_fast` times over the original length; attention is sharpened by the
    scale 1 + 0.1 ln(factor) of cos and sin (Peng et al. 2023). llama3: see `_llama3_scaled`.
    """
    half, factor = len(frequencies), scaling.factor
    match scaling.method:
        case "linear":
            return frequencies / factor, 1.0
        case "ntk":
            return _frequencies(2 * half, ntk_base(base, factor, 2 * half), frequencies.device), 1.0
        case "yarn":
            low, high = (
                half * math.log(scaling.original_max_sequence_length / (2 * math.pi * turns)) / math.log(base)
                for turns in (scaling.beta_fast, scaling.beta_slow)
            )
            low, high = max(math.floor(low), 0), min(math.ceil(high), 2 * half - 1)
            steps = torch.arange(half, dtype=frequencies.dtype, device=frequencies.device)
            slowed = ((steps - low) / max(high - low, 1e-3)).clamp(0.0, 1.0)
            return frequencies * (1.0 - slowed) + frequencies / factor * slowed, 1.0 + 0.1 * math.log(max(factor, 1.0))
        case "llama3":
            return _llama3_scaled(frequencies, scaling), 1.0


def _llama3_scaled(frequencies: Tensor, scaling: RotaryScalingConfig) -> Tensor:
    """Llama 3.1's stretch to long contexts: slow rotations are slowed by `factor`, fast ones kept, a ramp in between.

    Constants and ramp as in Meta's reference code (`apply_scaling` in meta-llama/llama-models).
    """
    turns = scaling.original_max_sequence_length * frequencies / (2 * math.pi)  # over the original context
    ramp = (turns - scaling.low_frequency_factor) / (scaling.high_frequency_factor - scaling.low_frequency_factor)
    kept = ramp.clamp(0.0, 1.0)
    return frequencies * kept + frequencies / scaling.factor * (1.0 - kept)
