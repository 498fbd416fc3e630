"""Views of a store: what the units are that a run's order permutes, and how a sample is read from one.

Legend: N samples, S sequence length.
"""

from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from megalite.config.schema import Packing
from megalite.data.format import TokenStore
from megalite.data.packing import PackedRows
from megalite.errors import DataError

_I64 = NDArray[np.int64]


class View(Protocol):
    """The units of one store."""

    store: TokenStore
    num_units: int
    shape: tuple[int, ...]  # of one sample

    def read(self, units: _I64, out: NDArray[np.unsignedinteger]) -> None:
        """Fill `out` [N, *shape] with the samples `units` [N]."""

    def ranges(self, unit: int) -> list[tuple[int, int]]:
        """The tokens of the store's stream that a unit is made of: (first, end)."""

    def units_of(self, start: int, stop: int) -> list[int]:
        """The units that hold tokens of `start` .. `stop` of the stream."""


def build_view(store: TokenStore, packing: Packing, sequence_length: int) -> View:
    """The view named in the configuration. Raises `DataError` when the store cannot be looked at that way."""
    if packing == "stream":
        return Windows(store, sequence_length)
    return PackedDocuments(store, PackedRows.open(store, packing, sequence_length))


class Windows:
    """Windows of S + 1 tokens at stride S over the stream: a sample is [S + 1], S tokens and what follows each.

    The last token of a window is the first of the next, so that every token but the first of the stream is a label
    once an epoch. Windows run over document boundaries.
    """

    def __init__(self, store: TokenStore, sequence_length: int):
        """Raises `DataError` for a store shorter than one window."""
        if store.num_tokens < sequence_length + 1:
            raise DataError(
                f"{store.path} holds {store.num_tokens} tokens, one window needs {sequence_length + 1}: use a longer "
                f"text, or set data.sequence_length to {max(store.num_tokens - 1, 0)} or less"
            )
        self.store, self._length = store, sequence_length
        self.num_units = (store.num_tokens - 1) // sequence_length
        self.shape: tuple[int, ...] = (sequence_length + 1,)

    def read(self, units: _I64, out: NDArray[np.unsignedinteger]) -> None:
        """See `View`."""
        self.store.read_rows(units * self._length, out)

    def ranges(self, unit: int) -> list[tuple[int, int]]:
        """See `View`."""
        return [(unit * self._length, (unit + 1) * self._length + 1)]

    def units_of(self, start: int, stop: int) -> list[int]:
        """See `View`."""
        first = -(-(start - self._length) // self._length)  # a window's last label is the next one's first token
        return list(range(max(first, 0), min((stop - 1) // self._length + 1, self.num_units)))


class PackedDocuments:
    """Rows of whole documents: a sample is [3, S]: tokens, labels, and the number in the row of each one's document.

    The labels are the documents' tokens, ends included, every one once an epoch. Each is predicted from the tokens of
    its own document before it; a document begins after an end-of-document token, as in evaluation and in the stream.
    The rest of a document longer than S begins after its own token before that. Documents are numbered from 1; 0 is
    padding, which counts nowhere.
    """

    def __init__(self, store: TokenStore, rows: PackedRows):
        """A view of `store` through its packing."""
        self.store, self._rows = store, rows
        self.num_units = rows.num_rows
        self.fill = rows.manifest.fill
        self.shape: tuple[int, ...] = (3, rows.manifest.sequence_length)

    def read(self, units: _I64, out: NDArray[np.unsignedinteger]) -> None:
        """See `View`."""
        end = self.store.manifest.end_of_document
        out[:, :2], out[:, 2] = end, 0
        for sample_3S, unit in zip(out, units.tolist(), strict=True):
            place = 0
            for number, (start, length) in enumerate(self._rows.pieces(unit), 1):
                stop = place + length
                if stop > sample_3S.shape[1] or start + length > self.store.num_tokens:
                    raise DataError(f"{self._rows.path} is damaged: row {unit} does not fit; make it again")
                # With the token before; none stands before the first document.
                context = self.store.tokens(max(start - 1, 0), start + length)
                sample_3S[0, stop - len(context) + 1 : stop] = context[:-1]
                sample_3S[1, place:stop] = context[-length:]
                sample_3S[2, place:stop] = number
                place = stop

    def ranges(self, unit: int) -> list[tuple[int, int]]:
        """See `View`."""
        return [(start, start + length) for start, length in self._rows.pieces(unit)]

    def units_of(self, start: int, stop: int) -> list[int]:
        """See `View`."""
        return self._rows.rows_of(start, stop).tolist()
