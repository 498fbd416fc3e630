"""The parallel MLP against the plain one, with every activation."""

import typing

import pytest

from megalite.config.schema import Activation, ModelConfig
from megalite.layers.mlp import ACTIVATIONS, MLP
from megalite.layers.shard import Init
from tests.layers.parallel import check_layer, on_parts, random_tensors
from tests.models.plain import plain_mlp


@pytest.mark.parametrize("tensor", [1, 2, 4])
@pytest.mark.parametrize(("activation", "bias"), [("gelu", True), ("swiglu", False)])
def test_mlp(tensor, activation, bias):
    _check(tensor, activation, bias)


@pytest.mark.parametrize("tensor", [2, 4])
@pytest.mark.parametrize(("activation", "bias"), [("gelu", True), ("swiglu", False)])
def test_mlp_from_and_to_parts_of_the_sequence(tensor, activation, bias):
    _check(tensor, activation, bias, sequence=True)


@pytest.mark.parametrize("activation", ["gelu_tanh", "relu_squared"])
def test_other_activations(activation):
    _check(2, activation, True)


def test_the_table_has_the_choices_of_the_schema():
    assert set(ACTIVATIONS) == set(typing.get_args(Activation))


def _check(tensor, activation, bias, sequence=False):
    def call(layer, axis, x):
        return layer(x)

    config = ModelConfig(hidden_size=8, ffn_hidden_size=24, activation=activation)
    check_layer(
        tensor,
        lambda axis: MLP(8, 24, activation, bias, axis, Init(), Init()),
        on_parts(call) if sequence else call,
        lambda weights, x: plain_mlp(weights, "", config, x),
        random_tensors(1, x=(2, 8, 8))["x"],
        sequence=sequence,
    )
