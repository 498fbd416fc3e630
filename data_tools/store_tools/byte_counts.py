"""How many bytes of text documents had, told from their ids."""

import random

import numpy as np
from numpy.typing import NDArray

from megalite.errors import DataError
from megalite.tokenizer import Tokenizer

_TRIES = 3  # random orders of the vocabulary, in which pieces must spell what they spell alone
_MAX_TABLE = 1 << 22  # ids


class ByteCounter:
    """Counts the UTF-8 bytes that documents decode to: those of the text itself where the tokenizer is lossless.

    Where every piece spells the same bytes whatever stands beside it, a table of them does; any other tokenizer (one
    that strips a first space, say) decodes document by document.
    """

    def __init__(self, tokenizer: Tokenizer):
        """Look at every piece of `tokenizer` once."""
        self._tokenizer = tokenizer
        self._table = _piece_bytes(tokenizer)

    def count(self, tokens: NDArray[np.integer], lengths: NDArray[np.int64]) -> NDArray[np.uint64]:
        """Bytes of each document [documents], which are side by side in `tokens`; `lengths`: tokens of each, 1 or more.

        Ids must be inside the vocabulary; control ids count nothing.
        """
        starts = np.cumsum(lengths) - lengths
        if self._table is not None:
            return np.add.reduceat(self._table[tokens], starts, dtype=np.uint64)
        ends = starts + lengths
        counts = [
            len(self._tokenizer.decode_bytes(tokens[start:end].tolist()))
            for start, end in zip(starts.tolist(), ends.tolist(), strict=True)
        ]
        return np.array(counts, np.uint64)


def _piece_bytes(tokenizer: Tokenizer) -> NDArray[np.uint64] | None:
    """Bytes that each id spells, by id; None when that depends on its neighbours."""
    if tokenizer.vocab_size > _MAX_TABLE:
        return None
    alone = {i: piece for i in range(tokenizer.vocab_size) if (piece := _piece(tokenizer, i)) is not None}
    ids = list(alone)
    order = random.Random(0)
    for _ in range(_TRIES):
        order.shuffle(ids)
        if tokenizer.decode_bytes(ids) != b"".join(alone[i] for i in ids):
            return None
    return np.array([len(alone.get(i, b"")) for i in range(tokenizer.vocab_size)], np.uint64)


def _piece(tokenizer: Tokenizer, i: int) -> bytes | None:
    """What one id spells; None where the vocabulary has a hole."""
    try:
        return tokenizer.decode_bytes([i])
    except DataError:
        return None
