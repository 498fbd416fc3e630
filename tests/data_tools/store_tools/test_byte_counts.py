import numpy as np
import pytest

from megalite.data_tools.store_tools.byte_counts import ByteCounter
from megalite.errors import DataError
from megalite.tokenizer import load_tokenizer
from tests.data_tools.corpora import texts

PIECES = {0: b"", 1: b"ab", 2: b"c", 4: b"defg"}


class Strange:
    """A tokenizer of three pieces; `join` makes text of them. Id 3 is a hole in the vocabulary."""

    vocab_size = 5

    def __init__(self, join):
        self.join = join
        self.calls = 0

    def decode_bytes(self, ids):
        self.calls += 1
        ids = list(ids)
        if 3 in ids:
            raise DataError("no id 3")
        return self.join([PIECES[i] for i in ids])


def test_bytes_of_text(tokenizer_path):
    tokenizer = load_tokenizer(tokenizer_path)
    corpus = texts()
    encoded = [[*tokenizer.encode(text), tokenizer.end_of_document] for text in corpus]
    counts = ByteCounter(tokenizer).count(np.concatenate(encoded), np.array([len(ids) for ids in encoded]))
    assert counts.tolist() == [len(text.encode()) for text in corpus]
    assert counts.dtype == np.uint64


@pytest.mark.parametrize(
    ("join", "by_table"),
    [
        (b"".join, True),
        (b" ".join, False),
        (lambda pieces: b"".join(pieces).removeprefix(b"a"), False),  # as a dummy prefix is stripped
    ],
)
def test_pieces_that_look_at_their_neighbours_are_decoded_together(join, by_table):
    tokenizer = Strange(join)
    counter = ByteCounter(tokenizer)
    tokenizer.calls = 0
    documents = [[1, 2, 4], [4], [2, 2, 1, 0]]
    counts = counter.count(np.concatenate(documents), np.array([3, 1, 4]))
    assert counts.tolist() == [len(join([PIECES[i] for i in ids])) for ids in documents]
    assert tokenizer.calls == (0 if by_table else 3)
