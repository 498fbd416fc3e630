"""Samples and micro batches from token stores.

Legend: G global batch size, B micro batch size, S sequence length, N samples asked for.
"""

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray

from megalite.data.format import TokenStore
from megalite.data.order import SampleOrder
from megalite.errors import ConfigError, DataError


class BlendedDataset:
    """Windows of S + 1 tokens at stride S over the streams of several stores, blended by weight.

    The last token of a window is the first of the next, so that every token but the first of a stream is a target
    once an epoch. Windows run over document boundaries.
    """

    def __init__(self, stores: Sequence[tuple[TokenStore, float]], sequence_length: int, seed: int):
        """Raises `DataError` for a store shorter than one window, and for unfit weights (see `SampleOrder`)."""
        self.stores = [store for store, _ in stores]
        self.sequence_length = sequence_length
        for store in self.stores:
            if store.num_tokens < sequence_length + 1:
                raise DataError(
                    f"{store.path} holds {store.num_tokens} tokens, one window needs {sequence_length + 1}: use a "
                    f"longer text, or set data.sequence_length to {max(store.num_tokens - 1, 0)} or less"
                )
        self.num_windows = [(store.num_tokens - 1) // sequence_length for store in self.stores]
        self.order = SampleOrder(seed, self.num_windows, [weight for _, weight in stores])

    def samples(self, indices: ArrayLike) -> NDArray[np.int64]:
        """The samples `indices` [N] of the run's order, as ids [N, S + 1]."""
        sources, windows, _ = self.order.locate(indices)
        out_NS = np.empty((len(sources), self.sequence_length + 1), np.int64)
        for row, (source, window) in enumerate(zip(sources.tolist(), windows.tolist(), strict=True)):
            start = window * self.sequence_length
            out_NS[row] = self.stores[source].tokens(start, start + self.sequence_length + 1)
        return out_NS


class Loader:
    """One data-parallel rank's part of every global batch.

    A step that begins at sample n takes samples n .. n + G - 1. Its m-th micro batch on data rank r is the B samples
    from n + (m * data_size + r) * B, so for any data size and accumulation the same samples make up the same step.
    """

    def __init__(
        self,
        dataset: BlendedDataset,
        global_batch_size: int,
        micro_batch_size: int,
        data_rank: int,
        data_size: int,
        pin: bool = False,
    ):
        """Batch sizes in sequences; `pin` puts batches where a GPU copies them without blocking the host.

        Raises `ConfigError` when G is not a multiple of B * data_size.
        """
        if global_batch_size % (micro_batch_size * data_size):
            raise ConfigError(
                f"trainer.global_batch_size {global_batch_size} is not a multiple of trainer.micro_batch_size "
                f"{micro_batch_size} x data axis {data_size}"
            )
        self.dataset = dataset
        self.global_batch_size = global_batch_size
        self.micro_batch_size = micro_batch_size
        self.data_rank = data_rank
        self.data_size = data_size
        self._pin = pin

    def micro_batches(self, samples_consumed: int) -> list[torch.Tensor]:
        """The micro batches of the step that begins at sample `samples_consumed`, each [B, S + 1] int64 on the host."""
        batches = []
        for micro in range(self.global_batch_size // (self.micro_batch_size * self.data_size)):
            start = samples_consumed + (micro * self.data_size + self.data_rank) * self.micro_batch_size
            ids_BS = torch.from_numpy(self.dataset.samples(np.arange(start, start + self.micro_batch_size)))
            batches.append(ids_BS.pin_memory() if self._pin else ids_BS)
        return batches
