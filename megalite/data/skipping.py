"""Documents that a run must not learn from: their tokens stay where they are, and none of them is predicted.

Other documents of the same sequence still see them, unless `data.document_attention` keeps attention within each. The
order of samples does not change, so a run can be given a list of them at any checkpoint. Legend: S sequence length.
"""

from collections.abc import Collection, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from megalite.config.schema import DataConfig
from megalite.data.format import TokenStore
from megalite.data.views import View
from megalite.errors import ConfigError


class WithoutDocuments:
    """A view whose samples are [3, S]: tokens, labels, and 0 where a label is a token of a skipped document.

    Elsewhere the third row numbers documents as the view does, or, for windows of the stream, from 1.
    """

    def __init__(self, view: View, skipped: Collection[int]):
        """`skipped`: indices of documents in the view's store."""
        self.store, self.num_units, self._view = view.store, view.num_units, view
        self._skipped = np.array(sorted(skipped), np.int64)
        packed = len(view.shape) == 2
        self.shape: tuple[int, ...] = view.shape if packed else (3, view.shape[0] - 1)
        self._packed = packed

    def read(self, units: NDArray[np.int64], out: NDArray[np.unsignedinteger]) -> None:
        """See `View`."""
        if self._packed:
            self._view.read(units, out)
        else:
            windows = np.empty((len(units), *self._view.shape), out.dtype)
            self._view.read(units, windows)
            out[:, 0], out[:, 1] = windows[:, :-1], windows[:, 1:]
        for sample_3S, unit in zip(out, units.tolist(), strict=True):
            positions = np.concatenate([np.arange(*part) for part in self._view.ranges(unit)])
            documents = self.store.document_at(positions)
            if not self._packed:
                sample_3S[2] = documents[:-1] - documents[0] + 1
                documents = documents[1:]  # the labels'
            sample_3S[2, : len(documents)][np.isin(documents, self._skipped)] = 0

    def ranges(self, unit: int) -> list[tuple[int, int]]:
        """See `View`."""
        return self._view.ranges(unit)

    def units_of(self, start: int, stop: int) -> list[int]:
        """See `View`."""
        return self._view.units_of(start, stop)


def find_document(name: str, key: str, data: DataConfig, stores: Sequence[TokenStore]) -> tuple[int, int]:
    """The source's and the document's number of SOURCE:INDEX, where SOURCE may be the store's path.

    Raises `ConfigError`, naming `key`, for one that does not exist.
    """
    source, _, index = name.rpartition(":")
    found = [i for i, store in enumerate(data.train) if source in (store.source, store.path)]
    if not index.isdecimal() or len(found) != 1:
        known = ", ".join(f"{store.source} ({store.path})" for store in data.train)
        raise ConfigError(f"{key}: found {name!r}, expected SOURCE:INDEX with one of the run's: {known}")
    num_documents = stores[found[0]].num_documents
    if int(index) >= num_documents:
        raise ConfigError(f"{key}: found {name!r}, but {source} has documents 0 to {num_documents - 1}")
    return found[0], int(index)


def skipped_documents(data: DataConfig, stores: Sequence[TokenStore]) -> Mapping[int, set[int]]:
    """The documents of `data.skip_documents` by the number of their source. Raises as `find_document` does."""
    skipped: dict[int, set[int]] = {}
    for name in data.skip_documents:
        source, document = find_document(name, "data.skip_documents", data, stores)
        skipped.setdefault(source, set()).add(document)
    return skipped
