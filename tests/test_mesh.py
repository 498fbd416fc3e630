"""Which rank stands where, and what DeepSpeed is told about it."""

import math

import pytest
import torch
import torch.distributed as dist

from megalite.config.schema import ParallelConfig
from megalite.errors import ConfigError
from megalite.mesh import axis_lines, build_mesh, single_mesh
from tests.ranks import run_ranks

CPU = torch.device("cpu")


def test_lines_of_three_axes():
    assert axis_lines((2, 2, 2), (2,)) == [[0, 1], [2, 3], [4, 5], [6, 7]]
    assert axis_lines((2, 2, 2), (1,)) == [[0, 2], [1, 3], [4, 6], [5, 7]]
    assert axis_lines((2, 2, 2), (0,)) == [[0, 4], [1, 5], [2, 6], [3, 7]]
    assert axis_lines((2, 2, 2), (0, 1)) == [[0, 2, 4, 6], [1, 3, 5, 7]]


@pytest.mark.parametrize("sizes", [(1,), (3, 1), (1, 4), (2, 3, 4)])
def test_every_rank_is_in_one_line_of_each_axis(sizes):
    for axis, size in enumerate(sizes):
        lines = axis_lines(sizes, (axis,))
        assert sorted(rank for line in lines for rank in line) == list(range(math.prod(sizes)))
        assert {len(line) for line in lines} == {size}


def describe(tensor, context=1):
    mesh = build_mesh(ParallelConfig(tensor=tensor, context=context), CPU)
    ranks = {axis.name: dist.get_process_group_ranks(axis.group) for axis in mesh.axes}
    total = torch.tensor([mesh.rank])
    dist.all_reduce(total, group=mesh.tensor.group)
    return {
        "place": (mesh.data.rank, mesh.tensor.rank),
        "sizes": (mesh.data.size, mesh.tensor.size),
        "ranks": ranks,
        "tensor_sum": total.item(),
        "mpu_data_ranks": mesh.mpu.get_data_parallel_group_ranks(),
    }


def test_tensor_ranks_are_consecutive():
    found = run_ranks(4, describe, 2)
    assert [place["place"] for place in found] == [(0, 0), (0, 1), (1, 0), (1, 1)]
    assert {place["sizes"] for place in found} == {(2, 2)}
    assert [place["ranks"]["tensor"] for place in found] == [[0, 1], [0, 1], [2, 3], [2, 3]]
    assert [place["ranks"]["data"] for place in found] == [[0, 2], [1, 3], [0, 2], [1, 3]]
    assert [place["tensor_sum"] for place in found] == [1, 1, 5, 5]
    assert [place["mpu_data_ranks"] for place in found] == [[0, 2], [1, 3], [0, 2], [1, 3]]


def test_axes_of_size_one_have_groups_too():
    (found,) = run_ranks(1, describe, 1)
    assert found["sizes"] == (1, 1)
    assert found["ranks"] == {"data": [0], "context": [0], "tensor": [0]}


def test_zero_shards_over_data_and_context():
    found = run_ranks(4, describe, 1, 2)
    assert [place["ranks"]["data"] for place in found] == [[0, 2], [1, 3], [0, 2], [1, 3]]
    assert [place["ranks"]["context"] for place in found] == [[0, 1], [0, 1], [2, 3], [2, 3]]
    assert [place["mpu_data_ranks"] for place in found] == [[0, 1, 2, 3]] * 4
    found = run_ranks(4, describe, 2, 2)
    assert [place["ranks"]["context"] for place in found] == [[0, 2], [1, 3], [0, 2], [1, 3]]
    assert [place["mpu_data_ranks"] for place in found] == [[0, 2], [1, 3], [0, 2], [1, 3]]


def test_a_world_that_does_not_divide_is_refused():
    with pytest.raises(RuntimeError, match=r"ConfigError: parallel.tensor=3 x parallel.context=1: 2 ranks .* \(1, 2\)"):
        run_ranks(2, describe, 3)


def test_without_torch_distributed_it_is_a_world_of_one():
    mesh = build_mesh(ParallelConfig(), CPU)
    assert mesh == single_mesh(CPU)
    assert (mesh.world_size, mesh.tensor.size, mesh.data.size) == (1, 1, 1)
    assert mesh.tensor.group is None
    with pytest.raises(ConfigError, match=r"parallel\.tensor=2"):
        build_mesh(ParallelConfig(tensor=2), CPU)


def test_an_unknown_axis_names_the_known_ones():
    with pytest.raises(KeyError, match="data, context, tensor"):
        single_mesh(CPU).axis("pipeline")


def test_the_mpu_has_the_getters_that_deepspeed_calls_and_no_sequence_ones():
    mpu = single_mesh(CPU).mpu
    for axis in ("model", "data", "tensor_model"):
        assert getattr(mpu, f"get_{axis}_parallel_rank")() == 0
        assert getattr(mpu, f"get_{axis}_parallel_world_size")() == 1
        assert getattr(mpu, f"get_{axis}_parallel_group")() is None
    assert mpu.get_data_parallel_group_ranks() == [0]
    assert not [name for name in dir(mpu) if "sequence" in name]  # one of them makes ZeRO drop its groups


def mpu_places():
    mpu = build_mesh(ParallelConfig(tensor=2), CPU).mpu
    return [
        (
            getattr(mpu, f"get_{axis}_parallel_rank")(),
            getattr(mpu, f"get_{axis}_parallel_world_size")(),
            dist.get_process_group_ranks(getattr(mpu, f"get_{axis}_parallel_group")()),
        )
        for axis in ("model", "tensor_model", "data")
    ]


def test_the_mpu_shows_the_mesh():
    found = run_ranks(4, mpu_places)
    assert found[1] == [(1, 2, [0, 1]), (1, 2, [0, 1]), (0, 2, [1, 3])]
    assert found[2] == [(0, 2, [2, 3]), (0, 2, [2, 3]), (1, 2, [0, 2])]
