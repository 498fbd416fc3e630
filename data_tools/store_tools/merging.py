"""`megalite data merge`: one store of several."""

from dataclasses import dataclass
from pathlib import Path

from megalite.config.schema_data import DataMergeConfig
from megalite.config.validate_commands import validate_data_merge
from megalite.data.format import TokenStore
from megalite.errors import DataError

from .documents import copy_tokenizer, iter_documents, new_writer, open_whole, writing


@dataclass(frozen=True)
class StoreCounts:
    """A store that was written."""

    path: Path
    documents: int
    tokens: int
    bytes: int


def merge_stores(config: DataMergeConfig) -> StoreCounts:
    """Write the documents of the stores `config.input`, in that order, as one store.

    Raises `ConfigError` for fewer than two stores, `DataError` for a damaged one, one named twice, or one that another
    tokenizer wrote, `ResourceError` when the disk gives out. After an error nothing stands under `config.output`.
    """
    validate_data_merge(config)
    output = Path(config.output)
    with writing(output):
        stores = [open_whole(path) for path in config.input]
        _refuse_strangers(stores)
        sources = {store.manifest.source for store in stores}
        source = config.source or (sources.pop() if len(sources) == 1 else output.name)
        with new_writer(output, stores[0].manifest, source) as writer:
            for store in stores:
                for documents in iter_documents(store):
                    writer.add_documents(documents.tokens, documents.lengths, documents.num_bytes)
            copy_tokenizer(stores[0].path, stores[0].manifest, writer)
    return StoreCounts(output, writer.num_documents, writer.num_tokens, writer.num_bytes)


def _refuse_strangers(stores: list[TokenStore]) -> None:
    seen: dict[Path, Path] = {}
    for store in stores:
        if (same := seen.setdefault(store.path.resolve(), store.path)) is not store.path:
            raise DataError(f"input names one store twice: {same} and {store.path}")
    first = stores[0]
    for store in stores[1:]:
        for what, expected, found in zip(("tokenizer", "vocabulary", "end"), _ids(first), _ids(store), strict=True):
            if found != expected:
                raise DataError(
                    f"{store.path} cannot be merged with {first.path}: {what} {found} against {expected}; their ids "
                    "mean different text. Build both with one tokenizer"
                )


def _ids(store: TokenStore) -> tuple[str | None, int, int]:
    """What the ids of a store mean."""
    manifest = store.manifest
    return manifest.tokenizer.digest if manifest.tokenizer else None, manifest.vocab_size, manifest.end_of_document
