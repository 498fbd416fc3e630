"""A file under a read-only map, whose size is looked at before it is read."""

import mmap
import os
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megalite.errors import DataError


class MappedFile:
    """Numbers in a file, mapped: `values` is a plain read-only array (slicing `np.memmap` costs ten times as much).

    Reading a page of the map that lies beyond the end of a file that was cut kills the process with SIGBUS: call
    `check` before reading, once for many values. It asks the open file, so one that was replaced under its name, whose
    old content stays mapped, passes.
    """

    def __init__(self, file: Path, num_bytes: int, dtype: np.dtype[Any]):
        """Map `num_bytes` of `file`. Raises `DataError` when it is missing or of another size."""
        self._file, self._num_bytes = file, num_bytes
        self._map: mmap.mmap | None = None
        try:
            descriptor = os.open(file, os.O_RDONLY)
        except FileNotFoundError:
            raise DataError(f"{file} is missing: it was there when it was looked at first") from None
        try:
            self._check_size(os.fstat(descriptor).st_size)
            if num_bytes:  # an empty file cannot be mapped
                self._map = mmap.mmap(descriptor, num_bytes, access=mmap.ACCESS_READ)
        finally:
            os.close(descriptor)
        self.values: NDArray[Any] = np.frombuffer(self._map, dtype) if self._map else np.empty(0, dtype)

    def check(self) -> None:
        """Raise `DataError` when the file has changed its size since it was mapped."""
        if self._map is not None:
            self._check_size(self._map.size())

    def _check_size(self, found: int) -> None:
        if found != self._num_bytes:
            raise DataError(
                f"{self._file} has {found} bytes, {self._num_bytes} are expected: it was changed while in use; restore "
                "it, or build it again"
            )
