"""Sequences that hold several documents: attention that stays within one, positions that restart with each.

Legend: B batch, S tokens of a sequence, or those asked about, T tokens attended to.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from megalite.layers.attend import seen_from


@dataclass(frozen=True)
class Documents:
    """Which document each token of whole sequences belongs to, int (B, T), and what follows from it."""

    ids_BT: Tensor
    attention: bool  # a token sees only its own document
    positions: bool  # counted from the document's first token

    def positions_of(self, positions_S: Tensor) -> Tensor:
        """Positions of the tokens at `positions_S`: (S), or (B, S) where they restart."""
        if not self.positions:
            return positions_S
        places_T = torch.arange(self.ids_BT.shape[1], device=self.ids_BT.device)
        begins_BT = torch.ones_like(self.ids_BT, dtype=torch.bool)
        begins_BT[:, 1:] = self.ids_BT[:, 1:] != self.ids_BT[:, :-1]
        starts_BT = torch.where(begins_BT, places_T, 0).cummax(dim=1).values
        return positions_S - starts_BT[:, positions_S]

    def mask(self, rows_S: Tensor, seen_ST: Tensor | None) -> Tensor | None:
        """True where a token at `rows_S` may look: (B, 1, S, T), or `seen_ST` as it is where documents do not matter.

        `seen_ST` as `attention_mask` gives it: None is causal.
        """
        if not self.attention:
            return seen_ST
        if seen_ST is None:
            seen_ST = seen_from(rows_S, self.ids_BT.shape[1])
        same_BST = self.ids_BT[:, rows_S, None] == self.ids_BT[:, None, :]
        return (seen_ST & same_BST)[:, None]

    def padded(self, count: int) -> "Documents":
        """With `count` tokens behind the end, of a document of their own."""
        ids_BT = F.pad(self.ids_BT, (0, count), value=-1)
        return Documents(ids_BT, self.attention, self.positions)


def document_ids(tokens_BS: Tensor, end_of_document: int) -> Tensor:
    """The number of the document of each token within its sequence; an end-of-document token belongs to its own."""
    ends_BS = tokens_BS == end_of_document
    return ends_BS.cumsum(dim=1) - ends_BS.long()
