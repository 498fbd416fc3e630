"""Batches of next-token prediction, and the windows that evaluation is counted in."""

import numpy as np
import torch

from megalite.data.format import TokenStore
from megalite.data.writer import StoreWriter
from megalite.objectives import CausalLM

END = 9


def test_labels_are_the_inputs_shifted_by_one():
    samples = torch.tensor([[1, 2, 3, 4], [5, 6, 7, 8]])
    batch = CausalLM(3).batch(samples)
    assert batch.tokens_BS.tolist() == [[1, 2, 3], [5, 6, 7]]
    assert batch.labels_BS.tolist() == [[2, 3, 4], [6, 7, 8]]
    assert batch.mask_BS.all()


def test_windows_predict_every_token_of_every_document_once(tmp_path):
    documents = [[1, 2, 3, 4, 5, 6, 7], [8], [1, 2, 3]]
    with StoreWriter(tmp_path / "store", vocab_size=10, end_of_document=END) as writer:
        for document in documents:
            writer.add_document(np.array(document), num_bytes=len(document))
    windows = [window.tolist() for window in CausalLM(3).evaluation_windows(TokenStore.open(tmp_path / "store"))]
    assert windows == [[END, 1, 2, 3], [3, 4, 5, 6], [6, 7], [END, 8], [END, 1, 2, 3]]
    predicted = [token for window in windows for token in window[1:]]
    assert predicted == [token for document in documents for token in document]


def test_padding_does_not_count():
    batch = CausalLM(3).evaluation_batch([torch.tensor([1, 2, 3, 4]), torch.tensor([5, 6])], num_rows=3)
    assert batch.tokens_BS.tolist() == [[1, 2, 3], [5, 0, 0], [0, 0, 0]]
    assert batch.labels_BS.tolist() == [[2, 3, 4], [6, 0, 0], [0, 0, 0]]
    assert batch.mask_BS.tolist() == [[True] * 3, [True, False, False], [False] * 3]


def test_packed_rows_count_without_their_padding():
    rows = torch.tensor([[[9, 1, 2, 9], [1, 2, 9, 9], [1, 1, 1, 0]], [[9, 3, 9, 4], [3, 9, 4, 9], [1, 1, 2, 2]]])
    for dtype in (torch.uint16, torch.uint32):
        batch = CausalLM(4, end_of_document=9).batch(rows.to(dtype))
        assert batch.tokens_BS.tolist() == rows[:, 0].tolist()
        assert batch.labels_BS.tolist() == rows[:, 1].tolist()
        assert batch.mask_BS.tolist() == [[True, True, True, False], [True] * 4]
        assert batch.documents_BS.tolist() == rows[:, 2].tolist()
        assert batch.tokens_BS.dtype == batch.labels_BS.dtype == batch.documents_BS.dtype == torch.int64
    assert CausalLM(4).batch(rows).documents_BS is None


def test_samples_are_widened():
    batch = CausalLM(3).batch(torch.tensor([[1, 60000, 3, 65535]], dtype=torch.uint16))
    assert batch.tokens_BS.tolist() == [[1, 60000, 3]]
    assert batch.labels_BS.tolist() == [[60000, 3, 65535]]
