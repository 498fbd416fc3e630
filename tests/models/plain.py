"""The decoder once more, in plain torch on whole tensors: what the parallel one is held against.

Imports nothing of ours but the configuration. `weights` are full logical tensors by logical name.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from megalite.config.schema import ModelConfig


def plain_losses(
    weights: dict[str, Tensor], config: ModelConfig, tokens: Tensor, labels: Tensor, end: int | None = None
) -> Tensor:
    logits = plain_logits(weights, config, tokens, end)
    return F.cross_entropy(logits.transpose(1, 2), labels, reduction="none", ignore_index=-100)


def plain_logits(weights: dict[str, Tensor], config: ModelConfig, tokens: Tensor, end: int | None = None) -> Tensor:
    """`end`: the token that ends documents, which are then read one by one, each from position 0."""
    if end is not None:
        return torch.stack([_document_by_document(weights, config, row, end) for row in tokens])
    x = F.embedding(tokens, weights["embedding.tokens.weight"])
    length = tokens.shape[1]
    if config.positions == "learned":
        x = x + weights["embedding.positions.weight"][:length]
    if config.positions == "sinusoidal":
        x = x + plain_sinusoids(length, config.hidden_size, x.dtype)
    for layer in range(config.num_layers):
        prefix = f"blocks.{layer}."
        block_input = x
        x = x + plain_attention(
            weights, prefix + "attention.", config, _norm(weights, prefix + "attention_norm", config, x)
        )
        mlp_input = block_input if config.parallel_residual else x
        x = x + plain_mlp(weights, prefix + "mlp.", config, _norm(weights, prefix + "mlp_norm", config, mlp_input))
    x = _norm(weights, "head.norm", config, x)
    head = "embedding.tokens.weight" if config.tied_embeddings else "head.output.weight"
    return _capped(x @ weights[head].t(), config.logit_soft_cap)


def _document_by_document(weights: dict[str, Tensor], config: ModelConfig, row: Tensor, end: int) -> Tensor:
    cuts = [i + 1 for i, token in enumerate(row.tolist()) if token == end]
    pieces = [piece for piece in row.tensor_split(cuts) if len(piece)]
    return torch.cat([plain_logits(weights, config, piece[None])[0] for piece in pieces])


def plain_attention(weights: dict[str, Tensor], prefix: str, config: ModelConfig, x: Tensor) -> Tensor:
    heads, kv_heads, size = config.num_attention_heads, config.num_kv_heads, config.head_dim
    batch, length, _ = x.shape
    qkv = _linear(weights, prefix + "qkv", x)
    q = qkv[..., : heads * size].reshape(batch, length, heads, size)
    k = qkv[..., heads * size : (heads + kv_heads) * size].reshape(batch, length, kv_heads, size)
    v = qkv[..., (heads + kv_heads) * size :].reshape(batch, length, kv_heads, size)
    if config.qk_norm:
        q, k = (_rms(t, weights[f"{prefix}{name}.weight_offset"], config) for t, name in ((q, "q_norm"), (k, "k_norm")))
    if config.positions == "rotary":
        q, k = plain_rotary(q, config), plain_rotary(k, config)
    outputs = []
    hidden = torch.ones(length, length, dtype=torch.bool).triu(1)
    if config.sliding_window is not None:
        hidden |= torch.ones(length, length, dtype=torch.bool).tril(-config.sliding_window)
    for head in range(heads):
        shared = head // (heads // kv_heads)
        scores = _capped(q[:, :, head] @ k[:, :, shared].transpose(1, 2) / math.sqrt(size), config.attention_soft_cap)
        outputs.append(scores.masked_fill(hidden, -math.inf).softmax(-1) @ v[:, :, shared])
    return _linear(weights, prefix + "output", torch.cat(outputs, dim=-1))


def plain_mlp(weights: dict[str, Tensor], prefix: str, config: ModelConfig, x: Tensor) -> Tensor:
    x = _linear(weights, prefix + "up", x)
    match config.activation:
        case "gelu":
            x = x * 0.5 * (1 + torch.erf(x / math.sqrt(2)))
        case "gelu_tanh":
            x = 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))
        case "relu_squared":
            x = x.clamp(min=0) ** 2
        case "swiglu":
            gate, up = x[..., : config.ffn_size], x[..., config.ffn_size :]
            x = gate * torch.sigmoid(gate) * up
    return _linear(weights, prefix + "down", x)


def plain_rotary(x: Tensor, config: ModelConfig) -> Tensor:
    """Complex numbers (x_i, x_{i + K/2}) turned by position * frequency_i."""
    half = config.head_dim // 2
    frequencies = [config.rotary_base ** (-2 * i / config.head_dim) for i in range(half)]
    scale = 1.0
    if config.rotary_scaling is not None and config.rotary_scaling.method == "llama3":
        frequencies = [_scaled(frequency, config.rotary_scaling) for frequency in frequencies]
    if config.rotary_scaling is not None and config.rotary_scaling.method == "yarn":
        frequencies = [_yarn(i, frequency, config) for i, frequency in enumerate(frequencies)]
        scale = 0.1 * math.log(config.rotary_scaling.factor) + 1
    angles = torch.arange(x.shape[1], dtype=torch.float64)[:, None] * torch.tensor(frequencies, dtype=torch.float64)
    turned = (
        torch.complex(x[..., :half], x[..., half:]) * torch.polar(torch.full_like(angles, scale), angles)[:, None, :]
    )
    return torch.cat([turned.real, turned.imag], dim=-1).to(x.dtype)


def _scaled(frequency: float, scaling) -> float:
    """Llama 3.1's rule by wavelength, as its paper's reference code states it."""
    wavelength = 2 * math.pi / frequency
    low = scaling.original_max_sequence_length / scaling.low_frequency_factor
    high = scaling.original_max_sequence_length / scaling.high_frequency_factor
    if wavelength < high:
        return frequency
    if wavelength > low:
        return frequency / scaling.factor
    smooth = (scaling.original_max_sequence_length / wavelength - scaling.low_frequency_factor) / (
        scaling.high_frequency_factor - scaling.low_frequency_factor
    )
    return (1 - smooth) * frequency / scaling.factor + smooth * frequency


def _yarn(i: int, frequency: float, config: ModelConfig) -> float:
    """YaRN's rule by dimension, with the bounds rounded outwards as its reference code does."""
    scaling, size = config.rotary_scaling, config.head_dim

    def dimension(turns: float) -> float:
        log_turns = math.log(scaling.original_max_sequence_length / (turns * 2 * math.pi))
        return size * log_turns / (2 * math.log(config.rotary_base))

    low = max(math.floor(dimension(scaling.beta_fast)), 0)
    high = min(math.ceil(dimension(scaling.beta_slow)), size - 1)
    ramp = min(max((i - low) / (high - low if high > low else 0.001), 0), 1)
    return frequency / scaling.factor * ramp + frequency * (1 - ramp)


