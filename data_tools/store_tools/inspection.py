"""Look at token stores and check them: `megalite data verify` and `megalite data inspect`."""

from dataclasses import dataclass
from pathlib import Path

from megalite.data.format import TokenStore
from megalite.data.manifest import MANIFEST
from megalite.errors import DataError
from megalite.tokenizer import Tokenizer, load_tokenizer


@dataclass(frozen=True)
class InspectedDocument:
    """One document of a store, decoded; its ids where the store holds no tokenizer."""

    index: int
    num_tokens: int  # its end-of-document token included
    num_bytes: int
    text: str


def find_stores(path: str | Path) -> list[Path]:
    """The store at `path`, or all stores below it (a build's output). Raises `DataError` when there is none."""
    root = Path(path)
    found = sorted(manifest.parent for manifest in root.rglob(MANIFEST))
    if not found:
        raise DataError(f"{root} holds no token store" if root.exists() else f"{root} does not exist")
    return found


def verify_stores(path: str | Path) -> list[Path]:
    """Read everything below `path` again against the manifests; the stores found. `DataError` at the first damage."""
    stores = find_stores(path)
    for store in stores:
        TokenStore.open(store).verify()
    return stores


def inspect_documents(store: TokenStore, count: int) -> list[InspectedDocument]:
    """The first `count` documents, decoded with the tokenizer that lies in the store, if one does."""
    tokenizer = store_tokenizer(store) if store.manifest.tokenizer else None
    documents = []
    for index in range(min(count, store.num_documents)):
        ids = store.document(index)[:-1].tolist()
        text = tokenizer.decode(ids) if tokenizer else str(ids)
        documents.append(InspectedDocument(index, len(ids) + 1, store.document_bytes(index), text))
    return documents


def store_tokenizer(store: TokenStore) -> Tokenizer:
    """The tokenizer that lies in a store. Raises `DataError` when there is none or it is not the one that wrote it."""
    record = store.manifest.tokenizer
    if record is None:
        raise DataError(f"{store.path} holds no tokenizer to decode with")
    tokenizer = load_tokenizer(store.path / record.folder)
    if tokenizer.digest != record.digest:
        raise DataError(f"{store.path}: its tokenizer has digest {tokenizer.digest}, the manifest says {record.digest}")
    return tokenizer
