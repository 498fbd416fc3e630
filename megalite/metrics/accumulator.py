"""Means of device scalars that cost the host nothing until they are read."""

import torch


class LossMeter:
    """The mean of losses since it was last read.

    `add` only enqueues work on the device; `take` is the one host synchronisation. The sum is float64: a mean over one
    step is that step's loss, bit for bit, and a mean over many has no rounding of its own to show.
    """

    def __init__(self, device: torch.device) -> None:
        """An empty meter on `device`."""
        self._sum = torch.zeros((), dtype=torch.float64, device=device)
        self._count = 0

    def add(self, loss: torch.Tensor) -> None:
        """Take in one step's loss, a scalar on the meter's device, in nats per token."""
        self._sum += loss.detach()
        self._count += 1

    def state(self) -> tuple[float, int]:
        """Sum and count since the last `take`, for a checkpoint. Waits for the device."""
        return self._sum.item(), self._count

    def restore(self, total: float, count: int) -> None:
        """Go on from what `state` gave."""
        self._sum.fill_(total)
        self._count = count

    def take(self) -> float:
        """The mean since the last call; `nan` when nothing was added. Waits for the device."""
        mean = self._sum.item() / self._count if self._count else float("nan")
        self._sum.zero_()
        self._count = 0
        return mean
