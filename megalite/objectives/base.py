"""What an objective hands to the engine."""

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Batch:
    """One micro batch of one data-parallel replica. Shapes: B sequences, S tokens."""

    tokens_BS: torch.Tensor  # int64
    labels_BS: torch.Tensor  # int64, what is predicted at each position
    mask_BS: torch.Tensor  # bool, which positions count in the loss

    def part(self, positions_S: torch.Tensor) -> "Batch":
        """Some positions of every sequence: what one rank holds where ranks share sequences."""
        return Batch(*(tensor[:, positions_S] for tensor in (self.tokens_BS, self.labels_BS, self.mask_BS)))

    def to(self, device: torch.device) -> "Batch":
        """The batch on `device`; the copy from pinned memory overlaps with computation."""
        return Batch(
            *(tensor.to(device, non_blocking=True) for tensor in (self.tokens_BS, self.labels_BS, self.mask_BS))
        )
