"""Causal self-attention on the heads of one tensor rank.

Legend: B batch, S new tokens, T tokens attended to, D hidden size, H query heads, G key and value heads, K head size.
"""

from functools import partial

from torch import Tensor, nn

from megalite.config.schema import ModelConfig
from megalite.layers.attend import attend
from megalite.layers.cache import KVCache
from megalite.layers.context import Context
from megalite.layers.linear import ColumnParallelLinear, RowParallelLinear
from megalite.layers.norm import RMSNorm
from megalite.layers.positions import apply_rotary
from megalite.layers.shard import Init
from megalite.mesh import Axis


class Attention(nn.Module):
    """Y = concat over heads of softmax(Q K^T / sqrt(K) + mask) V, projected back; heads are split over ranks.

    One fused matrix gives queries, keys and values; with fewer key heads than query heads, each serves H / G
    consecutive query heads (grouped-query attention, Ainslie et al. 2023). With `qk_norm` each head's queries and keys
    are normalised before the rotation (Henry et al. 2020, as in Qwen 3).

    Shapes: x_BSD, equal on all ranks or parts of the sequence -> (B, S, D), likewise.
    Communication: that of its two linear layers, and that of `context` where ranks share a sequence (the S tokens are
    then those of this rank); backward one all-reduce for each norm of `qk_norm`.
    Dropout on the attention weights draws from torch's default generator (see `rng.seed_attention_stream`).
    """

    def __init__(
        self, config: ModelConfig, axis: Axis, init: Init, output_init: Init, context: Context | None = None
    ) -> None:
        super().__init__()
        heads, kv_heads, size = config.num_attention_heads, config.num_kv_heads, config.head_dim
        assert heads % kv_heads == 0, f"{heads} heads do not share {kv_heads} evenly"
        assert kv_heads % axis.size == 0, f"{kv_heads} heads do not split over {axis.size} ranks"
        self.num_heads, self.num_kv_heads, self.head_size = heads, kv_heads, size
        self.heads_local, self.kv_heads_local = heads // axis.size, kv_heads // axis.size
        self.dropout, self.soft_cap, self.context = config.dropout, config.attention_soft_cap, context
        parts = (heads * size, kv_heads * size, kv_heads * size)
        self.qkv = ColumnParallelLinear(config.hidden_size, parts, config.has_qkv_bias, axis, init)
        self.output = RowParallelLinear(heads * size, config.hidden_size, config.bias, axis, output_init)
        # Every rank normalises its own heads with the same weights.
        norm = partial(RMSNorm, size, config.norm_eps, axis, of_own_heads=True)
        self.q_norm: RMSNorm | None = norm() if config.qk_norm else None
        self.k_norm: RMSNorm | None = norm() if config.qk_norm else None

    def forward(
        self,
        x_BSD: Tensor,
        rotary: tuple[Tensor, Tensor] | None = None,
        mask_ST: Tensor | None = None,
        cache: KVCache | None = None,
        layer: int = 0,
    ) -> Tensor:
        """See the class.

        `rotary`: cos and sin of the S positions; `mask_ST`: see `attention_mask`; `cache`: holds `layer`'s earlier keys
        and values.
        """
        q_BSHK, k_BSGK, v_BSGK = self._heads(self.qkv(x_BSD))
        if self.q_norm is not None and self.k_norm is not None:
            q_BSHK, k_BSGK = self.q_norm(q_BSHK), self.k_norm(k_BSGK)
        if rotary is not None:
            q_BSHK, k_BSGK = apply_rotary(q_BSHK, *rotary), apply_rotary(k_BSGK, *rotary)
        if cache is not None:
            k_BSGK, v_BSGK = cache.update(layer, k_BSGK, v_BSGK)
        dropout = self.dropout if self.training else 0.0
        alone = partial(attend, mask_ST=mask_ST, dropout=dropout, soft_cap=self.soft_cap)
        if self.context is None:
            y_BSHK = alone(q_BSHK, k_BSGK, v_BSGK)
        else:
            y_BSHK = self.context.attend(q_BSHK, k_BSGK, v_BSGK, alone, mask_ST)
        return self.output(y_BSHK.flatten(2))

    def _heads(self, qkv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Cut the fused projection into this rank's heads."""
        q_width, kv_width = self.heads_local * self.head_size, self.kv_heads_local * self.head_size
        q, k, v = qkv.split([q_width, kv_width, kv_width], dim=-1)
        shape = (*qkv.shape[:2], -1, self.head_size)
        return q.reshape(shape), k.reshape(shape), v.reshape(shape)

    def extra_repr(self) -> str:
        """Unsharded counts."""
        return f"{self.num_heads} heads, {self.num_kv_heads} key and value heads, head size {self.head_size}"
