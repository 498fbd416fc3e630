"""A safetensors file written tensor by tensor: the library's own writer wants all of a file in memory.

Format: 8 bytes, little endian: length of the header; the header, JSON, padded with spaces to a multiple of 8 bytes:
name -> dtype, shape, data_offsets; then the tensors' bytes (https://huggingface.co/docs/safetensors).
"""

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path

import xxhash

from megalite.failpoints import failpoint

DTYPE_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}


class TensorFileWriter:
    """Writes the tensors that the header announces, in its order; use as a context manager."""

    def __init__(self, path: Path, tensors: Mapping[str, tuple[str, tuple[int, ...]]]):
        """`tensors`: dtype (a key of `DTYPE_BYTES`) and shape by name, in the order in which they will be written."""
        header: dict[str, object] = {"__metadata__": {"format": "pt"}}
        start = 0
        for name, (dtype, shape) in tensors.items():
            end = start + DTYPE_BYTES[dtype] * math.prod(shape)
            header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [start, end]}
            start = end
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        self._left = start
        self._digest = xxhash.xxh3_128()
        self.num_bytes = 0
        self._file = open(path, "wb")  # noqa: SIM115 (closed by __exit__)
        self._put(len(text).to_bytes(8, "little") + text)

    def __enter__(self) -> "TensorFileWriter":
        return self

    def write(self, data: bytes | memoryview) -> None:
        """The bytes of the next tensor, row by row, little endian."""
        size = memoryview(data).nbytes
        assert size <= self._left, f"{size} bytes, the header has room for {self._left}"
        self._left -= size
        self._put(data)

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        """Sync and close."""
        with self._file:
            if kind is None:
                assert self._left == 0, f"{self._left} bytes that the header announces were not written"
                self._file.flush()
                failpoint("before fsync")
                os.fsync(self._file.fileno())

    @property
    def digest(self) -> str:
        """xxh3_128 of the file, in hexadecimal."""
        return self._digest.hexdigest()

    def _put(self, data: bytes | memoryview) -> None:
        self._file.write(data)
        self._digest.update(data)
        self.num_bytes += memoryview(data).nbytes
