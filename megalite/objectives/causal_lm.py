"""Next-token prediction: windows of the token stream in training, whole documents in evaluation."""

from collections.abc import Iterator

import torch

from megalite.data.format import TokenStore
from megalite.layers.documents import document_ids
from megalite.objectives.base import Batch


class CausalLM:
    """Predict every token from those before it (Radford et al. 2018)."""

    def __init__(self, sequence_length: int, end_of_document: int | None = None):
        """`end_of_document`: the token to tell documents apart by; None: nobody asks for them."""
        self.sequence_length = sequence_length
        self.end_of_document = end_of_document

    def batch(self, samples: torch.Tensor) -> Batch:
        """Samples of any integer type -> a batch; they are widened here, where they already lie on the device.

        Windows [B, S + 1]: inputs, the same shifted by one as labels, every position counted. Packed rows [B, 3, S]
        (see `data.views.PackedDocuments`): inputs, labels, and documents, of which 0 is padding and does not count.
        """
        ids = samples.long()
        if ids.dim() == 3:
            tokens_BS, labels_BS, documents_BS = ids.unbind(1)
            return Batch(tokens_BS, labels_BS, documents_BS > 0, None if self.end_of_document is None else documents_BS)
        tokens_BS, labels_BS = ids[:, :-1], ids[:, 1:]
        return Batch(tokens_BS, labels_BS, torch.ones_like(labels_BS, dtype=torch.bool), self._documents(tokens_BS))

    def _documents(self, tokens_BS: torch.Tensor) -> torch.Tensor | None:
        return None if self.end_of_document is None else document_ids(tokens_BS, self.end_of_document)

    def evaluation_windows(self, store: TokenStore) -> Iterator[torch.Tensor]:
        """Windows that predict every token of every document once, each [n + 1] with n <= S.

        Windows start at each document's first token and do not overlap. The first is predicted from the
        end-of-document token, as in training, where documents follow one another; the end of a document is not part of
        its text and is not predicted.
        """
        end = store.manifest.end_of_document
        for document in range(store.num_documents):
            text = torch.from_numpy(store.document(document).astype("int64"))[:-1]
            context = torch.cat([torch.tensor([end]), text])
            for start in range(0, len(text), self.sequence_length):
                yield context[start : start + self.sequence_length + 1]

    def evaluation_batch(self, windows: list[torch.Tensor], num_rows: int) -> Batch:
        """Windows of at most S + 1 tokens -> a batch of `num_rows` rows, padded with positions that do not count."""
        tokens_BS = torch.zeros(num_rows, self.sequence_length, dtype=torch.int64)
        labels_BS = torch.zeros_like(tokens_BS)
        mask_BS = torch.zeros_like(tokens_BS, dtype=torch.bool)
        for row, window in enumerate(windows):
            length = len(window) - 1
            tokens_BS[row, :length] = window[:-1]
            labels_BS[row, :length] = window[1:]
            mask_BS[row, :length] = True
        return Batch(tokens_BS, labels_BS, mask_BS, self._documents(tokens_BS))
