"""Text of evaluation sets in training documents, found by the n-grams of words that both have.

As for GPT-3 (Brown et al. 2020, appendix C): 13 words in a row that are the same, whatever their case and what stands
between them. An evaluation text of fewer words has no n-gram to be found by.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from megalite.config.schema_data import DecontaminateConfig, ReaderConfig
from megalite.errors import ConfigError

from ..readers import Document, ReadReport, iter_documents
from .shingles import U64, shingle_hashes, word_hashes

_BATCH = 1000  # documents


@dataclass(frozen=True)
class LeakReport:
    """What is looked for: `too_short` evaluation texts have fewer words than an n-gram."""

    texts: int
    too_short: int
    ngrams: int


def write_ngrams(path: Path, config: DecontaminateConfig, reader: ReaderConfig) -> LeakReport:
    """Write the n-grams of the evaluation sets, sorted, uint64, to `path`.

    Raises `DataError` for files that cannot be read, `ConfigError` when no text is long enough to be found.
    """
    found: list[U64] = []
    texts = short = 0
    for batch in _batches(_texts(config, reader)):
        hashes, offsets = shingle_hashes(batch, config.ngram)
        _, words = word_hashes(batch)
        long = np.diff(words) >= config.ngram
        found.append(np.unique(hashes[np.repeat(long, np.diff(offsets))]))
        texts, short = texts + len(batch), short + int(np.count_nonzero(~long))
    ngrams = np.unique(np.concatenate([np.empty(0, np.uint64), *found]))
    if not len(ngrams):
        raise ConfigError(
            f"decontaminate.input: none of {texts} texts has {config.ngram} words; set a smaller decontaminate.ngram"
        )
    ngrams.tofile(path)
    return LeakReport(texts, short, len(ngrams))


class LeakFinder:
    """Finds documents that hold text of the evaluation sets."""

    def __init__(self, path: Path, config: DecontaminateConfig):
        """`path`: what `write_ngrams` wrote."""
        self._ngrams: U64 = np.memmap(path, np.uint64, "r")
        self._config = config

    def find(self, texts: Sequence[str]) -> list[bool]:
        """Whether each text has `min_overlap` different n-grams of an evaluation set, or more."""
        hashes, offsets = shingle_hashes(texts, self._config.ngram)
        places = np.minimum(np.searchsorted(self._ngrams, hashes), len(self._ngrams) - 1)
        hits = self._ngrams[places] == hashes
        return [
            len(np.unique(hashes[start:end][hits[start:end]])) >= self._config.min_overlap
            for start, end in zip(offsets[:-1].tolist(), offsets[1:].tolist(), strict=True)
        ]


def _texts(config: DecontaminateConfig, reader: ReaderConfig) -> Iterator[Document]:
    for column in config.text_columns:
        columns = ReaderConfig(text_column=column, document=reader.document, on_bad=reader.on_bad)
        yield from iter_documents(config.input, columns, ReadReport())


def _batches(documents: Iterator[Document]) -> Iterator[list[str]]:
    batch: list[str] = []
    for document in documents:
        batch.append(document.text)
        if len(batch) == _BATCH:
            yield batch
            batch = []
    if batch:
        yield batch
