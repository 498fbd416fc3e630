"""Small token stores without text, for tests that need a store to be there."""

from pathlib import Path

import numpy as np

from megalite.data.writer import StoreWriter


class NamedTokenizer:
    """Stands for a tokenizer in a manifest; `name` also decides its digest."""

    def __init__(self, name: str):
        self.name = name
        self.digest = name.ljust(32, "0")

    def save(self, folder: Path) -> None:
        folder.mkdir()
        (folder / "tokenizer.model").write_text(20 * self.name)


def make_store(
    path: Path, vocab_size: int = 200, documents: int = 8, length: int = 99, tokenizer: str | None = "a"
) -> Path:
    """A store of `documents` documents of `length` random tokens each, one end-of-document token more."""
    rng = np.random.default_rng(0)
    with StoreWriter(path, vocab_size=vocab_size, end_of_document=0, source=path.name) as writer:
        for _ in range(documents):
            writer.add_document(rng.integers(1, vocab_size, length), num_bytes=3 * length)
        if tokenizer is not None:
            writer.add_tokenizer(NamedTokenizer(tokenizer))
    return path
