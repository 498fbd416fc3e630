"""The samples of a run: several stores, blended by weight, in the run's order. No torch.

Legend: N samples asked for, S sequence length.
"""

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from megalite.config.schema import DataConfig, Packing
from megalite.data.format import TokenStore
from megalite.data.mixture import Segment
from megalite.data.order import SampleOrder
from megalite.data.skipping import WithoutDocuments, skipped_documents
from megalite.data.views import View, build_view

_MAX_MAPPED_FILES = 512  # of all stores together

_I64 = NDArray[np.int64]


@dataclass(frozen=True)
class SourceUse:
    """How much of one source a run has drawn."""

    store: TokenStore
    samples: int
    epochs: float


@dataclass(frozen=True)
class DocumentPart:
    """A part of a document in a sample."""

    sample: int  # counted from the run's start
    source: int  # the store's number in data.train
    document: int  # its index in the store
    start: int  # the part's first token in the document, and the one behind its last
    stop: int
    num_tokens: int  # of the whole document, its end included


class BlendedDataset:
    """Samples of several stores in the order of a run; what a sample is, is its view's affair (`views.py`)."""

    def __init__(
        self,
        stores: Sequence[tuple[TokenStore, float]],
        sequence_length: int,
        seed: int,
        later: Sequence[Segment] = (),
        packing: Packing = "stream",
        skipped: Mapping[int, set[int]] | None = None,
    ):
        """`stores` with their weights, `later`: other weights from a sample on; `skipped`: documents by store.

        Raises `DataError` for a store that has no unit of S tokens or is not packed, and for unfit weights.
        """
        self.stores = [store for store, _ in stores]
        self.sequence_length = sequence_length
        for store in self.stores:
            store.max_mapped_files = max(_MAX_MAPPED_FILES // len(self.stores), 1)
        self.views: list[View] = [build_view(store, packing, sequence_length) for store in self.stores]
        if skipped:
            self.views = [WithoutDocuments(view, skipped.get(source, ())) for source, view in enumerate(self.views)]
        self.order = SampleOrder(seed, [view.num_units for view in self.views], [w for _, w in stores], later)
        self.sample_shape = self.views[0].shape
        # The widest of the stores' types, and wide enough to number the documents of a row.
        numbers = np.min_scalar_type(sequence_length) if len(self.sample_shape) > 1 else np.dtype(np.uint8)
        self.dtype: np.dtype[Any] = np.result_type(numbers, *(store.dtype for store in self.stores))

    def samples(self, indices: ArrayLike) -> NDArray[Any]:
        """The samples `indices` [N] of the run's order: [N, *sample_shape], in the stores' dtype."""
        sources, units, _ = self.order.locate(indices)
        out = np.empty((len(sources), *self.sample_shape), self.dtype)
        self.read(sources, units, out)
        return out

    def read(self, sources: _I64, units: _I64, out: NDArray[Any]) -> None:
        """Fill `out` [N, *sample_shape] with units of sources, both [N] and as the order gives them."""
        if len(self.views) == 1:
            self.views[0].read(units, out)
            return
        for source in sorted(set(sources.tolist())):
            rows = np.flatnonzero(sources == source)
            part = np.empty((len(rows), *self.sample_shape), self.dtype)
            self.views[source].read(units[rows], part)
            out[rows] = part

    def documents(self, samples: Sequence[int]) -> Iterator[DocumentPart]:
        """What the samples are made of, one after the other."""
        sources, units, _ = self.order.locate(samples)
        for sample, source, unit in zip(samples, sources.tolist(), units.tolist(), strict=True):
            store = self.stores[source]
            for start, stop in self.views[source].ranges(unit):
                first, last = store.document_at([start, stop - 1]).tolist()
                offsets = store.offsets_of_documents(first, last + 1).tolist()
                for document, (begin, end) in enumerate(itertools.pairwise(offsets), first):
                    part = max(start, begin) - begin, min(stop, end) - begin
                    yield DocumentPart(sample, source, document, *part, end - begin)

    def use(self, num_samples: int) -> list[SourceUse]:
        """What the first `num_samples` of the run draw from each source."""
        counts = self.order.mixture.counts(num_samples).tolist()
        return [
            SourceUse(view.store, count, count / max(view.num_units, 1))
            for view, count in zip(self.views, counts, strict=True)
        ]


def build_dataset(data: DataConfig, global_batch_size: int, seed: int) -> BlendedDataset:
    """The training samples of a configuration.

    Raises `DataError` for what is wrong with a store or a weight, `ConfigError` for a skipped document that is none.
    """
    stores = [(TokenStore.open(store.path), store.weight) for store in data.train]
    later = [Segment(change.step * global_batch_size, change.weights) for change in data.schedule]
    skipped = skipped_documents(data, [store for store, _ in stores])
    return BlendedDataset(stores, data.sequence_length, seed, later, data.packing, skipped)
