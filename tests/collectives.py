"""Every collective that this process really starts: operation, axis, and the bytes of the whole tensor it is about."""

from collections import Counter
from typing import Any

import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode

from megalite.mesh import Mesh

_NAMES = {
    "_c10d_functional::all_reduce": "all_reduce",
    "_c10d_functional::all_gather_into_tensor": "all_gather",
    "_c10d_functional::reduce_scatter_tensor": "reduce_scatter",
    "_c10d_functional::all_to_all_single": "all_to_all",
    "megalite::gathered_linear": "all_gather",  # holds one
    "c10d::allreduce_": "all_reduce",
    "c10d::send": "send",
}
_SILENT = ("::wait_tensor", "::recv_")  # these wait for what others, or other calls, have started


class Collectives(TorchDispatchMode):
    """Counts (operation, axis, bytes) in `counts` while it is entered; any other operation of c10d is an error.

    Below selective recomputation, which answers operations from what it kept: what it answers is not counted. Bytes are
    those of the whole tensor: an all-reduce's, an all-gather's result, a reduce-scatter's input; of an all-to-all, what
    a rank gives away or keeps; of a send, what is sent.
    """

    def __init__(self, mesh: Mesh) -> None:
        super().__init__()
        self.counts: Counter[tuple[str, str, int]] = Counter()
        axes = {"data": mesh.replica, "context": mesh.context, "tensor": mesh.tensor, "world": mesh.world}
        # "data" is data x context where both are
        self._axes = {axis.group.group_name: name for name, axis in axes.items() if axis.group is not None}

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        called = function.name()
        name = _NAMES.get(called)
        assert name or "c10d" not in called or called.endswith(_SILENT), f"a collective that is not counted: {called}"
        if name:
            by_group_object = called.startswith("c10d::")
            x = args[0][0] if by_group_object else args[0]
            size = args[3] if "linear" in called else args[1] if name == "all_gather" else 1
            group = dist.ProcessGroup.unbox(args[1]).group_name if by_group_object else args[-1]
            self.counts[name, self._axes[group], x.numel() * x.element_size() * size] += 1
        return function(*args, **(kwargs or {}))
