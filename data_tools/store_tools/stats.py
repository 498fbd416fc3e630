"""`megalite data stats`: what a store holds, in numbers."""

import json
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from megalite.config.schema_data import DataStatsConfig
from megalite.config.validate_commands import validate_data_stats
from megalite.data.files import write_synced
from megalite.data.format import TokenStore
from megalite.errors import DataError

from .documents import iter_documents, writing
from .inspection import find_stores, store_tokenizer

_LENGTHS_COUNTED = 1 << 20  # lengths below have a counter each; longer documents are few and counted one by one
_MAX_VOCABULARY = 1 << 21  # each id has a counter


@dataclass(frozen=True)
class TopToken:
    """One of the tokens that a store holds most of."""

    id: int
    text: str | None  # None: the store has no tokenizer
    count: int
    share: float


@dataclass(frozen=True)
class StoreStats:
    """The numbers of one store. Tokens include the end-of-document ones; lengths are tokens per document.

    `histogram`: lengths of 2^i .. 2^(i+1) - 1 tokens, as (lower bound, documents), without empty bins at either end.
    """

    source: str
    documents: int
    tokens: int
    bytes: int
    shards: int
    bytes_per_token: float
    mean_length: float
    median_length: int
    p90_length: int
    max_length: int
    histogram: list[tuple[int, int]]
    vocab_size: int
    vocab_used: int
    unknown_tokens: int | None  # None: the tokenizer has no unknown token, or the store no tokenizer
    top_tokens: list[TopToken]

    @property
    def vocab_share(self) -> float:
        """The share of the vocabulary that occurs."""
        return self.vocab_used / self.vocab_size

    @property
    def unknown_share(self) -> float | None:
        """The share of tokens that stand for text the tokenizer could not spell."""
        return None if self.unknown_tokens is None else self.unknown_tokens / max(self.tokens, 1)


def collect_stats(config: DataStatsConfig) -> dict[str, StoreStats]:
    """The numbers of the store `config.store`, or of all stores below it, by path; as JSON in `config.output` too.

    Reads every token once; memory does not grow with the store. Raises `ConfigError` for values out of range,
    `DataError` for a damaged store or an output that exists, `ResourceError` when the disk gives out.
    """
    validate_data_stats(config)
    if not config.output:
        return {str(path): store_stats(TokenStore.open(path), config.top) for path in find_stores(config.store)}
    output = Path(config.output)
    with writing(output):
        stats = {str(path): store_stats(TokenStore.open(path), config.top) for path in find_stores(config.store)}
        values = {
            path: asdict(one) | {"vocab_share": one.vocab_share, "unknown_share": one.unknown_share}
            for path, one in stats.items()
        }
        output.parent.mkdir(parents=True, exist_ok=True)
        temporary = output.with_name(output.name + ".tmp")
        write_synced(temporary, json.dumps(values, indent=2, ensure_ascii=False) + "\n")
        temporary.rename(output)
    return stats


def store_stats(store: TokenStore, top: int) -> StoreStats:
    """The numbers of one store, with its `top` most frequent tokens. Raises `DataError` when it is damaged."""
    manifest = store.manifest
    if manifest.vocab_size > _MAX_VOCABULARY:
        raise DataError(f"{store.path}: a vocabulary of {manifest.vocab_size} is too large to count, at most 2^21")
    lengths = _Lengths()
    counts = np.zeros(manifest.vocab_size, np.int64)
    for documents in iter_documents(store):
        lengths.add(documents.lengths)
        if (highest := int(documents.tokens.max())) >= manifest.vocab_size:
            raise DataError(f"{store.path}: token id {highest} outside the vocabulary of {manifest.vocab_size}")
        counts += np.bincount(documents.tokens, minlength=len(counts))
    tokenizer = store_tokenizer(store) if manifest.tokenizer else None
    order = np.lexsort((np.arange(len(counts)), -counts))[:top]
    top_tokens = [
        TopToken(i, tokenizer.decode([i]) if tokenizer else None, int(counts[i]), int(counts[i]) / manifest.num_tokens)
        for i in order.tolist()
        if counts[i]
    ]
    unknown = tokenizer.unknown if tokenizer else None
    return StoreStats(
        source=manifest.source,
        documents=manifest.num_documents,
        tokens=manifest.num_tokens,
        bytes=manifest.num_bytes,
        shards=len(manifest.shards),
        bytes_per_token=manifest.num_bytes / max(manifest.num_tokens, 1),
        mean_length=manifest.num_tokens / max(manifest.num_documents, 1),
        median_length=lengths.quantile(0.5),
        p90_length=lengths.quantile(0.9),
        max_length=lengths.quantile(1.0),
        histogram=lengths.histogram(),
        vocab_size=manifest.vocab_size,
        vocab_used=int(np.count_nonzero(counts)),
        unknown_tokens=None if unknown is None else int(counts[unknown]),
        top_tokens=top_tokens,
    )


class _Lengths:
    """How often each length of a document occurs: exact, and bounded by the lengths and not by the documents."""

    def __init__(self) -> None:
        self._short = np.zeros(_LENGTHS_COUNTED, np.int64)
        self._long: Counter[int] = Counter()

    def add(self, lengths: NDArray[np.int64]) -> None:
        short = lengths < _LENGTHS_COUNTED
        found = np.bincount(lengths[short])
        self._short[: len(found)] += found
        self._long.update(lengths[~short].tolist())

    def histogram(self) -> list[tuple[int, int]]:
        lengths, counts = self._sorted()
        if not len(lengths):
            return []
        bins = np.floor(np.log2(lengths)).astype(np.int64)
        sums = np.bincount(bins - bins[0], weights=counts).astype(np.int64)
        return [(1 << (int(bins[0]) + i), int(total)) for i, total in enumerate(sums)]

    def quantile(self, share: float) -> int:
        """The smallest length that this share of the documents does not exceed; 0 without documents."""
        lengths, counts = self._sorted()
        if not len(lengths):
            return 0
        cumulative = np.cumsum(counts)
        return int(lengths[np.searchsorted(cumulative, np.ceil(share * cumulative[-1]))])

    def _sorted(self) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """The lengths that occur, in order, and how often each does."""
        short = np.flatnonzero(self._short)
        pairs = sorted(self._long.items())
        lengths = np.concatenate([short, np.array([length for length, _ in pairs], np.int64)])
        return lengths, np.concatenate([self._short[short], np.array([count for _, count in pairs], np.int64)])
