"""Attention on local heads against head-by-head attention on whole tensors."""

import dataclasses

import pytest
import torch

from megalite.config.schema import ModelConfig
from megalite.layers.attend import attention_mask
from megalite.layers.attention import Attention
from megalite.layers.cache import KVCache
from megalite.layers.positions import rotary_tables
from megalite.layers.shard import Init
from megalite.mesh import Axis
from tests.layers.parallel import check_layer, load_weights, on_parts, random_tensors, shapes_of
from tests.models.plain import plain_attention

SINGLE = Axis("tensor", 1, 0, None)
CONFIGS = {
    "multi_head": ModelConfig(hidden_size=24, num_attention_heads=8, head_size=4, bias=True),
    "grouped": ModelConfig(
        hidden_size=24, num_attention_heads=8, num_key_value_heads=4, head_size=4, bias=False, positions="rotary"
    ),
    "multi_query": ModelConfig(hidden_size=24, num_attention_heads=8, num_key_value_heads=1, head_size=4),
}


def make(config, axis):
    return Attention(config, axis, Init(), Init())


def rotary(config, length):
    if config.positions != "rotary":
        return None
    return rotary_tables(torch.arange(length), config.head_dim, config.rotary_base, None, torch.float64)


@pytest.mark.parametrize(
    ("name", "tensor"),
    [*((name, tensor) for name in ("multi_head", "grouped") for tensor in (1, 2, 4)), ("multi_query", 1)],
)
def test_attention(name, tensor):
    config = CONFIGS[name]
    check_layer(
        tensor,
        lambda axis: make(config, axis),
        lambda layer, axis, x: layer(x, rotary(config, x.shape[1])),
        lambda weights, x: plain_attention(weights, "", config, x),
        random_tensors(1, x=(2, 7, 24))["x"],
    )


@pytest.mark.parametrize(("name", "tensor"), [("multi_head", 2), ("grouped", 4)])
def test_attention_from_and_to_parts_of_the_sequence(name, tensor):
    config = CONFIGS[name]
    check_layer(
        tensor,
        lambda axis: make(config, axis),
        on_parts(lambda layer, axis, x: layer(x, rotary(config, 8))),
        lambda weights, x: plain_attention(weights, "", config, x),
        random_tensors(1, x=(2, 8, 24))["x"],
        sequence=True,
    )


def test_grouped_heads_in_half_precision():
    config = CONFIGS["grouped"]
    layer = make(config, SINGLE)
    weights = random_tensors(0, **shapes_of(lambda axis: make(config, axis)))
    weights = {name: (0.3 * tensor).bfloat16() for name, tensor in weights.items()}
    load_weights(layer, weights, SINGLE)
    x = random_tensors(1, x=(2, 7, 24))["x"].bfloat16()
    wanted = plain_attention({name: t.double() for name, t in weights.items()}, "", config, x.double())
    torch.testing.assert_close(layer(x, rotary(config, 7)).double(), wanted, atol=5e-2, rtol=5e-2)


@pytest.mark.parametrize("name", ["multi_head", "grouped"])
@pytest.mark.parametrize("cuts", [[1] * 7, [4, 1, 1, 1], [3, 4]])
def test_cached_tokens_attend_as_if_read_at_once(name, cuts):
    config = CONFIGS[name]
    layer = make(config, SINGLE)
    load_weights(layer, random_tensors(0, **shapes_of(lambda axis: make(config, axis))), SINGLE)
    x = random_tensors(1, x=(2, 7, 24))["x"]
    wanted = layer(x, rotary(config, 7))
    cache = KVCache(1, 2, 7, config.num_kv_heads, config.head_dim, x)
    pieces = []
    for piece in x.split(cuts, dim=1):
        start, end = cache.length, cache.length + piece.shape[1]
        tables = rotary(config, 7)
        turned = tables and tuple(table[start:end] for table in tables)
        pieces.append(layer(piece, turned, attention_mask(start, piece.shape[1], None, x.device), cache))
        cache.advance(piece.shape[1])
    torch.testing.assert_close(torch.cat(pieces, dim=1), wanted, atol=1e-10, rtol=0)


def test_a_full_cache_says_so():
    cache = KVCache(1, 1, 4, 1, 2, torch.zeros(()))
    with pytest.raises(AssertionError, match="holds 4 tokens, asked for 5"):
        cache.update(0, torch.zeros(1, 5, 1, 2), torch.zeros(1, 5, 1, 2))


def test_dropout_acts_in_training_only():
    config = CONFIGS["multi_head"]
    layer = make(dataclasses.replace(config, dropout=0.5), SINGLE)
    load_weights(layer, random_tensors(0, **shapes_of(lambda axis: make(config, axis))), SINGLE)
    x = random_tensors(1, x=(2, 7, 24))["x"]
    assert not torch.equal(layer(x), layer(x))
    layer.eval()
    assert torch.equal(layer(x), layer(x))
