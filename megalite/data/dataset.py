"""The samples of a run: several stores, blended by weight, in the run's order. No torch.

Legend: N samples asked for, S sequence length.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from megalite.config.schema import DataConfig, Packing
from megalite.data.format import TokenStore
from megalite.data.mixture import Segment
from megalite.data.order import SampleOrder
from megalite.data.views import build_view

_MAX_MAPPED_FILES = 512  # of all stores together

_I64 = NDArray[np.int64]


@dataclass(frozen=True)
class SourceUse:
    """How much of one source a run has drawn."""

    store: TokenStore
    samples: int
    epochs: float


class BlendedDataset:
    """Samples of several stores in the order of a run; what a sample is, is its view's affair (`views.py`)."""

    def __init__(
        self,
        stores: Sequence[tuple[TokenStore, float]],
        sequence_length: int,
        seed: int,
        later: Sequence[Segment] = (),
        packing: Packing = "stream",
    ):
        """`stores` with their weights, `later`: other weights from a sample on.

        Raises `DataError` for a store that has no unit of S tokens or is not packed, and for unfit weights.
        """
        self.stores = [store for store, _ in stores]
        self.sequence_length = sequence_length
        for store in self.stores:
            store.max_mapped_files = max(_MAX_MAPPED_FILES // len(self.stores), 1)
        self.views = [build_view(store, packing, sequence_length) for store in self.stores]
        self.order = SampleOrder(seed, [view.num_units for view in self.views], [w for _, w in stores], later)
        self.sample_shape = self.views[0].shape
        # The widest of the stores' types, and wide enough to number the documents of a row.
        numbers = np.min_scalar_type(sequence_length) if packing != "stream" else np.dtype(np.uint8)
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

    def use(self, num_samples: int) -> list[SourceUse]:
        """What the first `num_samples` of the run draw from each source."""
        counts = self.order.mixture.counts(num_samples).tolist()
        return [
            SourceUse(view.store, count, count / max(view.num_units, 1))
            for view, count in zip(self.views, counts, strict=True)
        ]


def build_dataset(data: DataConfig, global_batch_size: int, seed: int) -> BlendedDataset:
    """The training samples of a configuration. Raises `DataError` for what is wrong with a store or a weight."""
    stores = [(TokenStore.open(store.path), store.weight) for store in data.train]
    later = [Segment(change.step * global_batch_size, change.weights) for change in data.schedule]
    return BlendedDataset(stores, data.sequence_length, seed, later, data.packing)