def plain_sinusoids(length: int, width: int, dtype: torch.dtype) -> Tensor:
    table = torch.empty(length, width, dtype=torch.float64)
    for position in range(length):
        for i in range(0, width, 2):
            angle = position / 10000 ** (i / width)
            table[position, i], table[position, i + 1] = math.sin(angle), math.cos(angle)
    return table.to(dtype)


def _norm(weights: dict[str, Tensor], name: str, config: ModelConfig, x: Tensor) -> Tensor:
    if config.norm == "rmsnorm":
        return _rms(x, weights[f"{name}.weight_offset"], config)
    centred = x - x.mean(-1, keepdim=True)
    scaled = centred / (centred.pow(2).mean(-1, keepdim=True) + config.norm_eps).sqrt()
    return scaled * (1 + weights[f"{name}.weight_offset"]) + weights[f"{name}.bias"]


def _rms(x: Tensor, offset: Tensor, config: ModelConfig) -> Tensor:
    return x / (x.pow(2).mean(-1, keepdim=True) + config.norm_eps).sqrt() * (1 + offset)


def _capped(x: Tensor, cap: float | None) -> Tensor:
    return x if cap is None else cap * torch.tanh(x / cap)


def _linear(weights: dict[str, Tensor], name: str, x: Tensor) -> Tensor:
    y = x @ weights[f"{name}.weight"].t()
    return y + weights[f"{name}.bias"] if f"{name}.bias" in weights else y
