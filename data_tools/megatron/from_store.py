"""A token store -> a dataset that Megatron reads."""

import os
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Final

import numpy as np
from numpy.typing import NDArray

from megalite.config.schema_data import DataConvertConfig
from megalite.config.validate_commands import validate_data_convert
from megalite.data.files import new_directory
from megalite.data.format import TokenStore
from megalite.errors import DataError

from ..store_tools.documents import iter_documents, open_whole, writing
from .index import MAGIC, VERSION, bin_path, idx_path

# Type codes of .idx. Megatron has no unsigned 32-bit ids.
_WRITTEN: Final[dict[np.dtype[Any], tuple[int, np.dtype[Any]]]] = {
    np.dtype("<u2"): (8, np.dtype("<u2")),
    np.dtype("<u4"): (4, np.dtype("<i4")),
}
_INT32_MAX = 2**31 - 1


@dataclass(frozen=True)
class ExportReport:
    """What a conversion to Megatron's files wrote. `prefix`: what Megatron's --data-path takes."""

    prefix: Path
    documents: int
    tokens: int
    dtype: str


def export_store(config: DataConvertConfig) -> ExportReport:
    """Write the token store `config.input` as output/<name>.bin and .idx (MMIDIDX), a sequence for each document.

    Documents keep their end-of-document token, as with Megatron's --append-eod, unless `keep_ends=false`. Raises
    `DataError` for a damaged store and for one with ids or documents too large for the format, `ResourceError` when the
    disk gives out.
    """
    validate_data_convert(config)
    output = Path(config.output)
    with writing(output):
        store = open_whole(config.input)
        if not store.num_documents:
            raise DataError(f"{store.path} holds no document, and Megatron reads no empty dataset")
        code, dtype = _WRITTEN[store.dtype]
        with new_directory(output) as temporary:
            prefix = temporary / output.name
            with open(bin_path(prefix), "xb") as file:
                num_tokens = sum(_write(file, tokens) for tokens in _ids(store, dtype, config.keep_ends))
                _sync(file)
            with open(idx_path(prefix), "xb") as file:
                _write_index(file, store, code, dtype.itemsize, config.keep_ends)
                _sync(file)
    return ExportReport(output / output.name, store.num_documents, num_tokens, dtype.name)


def _ids(store: TokenStore, dtype: np.dtype[Any], keep_ends: bool) -> Iterator[NDArray[Any]]:
    """The ids of .bin, in blocks."""
    for documents in iter_documents(store):
        if int(documents.tokens.max()) > np.iinfo(dtype).max:
            raise DataError(f"{store.path}: token id {documents.tokens.max()} does not fit Megatron's {dtype.name}")
        tokens = documents.tokens.astype(dtype, copy=False)
        yield tokens if keep_ends else np.delete(tokens, np.cumsum(documents.lengths) - 1)


def _write_index(file: BinaryIO, store: TokenStore, code: int, itemsize: int, keep_ends: bool) -> None:
    """The fields of an index, in blocks; `index.py` describes them."""
    count = store.num_documents
    file.write(MAGIC + struct.pack("<QBQQ", VERSION, code, count, count + 1))
    for lengths in _lengths(store, keep_ends):
        if int(lengths.max()) > _INT32_MAX:
            raise DataError(f"{store.path}: a document has {lengths.max()} tokens, Megatron counts to {_INT32_MAX}")
        _write(file, lengths.astype("<i4"))
    position = 0
    for lengths in _lengths(store, keep_ends):
        ends = position + np.cumsum(lengths * itemsize)
        _write(file, (ends - lengths * itemsize).astype("<i8"))
        position = int(ends[-1])
    step = 1 << 20
    for first in range(0, count + 1, step):
        _write(file, np.arange(first, min(first + step, count + 1), dtype="<i8"))


def _lengths(store: TokenStore, keep_ends: bool) -> Iterator[NDArray[np.int64]]:
    """Tokens of each document, in blocks."""
    step = 1 << 20
    for first in range(0, store.num_documents, step):
        bounds = store.offsets_of_documents(first, min(first + step, store.num_documents))
        yield np.diff(bounds) - (0 if keep_ends else 1)


def _write(file: BinaryIO, values: NDArray[Any]) -> int:
    """Append numbers; how many they are."""
    file.write(values.tobytes())
    return len(values)


def _sync(file: BinaryIO) -> None:
    file.flush()
    os.fsync(file.fileno())
