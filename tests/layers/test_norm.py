"""Norms against their formulas; statistics in fp32."""

import typing

import pytest
import torch

from megalite.config.schema import Norm
from megalite.layers.norm import NORMS, LayerNorm, RMSNorm
from megalite.mesh import Axis
from tests.layers.parallel import check_layer, load_weights, on_parts, random_tensors

EPS = 1e-5


def plain_rms(weights, x):
    return x * (x.pow(2).mean(-1, keepdim=True) + EPS).rsqrt() * (1 + weights["weight_offset"])


def plain_layer(weights, x):
    mean = x.mean(-1, keepdim=True)
    return (x - mean) * ((x - mean).pow(2).mean(-1, keepdim=True) + EPS).rsqrt() * (
        1 + weights["weight_offset"]
    ) + weights["bias"]


CASES = [(LayerNorm, plain_layer), (RMSNorm, plain_rms)]


@pytest.mark.parametrize(("norm", "plain"), CASES)
@pytest.mark.parametrize("tensor", [1, 2, 4])
def test_norm(norm, plain, tensor):
    x = random_tensors(1, x=(2, 5, 8))["x"]
    check_layer(tensor, lambda axis: norm(8, EPS, axis), lambda layer, axis, x: layer(x), plain, x)


@pytest.mark.parametrize(("norm", "plain"), CASES)
@pytest.mark.parametrize("tensor", [2, 4])
def test_norm_of_parts_of_the_sequence(norm, plain, tensor):
    x = random_tensors(1, x=(2, 8, 8))["x"]
    call = on_parts(lambda layer, axis, x: layer(x))
    check_layer(tensor, lambda axis: norm(8, EPS, axis), call, plain, x, sequence=True)


@pytest.mark.parametrize(("norm", "plain"), CASES)
def test_half_precision_rounds_only_the_result(norm, plain):
    axis = Axis("tensor", 1, 0, None)
    layer = norm(512, EPS, axis)
    x = (100 + torch.randn(4, 512, generator=torch.Generator().manual_seed(0))).bfloat16()
    weights = {"weight_offset": torch.zeros(512).bfloat16(), "bias": torch.zeros(512).bfloat16()}
    load_weights(layer, weights, axis)
    wanted = plain({name: tensor.double() for name, tensor in weights.items()}, x.double())
    # Half a unit in the last of bf16's 8 bits; with statistics in bf16 the error is several per cent.
    torch.testing.assert_close(layer(x).double(), wanted, rtol=2**-8, atol=1e-4)


@pytest.mark.parametrize("norm", [LayerNorm, RMSNorm])
def test_a_small_update_of_the_weight_survives_bf16(norm):
    axis = Axis("tensor", 1, 0, None)
    layer = norm(512, EPS, axis)
    offsets = {"weight_offset": torch.full((512,), 3e-4).bfloat16(), "bias": torch.zeros(512).bfloat16()}
    load_weights(layer, offsets, axis)
    assert layer.weight_offset.mean().item() == pytest.approx(3e-4, rel=0.01)
    assert (1 + torch.tensor(3e-4)).bfloat16().item() == 1.0, "a weight kept around one would have lost it"


def test_the_table_has_the_choices_of_the_schema():
    assert set(NORMS) == set(typing.get_args(Norm))
