"""Bugs to plant in the communication, one a rank calls before it runs: each must turn a comparison red."""

from collections.abc import Callable
from typing import Any

from megalite import comm


def copy_forgets_backward() -> None:
    comm._Copy.backward = staticmethod(lambda ctx, grad: (grad, None))


def reduce_forgets_forward() -> None:
    comm._Reduce.forward = staticmethod(lambda ctx, x, axis: x.clone())


def reduce_sums_backward() -> None:
    def forward(ctx: Any, x: Any, axis: Any) -> Any:
        ctx.axis = axis
        return comm._all_reduce(x, axis, "sum")

    comm._Reduce.forward = staticmethod(forward)
    comm._Reduce.backward = staticmethod(lambda ctx, grad: (comm._all_reduce(grad, ctx.axis, "sum"), None))


def cross_entropy_forgets_sum() -> None:
    honest = comm.all_reduce
    comm.all_reduce = lambda x, axis, op="sum": x if op == "sum" else honest(x, axis, op)


PLANTS: list[Callable[[], None]] = [
    copy_forgets_backward,
    reduce_forgets_forward,
    reduce_sums_backward,
    cross_entropy_forgets_sum,
]
