"""Every collective that this process really starts: operation, and the bytes of the whole tensor it is about."""

from collections import Counter
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from megalite.layers import context

_NAMES = {
    "_c10d_functional::all_reduce": "all_reduce",
    "_c10d_functional::all_gather_into_tensor": "all_gather",
    "_c10d_functional::reduce_scatter_tensor": "reduce_scatter",
    "_c10d_functional::all_to_all_single": "all_to_all",
    "megalite::gathered_linear": "all_gather",  # holds one
}


class Collectives(TorchDispatchMode):
    """Counts (operation, bytes) in `counts` while it is entered.

    Below selective recomputation, which answers operations from what it kept: what it answers is not counted. Bytes are
    those of the whole tensor: an all-reduce's, an all-gather's result, a reduce-scatter's input; of an all-to-all, what
    a rank gives away or keeps; of a send, what is sent.
    """

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[tuple[str, int]] = Counter()

    def __enter__(self) -> "Collectives":
        send = self._send = context._Shift.__init__

        def counting_send(shift: Any, x: Tensor, axis: Any) -> None:
            self.counts["send", x.numel() * x.element_size()] += 1
            send(shift, x, axis)

        context._Shift.__init__ = counting_send  # type: ignore[method-assign]
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        context._Shift.__init__ = self._send  # type: ignore[method-assign]
        super().__exit__(*error)

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = _NAMES.get(function.name())
        if name:
            x = args[0]
            size = args[3] if "linear" in function.name() else args[1] if name == "all_gather" else 1
            self.counts[name, x.numel() * x.element_size() * size] += 1
        return function(*args, **(kwargs or {}))
