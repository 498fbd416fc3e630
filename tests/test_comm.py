"""Each collective and its conjugate: forward and backward, eager and compiled."""

import pytest
import torch
import torch._dynamo  # a slow import, before ranks are forked

from megalite import comm
from megalite.config.schema import ParallelConfig
from megalite.mesh import Axis, build_mesh
from tests.ranks import run_ranks


def both_ways(operation, shape, dim, compiled=False):
    """The result for x = rank + 0, 1, 2, ... and the gradient of x for a gradient of (rank + 1) * (1, 2, 3, ...)."""
    axis = build_mesh(ParallelConfig(tensor=2), torch.device("cpu")).tensor
    count = torch.Size(shape).numel()
    x = (torch.arange(count).double().view(shape) + 10 * axis.rank).requires_grad_()
    arguments = (axis,) if dim is None else (axis, dim)

    def function(x):
        return getattr(comm, operation)(x * 1.0, *arguments)

    # aot_eager: the whole of tracing, forward and backward, without a compiler's minute.
    y = (torch.compile(function, fullgraph=True, backend="aot_eager") if compiled else function)(x)
    y.backward((axis.rank + 1) * torch.arange(1, y.numel() + 1).double().view(y.shape))
    return y.tolist(), x.grad.tolist()


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize(
    ("operation", "shape", "dim", "wanted"),
    [
        ("copy", (2,), None, [([0, 1], [3, 6]), ([10, 11], [3, 6])]),
        ("reduce", (2,), None, [([10, 12], [1, 2]), ([10, 12], [2, 4])]),
        ("gather", (2,), 0, [([0, 1, 10, 11], [1, 2]), ([0, 1, 10, 11], [6, 8])]),
        ("gather", (2, 1), -1, [([[0, 10], [1, 11]], [[1], [3]]), ([[0, 10], [1, 11]], [[4], [8]])]),
        ("scatter", (4,), 0, [([0, 1], [1, 2, 2, 4]), ([12, 13], [1, 2, 2, 4])]),
        ("scatter", (2, 2), 1, [([[0], [2]], [[1, 2], [2, 4]]), ([[11], [13]], [[1, 2], [2, 4]])]),
        ("enter", (2,), 0, [([0, 1, 10, 11], [3, 6]), ([0, 1, 10, 11], [9, 12])]),
        ("enter", (1, 2), 1, [([[0, 1, 10, 11]], [[3, 6]]), ([[0, 1, 10, 11]], [[9, 12]])]),
        ("enter", (2, 1), -1, [([[0, 10], [1, 11]], [[3], [9]]), ([[0, 10], [1, 11]], [[6], [12]])]),
        ("leave", (4,), 0, [([10, 12], [1, 2, 2, 4]), ([14, 16], [1, 2, 2, 4])]),
        ("leave", (1, 2), 1, [([[10]], [[1, 2]]), ([[12]], [[1, 2]])]),
        ("leave", (2, 2), -1, [([[10], [14]], [[1, 2], [2, 4]]), ([[12], [16]], [[1, 2], [2, 4]])]),
    ],
)
def test_both_ways(operation, shape, dim, wanted, compiled):
    assert run_ranks(2, both_ways, operation, shape, dim, compiled) == wanted


def reductions():
    axis = build_mesh(ParallelConfig(tensor=2), torch.device("cpu")).tensor
    x = torch.tensor([1.0 + axis.rank, -axis.rank], requires_grad=True)
    results = [comm.all_reduce(x, axis, op) for op in ("sum", "max")]
    assert not any(result.requires_grad for result in results)
    return [result.tolist() for result in results], x.tolist()


def test_all_reduce_leaves_its_input_alone():
    wanted = [[3.0, -1.0], [2.0, 0.0]]
    assert run_ranks(2, reductions) == [(wanted, [1.0, 0.0]), (wanted, [2.0, -1.0])]


def test_an_axis_of_one_needs_no_group():
    axis, x = Axis("tensor", 1, 0, None), torch.ones(2, 2)
    assert comm.copy(x, axis) is x
    assert comm.reduce(x, axis) is x
    assert comm.gather(x, axis, 0) is x
    assert comm.scatter(x, axis, 0) is x
    assert comm.enter(x, axis, 0) is x
    assert comm.leave(x, axis, 0) is x
    assert comm.all_reduce(x, axis) is x


@pytest.mark.parametrize("operation", ["scatter", "leave"])
def test_an_uneven_split_is_refused(operation):
    with pytest.raises(RuntimeError, match=r"dim 0 of \(3,\) does not split into 2"):
        run_ranks(2, both_ways, operation, (3,), 0)
