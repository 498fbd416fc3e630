"""`megalite data split`: several stores of one."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import xxhash
from numpy.typing import NDArray

from megalite.config.schema_data import DataSplitConfig
from megalite.config.validate_commands import validate_data_split
from megalite.data.files import new_directory
from megalite.data.format import TokenStore
from megalite.data.order import permute
from megalite.errors import DataError

from .documents import Documents, copy_tokenizer, iter_documents, new_writer, open_whole, writing
from .merging import StoreCounts


def split_store(config: DataSplitConfig) -> list[StoreCounts]:
    """Cut the store `config.store` into stores below `config.output`; documents stay whole and in order.

    `parts`: part_0 .. of contiguous documents, about the same number of tokens in each. `fraction`: so much of the
    documents, drawn by `seed`, into validation/<source>, the rest into train/<source>, as `megalite data build` does.
    Raises `ConfigError` for values out of range, `DataError` for a damaged store or one with too few documents,
    `ResourceError` when the disk gives out. After an error nothing stands under `config.output`.
    """
    validate_data_split(config)
    output = Path(config.output)
    with writing(output):
        store = open_whole(config.store)
        pieces = _contiguous(store, config.parts) if config.parts else _drawn(store, config.fraction or 0, config.seed)
        with new_directory(output) as temporary:
            counts = [_write(store, temporary, name, documents) for name, documents in pieces]
    return [StoreCounts(output / count.path, count.documents, count.tokens, count.bytes) for count in counts]


def _write(store: TokenStore, folder: Path, name: str, blocks: Iterator[Documents]) -> StoreCounts:
    with new_writer(folder / name, store.manifest) as writer:
        for documents in blocks:
            writer.add_documents(documents.tokens, documents.lengths, documents.num_bytes)
        copy_tokenizer(store.path, store.manifest, writer)
    return StoreCounts(Path(name), writer.num_documents, writer.num_tokens, writer.num_bytes)


def _contiguous(store: TokenStore, parts: int) -> list[tuple[str, Iterator[Documents]]]:
    if store.num_documents < parts:
        raise DataError(f"{store.path} has {store.num_documents} documents, too few for parts={parts}")
    bounds = [0]
    for part in range(1, parts):
        # The document that holds this share of the tokens begins a part, and every part has one at least.
        at = int(store.document_at([part * store.num_tokens // parts])[0])
        bounds.append(min(max(at, bounds[-1] + 1), store.num_documents - (parts - part)))
    bounds.append(store.num_documents)
    width = len(str(parts - 1))
    return [(f"part_{part:0{width}d}", iter_documents(store, bounds[part], bounds[part + 1])) for part in range(parts)]


def _drawn(store: TokenStore, fraction: float, seed: int) -> list[tuple[str, Iterator[Documents]]]:
    drawn = round(fraction * store.num_documents)
    if not 0 < drawn < store.num_documents:
        raise DataError(
            f"{store.path} has {store.num_documents} documents: fraction={fraction} draws {drawn}, which "
            "leaves one side empty"
        )
    key = xxhash.xxh3_64_intdigest(f"megalite data split {seed}".encode())
    # A source names one folder, whatever it holds.
    source = store.manifest.source.replace("/", "_").strip(". ") or "data"
    return [
        (f"train/{source}", _chosen(store, key, drawn, store.num_documents)),
        (f"validation/{source}", _chosen(store, key, 0, drawn)),
    ]


def _chosen(store: TokenStore, key: int, first: int, last: int) -> Iterator[Documents]:
    """The documents whose place in a keyed permutation of all lies in `first` .. `last`: exactly so many."""
    start = 0
    for documents in iter_documents(store):
        index = np.arange(start, start + len(documents.lengths), dtype=np.int64)
        start += len(index)
        place: NDArray[np.int64] = permute(
            index, np.full(len(index), store.num_documents, np.int64), np.full(len(index), key, np.uint64)
        )
        yield documents.where((place >= first) & (place < last))
