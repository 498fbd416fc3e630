"""Which documents of a build are left out because an earlier one holds the same; memory is bounded, records on disk.

Exact: the 128-bit hash of the text. Near: a document is left out when an earlier document that is kept has a Jaccard
similarity of `threshold` or more with it, by the sets of their word n-grams. Candidates are documents that share a band
of MinHash (see `minhash.py`); each is compared by its true sets, so nothing is left out by an estimate.

Documents are numbered in the order of the input. Keys are looked at a share of their values at a time, so what is in
memory does not grow with the corpus: what is known of each document stands in mapped files.
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from .digests import in_share, sorted_by_digest
from .minhash import BANDS
from .segments import Segment
from .shingles import I64, U64

_RECORDS = 1 << 19  # keys in memory at a time, and up to 8 pairs of each
_PART = 1 << 14  # documents whose candidates are in one file: up to 168 pairs each
_NEIGHBOURS = 8  # earlier documents with the same key that a document is compared with
_EXAMPLES = 5  # of each kind
_NUMBER_BITS = 50  # of a pair: the earlier document's number; above them the later one's place in its part


@dataclass
class DedupReport:
    """What was found. `pairs` were compared by their true similarity; `examples`: kept, left out, similarity."""

    exact: int = 0
    near: int = 0
    pairs: int = 0
    examples: list[tuple[int, int, float]] = field(default_factory=list)

    def note(self, kept: int, dropped: int, similarity: float, most: int) -> None:
        """Add an example, unless there are `most`."""
        if len(self.examples) < most:
            self.examples.append((kept, dropped, similarity))


def find_duplicates(
    segments: Sequence[Segment], exact: bool, near_threshold: float | None, scratch: Path
) -> tuple[NDArray[np.bool_], DedupReport]:
    """Whether each document [documents] is left out, and what was found.

    `near_threshold`: None looks for no near duplicates. `scratch`: an empty folder for this function's own files.
    """
    total = segments[-1].base + segments[-1].head.documents if segments else 0
    report = DedupReport()
    if not total:
        return np.zeros(0, np.bool_), report
    dropped = np.memmap(scratch / "dropped", np.bool_, "w+", shape=(total,))
    if exact:
        _drop_exact(segments, total, dropped, report)
    if near_threshold is not None:
        _write_candidates(segments, total, dropped, scratch)
        _drop_near(segments, near_threshold, dropped, report, scratch)
    return dropped, report


def _drop_exact(segments: Sequence[Segment], total: int, dropped: NDArray[np.bool_], report: DedupReport) -> None:
    shares = -(-total // _RECORDS)
    for share in range(shares):
        found = []
        for segment in segments:
            documents = segment.documents
            mine = in_share(documents["digest"][:, 0], share, shares)
            found.append((documents["digest"][mine], segment.base + np.flatnonzero(mine)))
        numbers, same = sorted_by_digest(*(np.concatenate(column) for column in zip(*found, strict=True)))
        firsts = _first_of_group(same)
        later = np.flatnonzero(np.concatenate([[False], same]))
        dropped[numbers[later]] = True
        report.exact += len(later)
        for i in later[:_EXAMPLES]:
            report.note(int(numbers[firsts[i]]), int(numbers[i]), 1.0, _EXAMPLES)


def _write_candidates(segments: Sequence[Segment], total: int, dropped: NDArray[np.bool_], scratch: Path) -> None:
    """Pairs of documents that share a band, in files by the number of the later one."""
    shares = -(-total // _RECORDS)
    for band in range(BANDS):
        for share in range(shares):
            found = []
            for segment in segments:
                if not segment.head.documents:
                    continue
                documents = segment.documents
                keys = segment.bands[band]
                left = ~dropped[segment.base : segment.base + len(documents)]
                mine = in_share(keys, share, shares) & left & (documents["shingles"] > 0)
                found.append((keys[mine], segment.base + np.flatnonzero(mine)))
            keys, numbers = (np.concatenate(column) for column in zip(*found, strict=True))
            order = np.lexsort((numbers, keys))
            _append_pairs(keys[order], numbers[order], scratch)


def _append_pairs(keys: U64, numbers: I64, scratch: Path) -> None:
    """Pair each document with the first of its key and some that come right before it."""
    firsts = _first_of_group(keys[1:] == keys[:-1])
    positions = np.arange(len(keys))
    chosen = [positions > firsts, *(positions - lag > firsts for lag in range(1, _NEIGHBOURS))]
    later = np.concatenate([numbers[fits] for fits in chosen])
    earlier = [numbers[firsts[chosen[0]]], *(numbers[:-lag][fits[lag:]] for lag, fits in enumerate(chosen) if lag)]
    pairs = ((later % _PART) << _NUMBER_BITS).astype(np.uint64) | np.concatenate(earlier).astype(np.uint64)
    pairs = pairs[np.argsort(later // _PART, kind="stable")]
    parts, counts = np.unique(later // _PART, return_counts=True)
    for part, count, end in zip(parts.tolist(), counts, np.cumsum(counts), strict=True):
        with open(_pairs_file(scratch, part), "ab") as file:
            pairs[end - count : end].tofile(file)


def _drop_near(
    segments: Sequence[Segment], threshold: float, dropped: NDArray[np.bool_], report: DedupReport, scratch: Path
) -> None:
    kept_for = np.memmap(scratch / "kept_for", np.int64, "w+", shape=dropped.shape)  # of those left out
    sets = _Sets(segments)
    for part in range(-(-len(dropped) // _PART)):
        if not _pairs_file(scratch, part).exists():
            continue
        pairs = np.unique(np.fromfile(_pairs_file(scratch, part), np.uint64))
        for pair in map(int, pairs):
            later, earlier = part * _PART + (pair >> _NUMBER_BITS), pair & ((1 << _NUMBER_BITS) - 1)
            if dropped[later]:
                continue
            kept = int(kept_for[earlier]) if dropped[earlier] else earlier
            similarity = _jaccard(sets.of(kept), sets.of(later))
            report.pairs += 1
            if similarity >= threshold:
                dropped[later], kept_for[later] = True, kept
                report.near += 1
                report.note(kept, later, similarity, 2 * _EXAMPLES)


class _Sets:
    """The sets of n-grams of documents, by number."""

    def __init__(self, segments: Sequence[Segment]):
        self._segments = [segment for segment in segments if segment.head.documents]
        self._bases = np.array([segment.base for segment in self._segments])
        self._sets = functools.lru_cache(maxsize=64)(self._open)

    def of(self, number: int) -> NDArray[np.uint32]:
        """Sorted 32-bit hashes [n-grams]."""
        which = int(np.searchsorted(self._bases, number, side="right")) - 1
        shingles, offsets = self._sets(which)
        position = number - self._segments[which].base
        return shingles[offsets[position] : offsets[position + 1]]

    def _open(self, which: int) -> tuple[NDArray[np.uint32], I64]:
        """The sets of a segment side by side, and where each begins."""
        lengths = self._segments[which].documents["shingles"]
        return np.asarray(self._segments[which].shingles), np.concatenate([[0], np.cumsum(lengths)])


def _jaccard(a: NDArray[np.uint32], b: NDArray[np.uint32]) -> float:
    """|A and B| / |A or B| of two sorted sets, not both empty."""
    common = int(np.count_nonzero(a[np.minimum(np.searchsorted(a, b), len(a) - 1)] == b))
    return common / (len(a) + len(b) - common)


def _first_of_group(same: NDArray[np.bool_]) -> I64:
    """For each of n sorted entries the first that equals it; `same` [n - 1]: whether an entry equals the one before."""
    positions = np.arange(len(same) + 1) if len(same) else np.zeros(len(same) + 1, np.int64)
    return np.maximum.accumulate(np.where(np.concatenate([[True], ~same]), positions, 0))


def _pairs_file(scratch: Path, part: int) -> Path:
    return scratch / f"pairs_{part:05d}"
