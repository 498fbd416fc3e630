"""How big a model is, and what a token costs."""

import math

import torch

from megalite.config.schema import ModelConfig
from megalite.layers.mlp import GATED
from megalite.layers.shard import shard_of
from megalite.mesh import single_mesh
from megalite.models.decoder import Decoder
from megalite.models.materialize import named_logical_parameters


def count_parameters(config: ModelConfig) -> int:
    """Number of parameters of the whole model: logical, without the padding of the vocabulary, tied ones once."""
    model = Decoder(config, single_mesh(torch.device("cpu")).tensor)
    return sum(math.prod(shard_of(parameter).shape) for _, parameter in named_logical_parameters(model))


def flops_per_token(config: ModelConfig, sequence_length: int) -> int:
    """Floating-point operations of training on one token, forward and backward: 6 N + 12 L h s.

    N: elements of the matrices that a token is multiplied with: attention and MLP projections and the output head, tied
    or not (unpadded); not the embedding lookup, norms or biases. L: layers, h: width of attention (heads x head size),
    s: `sequence_length`. The second term is attention without regard to the causal mask (Chowdhery et al. 2022, PaLM,
    appendix B); recomputation does not count.
    """
    query_width = config.num_attention_heads * config.head_dim
    key_value_width = config.num_kv_heads * config.head_dim
    attention = config.hidden_size * (2 * query_width + 2 * key_value_width)
    mlp = config.hidden_size * config.ffn_size * (3 if config.activation in GATED else 2)
    head = config.hidden_size * config.known_vocab_size
    matrices = config.num_layers * (attention + mlp) + head
    return 6 * matrices + 12 * config.num_layers * query_width * sequence_length
