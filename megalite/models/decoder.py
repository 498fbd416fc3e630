"""A decoder-only Transformer: GPT-2 or Llama, by configuration. An embedding, a list of blocks, a head.

Legend: B batch, S sequence, D hidden size, V vocabulary, L layers; `key_K`: dropout key of two words (see `rng`).
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megalite import comm, rng
from megalite.config.schema import ModelConfig, Recompute
from megalite.errors import ConfigError
from megalite.layers.attend import attention_mask
from megalite.layers.attention import Attention
from megalite.layers.cache import KVCache
from megalite.layers.context import Context
from megalite.layers.cross_entropy import Target, Vocabulary
from megalite.layers.documents import Documents
from megalite.layers.mlp import MLP
from megalite.layers.norm import NORMS
from megalite.layers.positions import LearnedPositions, rotary_tables, sinusoids
from megalite.layers.region import own_part
from megalite.layers.shard import Init
from megalite.layers.vocab import (
    VocabParallelEmbedding,
    VocabParallelLinear,
    apply_head,
)
from megalite.mesh import Axis
from megalite.models.recompute import run_block

# Streams of dropout inside a block.
_ATTENTION_BRANCH, _MLP_BRANCH = 0, 1


class Embedding(nn.Module):
    """Token embedding, plus positions where they are added (learned, sinusoidal), then dropout.

    (B, S) -> (B, S, D), or the parts of the sequence (see `layers.region`), as in all that follows up to the head.
    """

    def __init__(self, config: ModelConfig, axis: Axis) -> None:
        super().__init__()
        init = Init(std=config.init_std)
        self.kind, self.dropout, self.axis = config.positions, config.dropout, axis
        self.tokens = VocabParallelEmbedding(config.known_vocab_size, config.hidden_size, axis, init)
        learned = config.positions == "learned"
        self.positions = (
            LearnedPositions(config.max_sequence_length, config.hidden_size, axis, init) if learned else None
        )

    def forward(self, tokens_BS: Tensor, positions_S: Tensor, key_K: Tensor | None) -> Tensor:
        """See the class."""
        x_BSD = self.tokens(tokens_BS)
        if self.positions is not None:
            x_BSD = x_BSD + own_part(self.positions(positions_S), self.axis)
        elif self.kind == "sinusoidal":
            x_BSD = x_BSD + own_part(sinusoids(positions_S, x_BSD.shape[-1], x_BSD.dtype), self.axis)
        return x_BSD if key_K is None else rng.dropout(x_BSD, self.dropout, key_K)


class Block(nn.Module):
    """x = x + dropout(attention(norm(x))); x = x + dropout(mlp(norm(x))): pre-norm, (B, S, D) -> (B, S, D).

    With `parallel_residual` x + dropout(attention(norm(x))) + dropout(mlp(norm(x))) (GPT-NeoX, Black et al. 2022).
    `layer` is the block's index in the whole model; logical names carry it.
    """

    def __init__(
        self, config: ModelConfig, axis: Axis, layer: int, recompute: Recompute, context: Context | None
    ) -> None:
        super().__init__()
        self.layer, self.recompute, self.dropout = layer, recompute, config.dropout
        self.parallel_residual = config.parallel_residual
        init = Init(std=config.init_std)
        # GPT-2: what is added to the residual stream 2L times is scaled so that the sum keeps its size.
        output_init = Init(std=config.init_std / math.sqrt(2 * config.num_layers))
        norm = NORMS[config.norm]
        self.attention_norm = norm(config.hidden_size, config.norm_eps, axis)
        self.attention = Attention(config, axis, init, output_init, context)
        self.mlp_norm = norm(config.hidden_size, config.norm_eps, axis)
        self.mlp = MLP(config.hidden_size, config.ffn_size, config.activation, config.bias, axis, init, output_init)

    def forward(
        self,
        x_BSD: Tensor,
        rotary: tuple[Tensor, Tensor] | None = None,
        mask_ST: Tensor | None = None,
        key_K: Tensor | None = None,
        cache: KVCache | None = None,
    ) -> Tensor:
        """See the class. Where a backward pass will follow, recomputes as told."""
        if self.training and cache is None:
            return run_block(self._layers, self.recompute, self.dropout > 0.0, x_BSD, rotary, mask_ST, key_K)
        return self._layers(x_BSD, rotary, mask_ST, key_K, cache)

    def _layers(
        self,
        x_BSD: Tensor,
        rotary: tuple[Tensor, Tensor] | None,
        mask_ST: Tensor | None,
        key_K: Tensor | None,
        cache: KVCache | None = None,
    ) -> Tensor:
        # `self.layer` is read only with a cache: a number that differs by block would make torch.compile start anew.
        layer = 0 if cache is None else self.layer
        branch_BSD = self.attention(self.attention_norm(x_BSD), rotary, mask_ST, cache, layer)
        sum_BSD = x_BSD + self._drop(branch_BSD, key_K, _ATTENTION_BRANCH)
        branch_BSD = self.mlp(self.mlp_norm(x_BSD if self.parallel_residual else sum_BSD))
        return sum_BSD + self._drop(branch_BSD, key_K, _MLP_BRANCH)

    def _drop(self, x_BSD: Tensor, key_K: Tensor | None, stream: int) -> Tensor:
        return x_BSD if key_K is None else rng.dropout(x_BSD, self.dropout, rng.derive(key_K, stream))

    def extra_repr(self) -> str:
        """Place in the whole model."""
        return f"layer {self.layer}, recompute={self.recompute}"


class Head(nn.Module):
    """Final norm, then what `layers.vocab.apply_head` makes of it: logits or a loss."""

    def __init__(self, config: ModelConfig, axis: Axis) -> None:
        super().__init__()
        self.axis, self.vocabulary = axis, Vocabulary(config.known_vocab_size, axis, config.logit_soft_cap)
        self.norm = NORMS[config.norm](config.hidden_size, config.norm_eps, axis)
        init = Init(std=config.init_std)
        tied = config.tied_embeddings
        self.output = None if tied else VocabParallelLinear(self.vocabulary, config.hidden_size, init)

    def forward(self, x_BSD: Tensor, tied_weight: Tensor | None, target: Target | None) -> Tensor:
        """See the class. `tied_weight`: the embedding's, where the head has none of its own."""
        x_BSD = self.norm(x_BSD)
        if self.output is not None:
            return self.output(x_BSD, target)
        assert tied_weight is not None
        return apply_head(x_BSD, tied_weight, self.vocabulary, target)


