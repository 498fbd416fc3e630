"""Micro batches of one rank, on the host.

Legend: G global batch size, B micro batch size, S sequence length.
"""

import numpy as np
import torch

from megalite.data.dataset import BlendedDataset
from megalite.errors import ConfigError

_LOCATED_AHEAD = 4096  # samples looked up in the order at once: a tenth of the time that few at a time take


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
        micro_starts = np.arange(data_rank, global_batch_size // micro_batch_size, data_size) * micro_batch_size
        self._own = (micro_starts[:, None] + np.arange(micro_batch_size)).ravel()  # of a global batch
        self._located_from = 0
        self._sources = self._units = np.empty((0, len(self._own)), np.int64)  # [steps, own samples of a step]

    def micro_batches(self, samples_consumed: int) -> list[torch.Tensor]:
        """The micro batches of the step that begins at sample `samples_consumed`, on the host.

        Each is [B, S + 1], or [B, 3, S] where documents are packed, in the stores' own unsigned type: on a GPU a
        quarter of the bytes of int64 to copy.
        """
        sources, units = self._locate(samples_consumed)
        numpy_dtype = self.dataset.dtype
        dtype = {2: torch.uint16, 4: torch.uint32}[numpy_dtype.itemsize]
        # One buffer, read into in place; its parts are pinned as it is.
        ids = torch.empty((len(units), *self.dataset.sample_shape), dtype=dtype, pin_memory=self._pin)
        self.dataset.read(sources, units, ids.numpy())
        return list(ids.split(self.micro_batch_size))

    def _locate(self, samples_consumed: int) -> tuple[np.ndarray, np.ndarray]:
        """Sources and units of this rank's samples of a step."""
        step, rest = divmod(samples_consumed - self._located_from, self.global_batch_size)
        if rest or not 0 <= step < len(self._units):
            steps = -(-_LOCATED_AHEAD // len(self._own))
            starts = samples_consumed + np.arange(steps) * self.global_batch_size
            sources, units, _ = self.dataset.order.locate((starts[:, None] + self._own).ravel())
            self._sources, self._units = sources.reshape(steps, -1), units.reshape(steps, -1)
            self._located_from, step = samples_consumed, 0
        return self._sources[step], self._units[step]
