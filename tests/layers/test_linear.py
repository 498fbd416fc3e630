"""Column- and row-parallel layers against y = x W^T + b on whole tensors."""

import pytest
import torch.nn.functional as F

from megalite import comm
from megalite.layers.linear import ColumnParallelLinear, RowParallelLinear
from megalite.layers.shard import Init
from megalite.mesh import Axis
from tests.layers import plants
from tests.layers.parallel import check_layer, random_tensors

SIZES = [1, 2, 4]


def plain(weights, x):
    return F.linear(x, weights["weight"], weights.get("bias"))


def column(layer, axis, x):
    return comm.gather(layer(x), axis, dim=-1)


def row(layer, axis, x):
    return layer(comm.scatter(x, axis, dim=-1))


@pytest.mark.parametrize("tensor", SIZES)
def test_column(tensor):
    x = random_tensors(1, x=(2, 3, 12))["x"]
    check_layer(tensor, lambda axis: ColumnParallelLinear(12, (16,), True, axis, Init()), column, plain, x)


@pytest.mark.parametrize("tensor", SIZES)
def test_row(tensor):
    x = random_tensors(1, x=(2, 3, 12))["x"]
    check_layer(tensor, lambda axis: RowParallelLinear(12, 16, True, axis, Init()), row, plain, x)


@pytest.mark.parametrize("tensor", SIZES[1:])
def test_column_from_parts_of_the_sequence(tensor):
    x = random_tensors(1, x=(2, 4, 12))["x"]

    def call(layer, axis, x):
        return column(layer, axis, comm.scatter(x, axis, dim=1))

    check_layer(tensor, lambda axis: ColumnParallelLinear(12, (16,), True, axis, Init()), call, plain, x, sequence=True)


@pytest.mark.parametrize("tensor", SIZES[1:])
def test_row_to_parts_of_the_sequence(tensor):
    x = random_tensors(1, x=(2, 4, 12))["x"]

    def call(layer, axis, x):
        return comm.gather(row(layer, axis, x), axis, dim=1)

    check_layer(tensor, lambda axis: RowParallelLinear(12, 16, True, axis, Init()), call, plain, x, sequence=True)


def test_planted_missing_backward_all_reduce_is_seen():
    x = random_tensors(1, x=(2, 3, 12))["x"]
    with pytest.raises(AssertionError, match="gradient of input 0"):
        check_layer(
            2,
            lambda axis: ColumnParallelLinear(12, (16,), True, axis, Init()),
            column,
            plain,
            x,
            plant=plants.copy_forgets_backward,
        )


def test_row_bias_is_added_once():
    def make(axis):
        return RowParallelLinear(12, 16, True, axis, Init())

    def bias_on_every_rank(layer, axis, x):
        bias, layer.bias = layer.bias, None
        y = comm.reduce(F.linear(comm.scatter(x, axis, -1), layer.weight) + bias, axis)
        layer.bias = bias
        return y

    x = random_tensors(1, x=(2, 3, 12))["x"]
    with pytest.raises(AssertionError, match="output on rank 0"):
        check_layer(2, make, bias_on_every_rank, plain, x)


def test_repr_shows_unsharded_size_and_rank():
    axis = Axis("tensor", 4, 1, None)
    assert repr(ColumnParallelLinear(8, (16, 4, 4), False, axis, Init())) == (
        "ColumnParallelLinear(8 -> 16+4+4, bias=False, rank 1 of 4)"
    )
    assert repr(RowParallelLinear(8, 16, True, axis, Init())) == "RowParallelLinear(8 -> 16, bias=True, rank 1 of 4)"