class Decoder(nn.Module):
    """The whole model, or what one tensor rank holds of it. Built on the meta device; see `materialize`."""

    def __init__(
        self, config: ModelConfig, axis: Axis, recompute: Recompute = "none", context: Context | None = None
    ) -> None:
        super().__init__()
        self.config, self.axis, self.context = config, axis, context
        self.embedding = Embedding(config, axis)
        self.layers = list(range(config.num_layers))  # of the whole model, those held here
        self.blocks = nn.ModuleList(Block(config, axis, layer, recompute, context) for layer in self.layers)
        self.head = Head(config, axis)

    def forward(
        self,
        tokens_BS: Tensor,
        target: Target | None = None,
        dropout_key: Tensor | None = None,
        cache: KVCache | None = None,
        documents: Documents | None = None,
    ) -> Tensor:
        """A loss where there is a target, else logits.

        With a `target` (labels: the token that follows each): losses_BS, or their weighted sum, in nats and at least
        fp32. Without: logits_BSV over the unpadded vocabulary, in the parameters' dtype, equal on all tensor ranks.

        Where ranks share sequences (`context`) the S tokens are those that `positions` names, and losses are of them.
        `dropout_key` comes from `rng.micro_batch_key` and is needed in training mode if `model.dropout` is not 0, with
        `rng.seed_attention_stream` called before; in evaluation mode nothing is dropped. With a `cache` the tokens
        continue those it holds, and it is advanced. `documents` are those of whole sequences, with a cache of all
        tokens so far.
        """
        whole = not self.axis.sequence and self.context is None
        assert cache is None or whole, "a cache holds whole sequences"
        start, length = 0 if cache is None else cache.length, tokens_BS.shape[1]
        self._check_length((start + length) * (1 if self.context is None else self.context.axis.size))
        tokens_BS, target, documents = self._padded(tokens_BS, target, documents)
        places_S = start + self.positions(tokens_BS.shape[1], tokens_BS.device)
        positions_S = documents.positions_of(places_S) if documents else places_S
        keys = self._dropout_keys(dropout_key)
        x_BSD = self.embedding(tokens_BS, positions_S, keys[-1])
        rotary = self._rotary(positions_S, x_BSD.dtype)
        mask_ST = self._mask(start, places_S, documents)
        for block, key_K in zip(self.blocks, keys[:-1], strict=True):
            x_BSD = block(x_BSD, rotary, mask_ST, key_K, cache)
        if cache is not None:
            cache.advance(length)
        # Read through the embedding in every forward: ZeRO 3 gathers a parameter where it sees it being read.
        tied_weight = self.embedding.tokens.weight if self.config.tied_embeddings else None
        y = self.head(x_BSD, tied_weight, target)
        if target is None:
            return comm.gather(y, self.axis, dim=-1)[:, :length, : self.config.known_vocab_size]
        return y if y.ndim == 0 else y[:, :length]

    def positions(self, length: int, device: torch.device) -> Tensor:
        """Which tokens of a sequence this rank holds when it holds `length` of them, int64."""
        if self.context is None:
            return torch.arange(length, device=device)
        return self.context.positions(length * self.context.axis.size, device)

    def _mask(self, start: int, places_S: Tensor, documents: Documents | None) -> Tensor | None:
        """Which tokens see which; where ranks share sequences, of whole sequences (no window slides there)."""
        if self.context is not None:
            places_S = torch.arange(len(places_S) * self.context.axis.size, device=places_S.device)
        mask_ST = attention_mask(start, len(places_S), self.config.sliding_window, places_S.device)
        return documents.mask(places_S, mask_ST) if documents else mask_ST

    def _padded(
        self, tokens_BS: Tensor, target: Target | None, documents: Documents | None
    ) -> tuple[Tensor, Target | None, Documents | None]:
        """With tokens behind the end, to which none attends, where the sequence would not split into equal parts."""
        missing = -tokens_BS.shape[1] % self.axis.size if self.axis.sequence else 0
        if not missing:
            return tokens_BS, target, documents
        assert self.context is None, f"{tokens_BS.shape[1]} tokens do not split over {self.axis.size} ranks"
        return (
            F.pad(tokens_BS, (0, missing)),
            target and target.padded(missing),
            documents and documents.padded(missing),
        )

    def new_cache(self, batch: int, max_length: int) -> KVCache:
        """An empty cache for `batch` sequences of at most `max_length` tokens."""
        heads_local = self.config.num_kv_heads // self.axis.size
        like = self.embedding.tokens.weight
        return KVCache(self.config.num_layers, batch, max_length, heads_local, self.config.head_dim, like)

    def compile_blocks(self) -> None:
        """torch.compile every block, in place, as one graph without breaks; the blocks share it.

        Static shapes: each new (batch, sequence) compiles once more, and torch stops with an error at its
        `recompile_limit` (8). Not for decoding with a cache, where every token has a new length.
        """
        for block in self.blocks:
            block.compile(fullgraph=True, dynamic=False)

    def _dropout_keys(self, dropout_key: Tensor | None) -> list[Tensor | None]:
        """One key a block and, last, the embedding's; all None where nothing is dropped."""
        count = len(self.blocks) + 1
        if not self.training or self.config.dropout == 0.0:
            return [None] * count
        if dropout_key is None:
            raise ValueError("model.dropout is not 0 and the model is in training mode: forward needs a dropout_key")
        if self.axis.sequence:  # parts of the sequence are not dropped alike
            dropout_key = rng.derive(dropout_key, self.axis.rank)
        # One stream a layer of the whole model, like logical names; the last is the embedding's.
        streams_N = torch.arange(self.config.num_layers + 1, dtype=torch.int32, device=dropout_key.device)
        keys = rng.derive(dropout_key, streams_N).unbind(0)
        return [*(keys[layer] for layer in self.layers), keys[-1]]

    def _rotary(self, positions_S: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor] | None:
        if self.config.positions != "rotary":
            return None
        config = self.config
        return rotary_tables(positions_S, config.head_dim, config.rotary_base, config.rotary_scaling, dtype)

    def _check_length(self, length: int) -> None:
        if length > self.config.max_sequence_length:
            raise ConfigError(
                f"a sequence of {length} tokens is longer than model.max_sequence_length="
                f"{self.config.max_sequence_length}. Use shorter sequences or a model with more positions."
            )
