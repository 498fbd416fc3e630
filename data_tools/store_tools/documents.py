"""Documents of token stores in blocks: what merge, split, stats and convert share."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megalite.data.files import disk_errors
from megalite.data.format import TokenStore
from megalite.data.manifest import Manifest, TokenizerRecord
from megalite.data.writer import StoreWriter
from megalite.errors import DataError

BLOCK_TOKENS = 1 << 22  # read at a time, unless one document alone is longer: 8 or 16 MiB


@dataclass(frozen=True)
class Documents:
    """Documents side by side: ids [tokens], tokens of each with its end [documents], text bytes of each [documents]."""

    tokens: NDArray[Any]
    lengths: NDArray[np.int64]
    num_bytes: NDArray[np.uint64]

    def where(self, chosen: NDArray[np.bool_]) -> "Documents":
        """The documents that `chosen` [documents] marks."""
        if chosen.all():
            return self
        tokens = self.tokens[np.repeat(chosen, self.lengths)]
        return Documents(tokens, self.lengths[chosen], self.num_bytes[chosen])


def iter_ranges(offsets: NDArray[np.uint64], first: int, last: int) -> Iterator[tuple[int, int]]:
    """Ranges that cut the documents `first` .. `last` into blocks of at most BLOCK_TOKENS tokens, or of one document.

    `offsets`: where each document starts, increasing. Only a logarithmic number of them is read.
    """
    while first < last:
        # As uint64: a signed number would make numpy copy all offsets as floats.
        limit = np.uint64(min(int(offsets[first]) + BLOCK_TOKENS, 2**64 - 1))
        stop = first + int(np.searchsorted(offsets[first : last + 1], limit, side="right")) - 1
        stop = max(stop, first + 1)
        yield first, stop
        first = stop


def iter_documents(store: TokenStore, first: int = 0, last: int | None = None) -> Iterator[Documents]:
    """The documents `first` .. `last` of a store, in blocks. Raises `DataError` where their offsets make no sense."""
    last = store.num_documents if last is None else last
    for shard in range(store.num_shards):
        begin, end = (int(number) for number in store.document_starts[shard : shard + 2])
        offsets = store.shard_offsets(shard)
        for start, stop in iter_ranges(offsets, max(first - begin, 0), min(last, end) - begin):
            bounds = store.offsets_of_documents(begin + start, begin + stop)
            tokens = store.tokens(int(bounds[0]), int(bounds[-1]))
            yield Documents(tokens, np.diff(bounds), store.bytes_of_documents(begin + start, begin + stop))


def open_whole(path: str | Path) -> TokenStore:
    """The store at `path`, every byte compared with its digest: a copy would give damage a digest of its own."""
    store = TokenStore.open(path)
    try:
        store.verify()
    except DataError as error:
        raise DataError(f"{error}, or mend it with `megalite data repair`") from None
    return store


def new_writer(path: Path, manifest: Manifest, source: str | None = None) -> StoreWriter:
    """A writer of a store with the vocabulary of `manifest`, and its source unless another is given."""
    return StoreWriter(
        path,
        vocab_size=manifest.vocab_size,
        end_of_document=manifest.end_of_document,
        source=manifest.source if source is None else source,
    )


def copy_tokenizer(store: Path, manifest: Manifest, writer: StoreWriter) -> None:
    """Give `writer` the tokenizer that lies in `store`, byte for byte, if there is one."""
    if manifest.tokenizer is not None:
        writer.add_tokenizer(_StoredTokenizer(store, manifest.tokenizer))


class _StoredTokenizer:
    """The tokenizer files of a store, as a writer takes them; no library is needed to copy them."""

    def __init__(self, store: Path, record: TokenizerRecord):
        self.name = record.name
        self.digest = record.digest
        self._store = store
        self._record = record

    def save(self, folder: Path) -> None:
        for record in self._record.files:
            file = folder / Path(record.file).relative_to(self._record.folder)
            file.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(self._store / record.file, file)


@contextmanager
def writing(output: Path) -> Iterator[None]:
    """Refuse an `output` that exists, before any work is done; turn what the disk says into a `ResourceError`."""
    with disk_errors(output):
        if output.is_symlink() or output.exists():
            raise DataError(f"{output} exists already: choose another output")
        yield
