"""`megalite data repair`: what is whole of a damaged store, as a new store."""

from dataclasses import dataclass
from pathlib import Path

from megalite.config.schema_data import DataRepairConfig
from megalite.config.validate_commands import validate_data_repair
from megalite.data.format import TokenStore
from megalite.data.manifest import Manifest
from megalite.data.writer import StoreWriter
from megalite.errors import DataError
from megalite.tokenizer import Tokenizer, load_tokenizer

from .byte_counts import ByteCounter
from .documents import copy_tokenizer, new_writer, writing
from .salvage import DamagedStore


@dataclass(frozen=True)
class RepairReport:
    """What a repair kept, lost and made anew. `problems`: file -> what was wrong with it."""

    problems: dict[str, str]
    documents: int
    tokens: int
    lost_documents: int
    lost_tokens: int
    lost_shards: list[str]  # damaged shards; with unverified=keep some of their documents may be there
    lost_tokenizer: bool
    unverified_documents: int  # kept from damaged shards
    recounted_documents: int  # whose byte counts were rebuilt


def repair_store(config: DataRepairConfig) -> RepairReport | None:
    """Write the documents of `config.store` that are whole to the new store `config.output`; None: nothing is damaged.

    A shard that is missing or whose digest differs is lost with its documents, since a digest tells that it changed but
    not where; with `unverified=keep` its documents stay that are complete and hold no id outside the vocabulary.
    Offsets that are damaged are rebuilt from the end-of-document tokens, byte counts by decoding.

    Raises `DataError` when the manifest cannot be read, when no document is left, and for a tokenizer given that is not
    the one that wrote the store; `ResourceError` when the disk gives out. The damaged store is not touched, and after
    an error nothing stands under `config.output`.
    """
    validate_data_repair(config)
    path, output = Path(config.store), Path(config.output)
    with writing(output):
        if _is_whole(path):
            return None
        store = DamagedStore(path)
        given = _matching_tokenizer(config.tokenizer.path, store.manifest) if config.tokenizer.path else None
        with new_writer(output, store.manifest) as writer:
            return _write(store, writer, given, config.unverified == "keep")


def _is_whole(path: Path) -> bool:
    try:
        TokenStore.open(path).verify()
    except DataError:
        return False
    return True


def _write(store: DamagedStore, writer: StoreWriter, given: Tokenizer | None, keep_unverified: bool) -> RepairReport:
    manifest = store.manifest
    counter: ByteCounter | None = None
    recounted = unverified = 0
    for documents in store.documents(keep_unverified):
        num_bytes = documents.num_bytes
        if num_bytes is None:
            counter = counter or _byte_counter(store, given)
            num_bytes = counter.count(documents.tokens, documents.lengths)
            recounted += len(num_bytes)
        writer.add_documents(documents.tokens, documents.lengths, num_bytes)
        unverified += 0 if documents.verified else len(documents.lengths)
    if not writer.num_documents:
        problems = "; ".join(f"{file} {problem}" for file, problem in store.problems.items())
        raise DataError(f"{store.path}: no document can be saved, build the store again. What is wrong: {problems}")
    if given:
        writer.add_tokenizer(given)
    elif store.tokenizer_whole:
        copy_tokenizer(store.path, manifest, writer)
    return RepairReport(
        problems=store.problems,
        documents=writer.num_documents,
        tokens=writer.num_tokens,
        lost_documents=manifest.num_documents - writer.num_documents,
        lost_tokens=manifest.num_tokens - writer.num_tokens,
        lost_shards=[shard.tokens.file for shard in manifest.shards if shard.tokens.file in store.problems],
        lost_tokenizer=not given and not store.tokenizer_whole,
        unverified_documents=unverified,
        recounted_documents=recounted,
    )


def _byte_counter(store: DamagedStore, given: Tokenizer | None) -> ByteCounter:
    """Counts what documents decode to. Raises `DataError` without the tokenizer that wrote them."""
    record = store.manifest.tokenizer
    if given is None and record is None:
        raise DataError(f"{store.path}: byte counts are damaged, and it holds no tokenizer to rebuild them by decoding")
    if given is None and not store.tokenizer_whole:
        raise DataError(
            f"{store.path}: byte counts must be rebuilt by decoding, but its tokenizer is damaged too: name a whole "
            "copy of it as tokenizer.path"
        )
    assert record is not None
    return ByteCounter(given or _matching_tokenizer(str(store.path / record.folder), store.manifest))


def _matching_tokenizer(path: str, manifest: Manifest) -> Tokenizer:
    """The tokenizer at `path`, which must be the one that the manifest names."""
    tokenizer = load_tokenizer(path)
    expected = manifest.tokenizer.digest if manifest.tokenizer else "none"
    if tokenizer.digest != expected:
        raise DataError(
            f"tokenizer.path: {path} has digest {tokenizer.digest}; the store was written by another, with digest "
            f"{expected}"
        )
    return tokenizer
