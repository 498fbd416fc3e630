"""What an objective hands to the engine."""

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Batch:
    """One micro batch of one data-parallel replica. Shapes: B sequences, S tokens."""

    tokens_BS: torch.Tensor  # int64
    labels_BS: torch.Tensor  # int64, what is predicted at each position
    mask_BS: torch.Tensor  # bool, which positions count in the loss
    documents_BS: torch.Tensor | None = None  # int64, which document each token of the whole sequences belongs to

    def part(self, positions_S: torch.Tensor) -> "Batch":
        """Some positions of every sequence: what one rank holds where ranks share sequences."""
        tokens_BS, labels_BS, mask_BS = (x[:, positions_S] for x in (self.tokens_BS, self.labels_BS, self.mask_BS))
        return Batch(tokens_BS, labels_BS, mask_BS, self.documents_BS)

    def to(self, device: torch.device) -> "Batch":
        """The batch on `device`; the copy from pinned memory overlaps with computation."""
        tensors = (self.tokens_BS, self.labels_BS, self.mask_BS, self.documents_BS)
        return Batch(*(None if tensor is None else tensor.to(device, non_blocking=True) for tensor in tensors))  # type: ignore[arg-type]
