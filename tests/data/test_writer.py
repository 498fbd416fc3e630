"""Documents side by side make the store that they make one by one."""

import numpy as np
import pytest

from megalite.data.format import TokenStore
from megalite.data.writer import StoreWriter
from megalite.errors import DataError

END = 0


def new_writer(path, shard_tokens=10**9):
    return StoreWriter(path, vocab_size=100, end_of_document=END, shard_tokens=shard_tokens)


@pytest.mark.parametrize("seed", range(20))
def test_batches_of_any_size_make_the_same_bytes(tmp_path, seed):
    rng = np.random.default_rng(seed)
    documents = [rng.integers(1, 100, rng.integers(0, 12)) for _ in range(30)]
    shard_tokens = int(rng.integers(1, 25))
    with new_writer(tmp_path / "single", shard_tokens) as writer:
        for ids in documents:
            writer.add_document(ids, 3 * len(ids))
    with new_writer(tmp_path / "batches", shard_tokens) as writer:
        rest = documents
        while rest:
            count = int(rng.integers(0, 8))
            batch, rest = rest[:count], rest[count:]
            tokens = np.concatenate([[], *(np.append(ids, END) for ids in batch)]).astype(np.uint16)
            lengths = np.array([len(ids) + 1 for ids in batch], np.int64)
            writer.add_documents(tokens, lengths, 3 * (lengths - 1))
    single, batches = TokenStore.open(tmp_path / "single"), TokenStore.open(tmp_path / "batches")
    assert batches.digest == single.digest
    batches.verify()
    for index, ids in enumerate(documents):
        assert batches.document(index).tolist() == [*ids, END]


@pytest.mark.parametrize(
    ("tokens", "lengths"),
    [([1, 2, END], [2, 1]), ([1, 2], [2]), ([1, END], [3]), ([1, END, END], [2]), ([1, END], [2, 0])],
)
def test_documents_without_their_end_are_refused(tmp_path, tokens, lengths):
    with pytest.raises(DataError, match="do not end with the end-of-document token 0"), new_writer(tmp_path / "s") as w:
        w.add_documents(np.array(tokens, np.uint16), np.array(lengths), np.array([1] * len(lengths)))
    assert not list(tmp_path.iterdir())


def test_batches_with_ids_outside_the_vocabulary_are_refused(tmp_path):
    with pytest.raises(DataError, match="do not fit a vocabulary of 100"), new_writer(tmp_path / "s") as writer:
        writer.add_documents(np.array([100, END], np.uint16), np.array([2]), np.array([1]))
