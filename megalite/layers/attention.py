"""Causal self-attention on the heads of one tensor rank.

Legend: B batch, S new tokens, T tokens attended to, D hidden size, H query heads, G key and value heads, K head size.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megalite.layers.cache import KVCache
from megalite.layers.context import Context
from megalite.layers.linear import ColumnParallelLinear, RowParallelLinear
from megalite.layers.positions import apply_rotary
from megalite.layers.shard import Init
from megalite.mesh import Axis


class Attention(nn.Module):
    """Y = concat over heads of softmax(Q K^T / sqrt(K) + causal mask) V, projected back; heads are split over ranks.

    One fused matrix gives queries, keys and values; with fewer key heads than query heads, each serves H / G
    consecutive query heads (grouped-query attention, Ainslie et al. 2023).

    Shapes: x_BSD, equal on all ranks -> (B, S, D), equal on all ranks.
    Communication: that of its two linear layers, and that of `context` where ranks share a sequence (the S tokens are
    then those of this rank).
    Dropout on the attention weights draws from torch's default generator (see `rng.seed_attention_stream`).
    """

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        num_kv_heads: int,
        head_size: int,
        bias: bool,
        dropout: float,
        axis: Axis,
        init: Init,
        output_init: Init,
        context: Context | None = None,
    ) -> None:
        super().__init__()
        assert num_heads % num_kv_heads == 0, f"{num_heads} heads do not share {num_kv_heads} evenly"
        assert num_kv_heads % axis.size == 0, f"{num_kv_heads} heads do not split over {axis.size} ranks"
        self.head_size, self.dropout, self.context = head_size, dropout, context
        self.num_heads, self.num_kv_heads = num_heads, num_kv_heads
        self.heads_local, self.kv_heads_local = num_heads // axis.size, num_kv_heads // axis.size
        parts = (num_heads * head_size, num_kv_heads * head_size, num_kv_heads * head_size)
        self.qkv = ColumnParallelLinear(hidden_size, parts, bias, axis, init)
        self.output = RowParallelLinear(num_heads * head_size, hidden_size, bias, axis, output_init)

    def forward(
        self,
        x_BSD: Tensor,
        rotary: tuple[Tensor, Tensor] | None = None,
        cache: KVCache | None = None,
        layer: int = 0,
    ) -> Tensor:
        """See the class. `rotary`: cos and sin of the S positions; `cache`: holds `layer`'s earlier keys and values."""
        q_BSHK, k_BSGK, v_BSGK = self._heads(self.qkv(x_BSD))
        if rotary is not None:
            q_BSHK, k_BSGK = apply_rotary(q_BSHK, *rotary), apply_rotary(k_BSGK, *rotary)
        if self.context is not None:
            y_BSHK = self.context.attend(q_BSHK, k_BSGK, v_BSGK, self._attend)
        elif cache is not None:
            mask_ST = _mask_behind(cache.length, q_BSHK.shape[1], q_BSHK.device)
            y_BSHK = self._attend(q_BSHK, *cache.update(layer, k_BSGK, v_BSGK), mask_ST)
        else:
            y_BSHK = self._attend(q_BSHK, k_BSGK, v_BSGK)
        return self.output(y_BSHK.flatten(2))

    def _heads(self, qkv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Cut the fused projection into this rank's heads."""
        q_width, kv_width = self.heads_local * self.head_size, self.kv_heads_local * self.head_size
        q, k, v = qkv.split([q_width, kv_width, kv_width], dim=-1)
        shape = (*qkv.shape[:2], -1, self.head_size)
        return q.reshape(shape), k.reshape(shape), v.reshape(shape)

    def _attend(self, q_BSHK: Tensor, k_BTGK: Tensor, v_BTGK: Tensor, mask_ST: Tensor | None = None) -> Tensor:
        shared = self.heads_local // self.kv_heads_local
        grouped = shared > 1
        if grouped and q_BSHK.dtype not in (torch.bfloat16, torch.float16):
            # CUDA's fused kernels take grouped heads in half precision only; the plain one keeps S x T weights.
            k_BTGK, v_BTGK = (t.repeat_interleave(shared, 2) for t in (k_BTGK, v_BTGK))
            grouped = False
        y_BHSK = F.scaled_dot_product_attention(
            q_BSHK.transpose(1, 2),
            k_BTGK.transpose(1, 2),
            v_BTGK.transpose(1, 2),
            attn_mask=mask_ST,
            dropout_p=self.dropout if self.training else 0.0,
            is_causal=mask_ST is None,
            enable_gqa=grouped,
        )
        return y_BHSK.transpose(1, 2)

    def extra_repr(self) -> str:
        """Unsharded counts."""
        return f"{self.num_heads} heads, {self.num_kv_heads} key and value heads, head size {self.head_size}"


def _mask_behind(past: int, new: int, device: torch.device) -> Tensor | None:
    """True where one of `new` tokens may look at one of `past + new`; None where that is plain causal attention."""
    if past == 0:
        return None
    rows_S = torch.arange(past, past + new, device=device)
    return torch.arange(past + new, device=device)[None, :] <= rows_S[:, None]
