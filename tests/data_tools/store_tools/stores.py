"""Stores for the tests of the store tools: of random ids, or of text with a real tokenizer."""

import itertools
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from megalite.data.format import TokenStore
from megalite.data.writer import StoreWriter
from megalite.tokenizer import load_tokenizer
from tests.data_tools.corpora import texts
from tests.stores import NamedTokenizer

END = 0


def random_store(
    path: Path,
    count: int = 40,
    vocab_size: int = 300,
    shard_tokens: int = 10**9,
    seed: int = 0,
    tokenizer: str | None = "a",
    source: str = "s",
) -> TokenStore:
    """Documents of 0 to 40 random ids (skewed to small ones), with byte counts that tell them apart."""
    rng = np.random.default_rng(seed)
    with StoreWriter(
        path, vocab_size=vocab_size, end_of_document=END, source=source, shard_tokens=shard_tokens
    ) as writer:
        for number in range(count):
            ids = 1 + (rng.random(rng.integers(0, 41)) ** 3 * (vocab_size - 1)).astype(np.int64)
            writer.add_document(ids, 1000 * seed + number)
        if tokenizer is not None:
            writer.add_tokenizer(NamedTokenizer(tokenizer))
    return TokenStore.open(path)


def text_store(path: Path, tokenizer_path: Path, shard_tokens: int = 10**9) -> tuple[TokenStore, list[str]]:
    """The texts of `corpora`, tokenised."""
    tokenizer, corpus = load_tokenizer(tokenizer_path), texts()
    with StoreWriter(
        path,
        vocab_size=tokenizer.vocab_size,
        end_of_document=tokenizer.end_of_document,
        source="texts",
        shard_tokens=shard_tokens,
    ) as writer:
        for text in corpus:
            writer.add_document(tokenizer.encode(text), len(text.encode()))
        writer.add_tokenizer(tokenizer)
    return TokenStore.open(path), corpus


def contents(store: TokenStore | Path) -> list[tuple[tuple[int, ...], int]]:
    """Ids and byte count of every document; the store is verified first."""
    store = TokenStore.open(store) if isinstance(store, Path) else store
    store.verify()
    return [(tuple(store.document(i).tolist()), store.document_bytes(i)) for i in range(store.num_documents)]


def flat(parts: Iterable[list]) -> list:
    """Lists of documents put together."""
    return list(itertools.chain.from_iterable(parts))
