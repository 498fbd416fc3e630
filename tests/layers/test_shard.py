"""Cutting a logical tensor into local ones and back."""

import pytest
import torch
from torch import nn

from megalite.layers.shard import Init, Shard, make_parameter, replace_parameter
from megalite.mesh import Axis


@pytest.mark.parametrize(
    "shard",
    [
        Shard((5, 3)),
        Shard((8, 3), 0, (8,)),
        Shard((3, 8), 1, (8,)),
        Shard((16, 3), 0, (8, 4, 4)),
        Shard((16,), 0, (8, 8)),
        Shard((300, 3), 0, (300,), multiple=128),
        Shard((60, 3), 0, (60,), multiple=128),  # some ranks hold nothing but padding
    ],
)
@pytest.mark.parametrize("size", [1, 2, 4])
def test_gather_undoes_slice(shard, size):
    full = torch.randn(shard.shape)
    locals_ = [shard.slice(full, rank, size) for rank in range(size)]
    assert all(tuple(local.shape) == shard.local_shape(size) for local in locals_)
    assert torch.equal(shard.gather(locals_), full)


def test_each_part_is_split_by_itself():
    full = torch.arange(8)
    shard = Shard((8,), 0, (4, 2, 2))
    assert shard.slice(full, 0, 2).tolist() == [0, 1, 4, 6]
    assert shard.slice(full, 1, 2).tolist() == [2, 3, 5, 7]


def test_padding_is_zero_and_does_not_depend_on_the_number_of_ranks():
    shard = Shard((5, 2), 0, (5,), multiple=4)
    full = torch.ones(5, 2)
    for size in (1, 2, 4):
        padded = torch.cat([shard.slice(full, rank, size) for rank in range(size)])
        assert padded.shape == (8, 2)
        assert padded[:5].eq(1).all()
        assert padded[5:].eq(0).all()


def test_a_tensor_of_another_shape_is_refused():
    with pytest.raises(AssertionError, match=r"expected the logical shape \(4, 2\), found \(2, 2\)"):
        Shard((4, 2), 0, (4,)).slice(torch.zeros(2, 2), 0, 2)


def test_a_parameter_carries_how_it_is_split():
    axis = Axis("tensor", 2, 0, None)
    split = make_parameter(Shard((4, 2), 0, (4,)), Init(std=0.1), axis)
    assert split.device.type == "meta"
    assert split.shape == (2, 2)
    assert split.tensor_model_parallel is True
    assert not hasattr(make_parameter(Shard((4,)), Init(), axis), "tensor_model_parallel")


def test_a_replaced_parameter_keeps_what_it_carried():
    module = nn.Module()
    module.weight = make_parameter(Shard((4, 2), 0, (4,)), Init(std=0.1), Axis("tensor", 2, 0, None))
    new = replace_parameter(module, "weight", torch.ones(2, 2))
    assert module.weight is new
    assert (new.shard, new.init, new.tensor_model_parallel) == (Shard((4, 2), 0, (4,)), Init(std=0.1), True)
