"""Keys and values of the tokens read so far, for generation: preallocated, so that a step never grows memory.

Legend: B batch, S new tokens, T all tokens so far, G key and value heads, K head size.
"""

import torch
from torch import Tensor


class KVCache:
    """One pair of tensors (B, max_length, G_local, K) a layer. `length` tokens of it are valid.

    The decoder's blocks write the new tokens' keys and values behind `length` and read all of them back; the decoder
    itself advances `length` once all blocks are done.
    """

    def __init__(
        self, num_layers: int, batch: int, max_length: int, heads_local: int, head_size: int, like: Tensor
    ) -> None:
        shape = (num_layers, batch, max_length, heads_local, head_size)
        self.keys = torch.zeros(shape, dtype=like.dtype, device=like.device)
        self.values = torch.zeros_like(self.keys)
        self.max_length = max_length
        self.length = 0

    def update(self, layer: int, k_BSGK: Tensor, v_BSGK: Tensor) -> tuple[Tensor, Tensor]:
        """Write the new tokens of one layer; returns keys and values of all tokens so far, (B, T, G, K) each."""
        start, end = self.length, self.length + k_BSGK.shape[1]
        assert end <= self.max_length, f"the cache holds {self.max_length} tokens, asked for {end}"
        self.keys[layer, :, start:end] = k_BSGK
        self.values[layer, :, start:end] = v_BSGK
        return self.keys[layer, :, :end], self.values[layer, :, :end]

    def advance(self, tokens: int) -> None:
        """Count `tokens` new tokens as read, after every layer has seen them."""
        self.length += tokens
