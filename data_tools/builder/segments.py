"""Encoded documents on their way into a store: what one worker has done, whole or absent, and done only once.

A build's input is cut into units (files); the worker of unit 7 writes its documents in segments of bounded size:

    unit_000007/00000.tokens     ids in the store's dtype, end-of-document tokens in place
                00000.documents  one `DOCUMENT` record each
                00000.bands      uint64 [bands, documents]: keys of the bands of MinHash   (near deduplication only)
                00000.shingles   uint32: each document's set of word n-grams, sorted       (near deduplication only)
                00000.json       `SegmentHead`; written last, so a segment without it is not there
                done.json        `UnitHead`: the unit is finished

Documents stand in the order of the input.
"""

import json
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megalite.data.files import sync_directory, write_synced

DOCUMENT = np.dtype(
    [
        ("tokens", "<i8"),  # its end-of-document token included
        ("bytes", "<i8"),  # of its text in UTF-8
        ("shingles", "<i8"),
        ("store", "<i8"),  # index into the head's `stores`
        ("digest", "<u8", (2,)),  # xxh3_128 of its text
    ]
)
DONE = "done.json"
_EXAMPLES, _EXAMPLE_CHARACTERS = 5, 100


@dataclass
class Counts:
    """What became of the input of a segment or of a build."""

    read: int = 0  # documents
    skipped: Counter[str] = field(default_factory=Counter)  # bad rows by reason
    cleaning: Counter[str] = field(default_factory=Counter)  # documents changed and dropped, by step
    dropped: Counter[str] = field(default_factory=Counter)  # documents dropped, by stage
    unknown: Counter[str] = field(default_factory=Counter)  # unknown tokens by store
    examples: dict[str, list[str]] = field(default_factory=dict)  # some dropped documents, by stage

    def example(self, stage: str, text: str) -> None:
        """Note a dropped document, where it stood or how it begins; a few of each stage are kept."""
        kept = self.examples.setdefault(stage, [])
        if len(kept) < _EXAMPLES:
            kept.append(" ".join(text[: 2 * _EXAMPLE_CHARACTERS].split())[:_EXAMPLE_CHARACTERS])

    def add(self, other: "Counts") -> None:
        """Add up."""
        self.read += other.read
        for name in ("skipped", "cleaning", "dropped", "unknown"):
            getattr(self, name).update(getattr(other, name))
        for stage, texts in other.examples.items():
            for text in texts:
                self.example(stage, text)

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> "Counts":
        """Of the values that stand in a head."""
        counters = {name: Counter(values[name]) for name in ("skipped", "cleaning", "dropped", "unknown")}
        return cls(**values | counters)


@dataclass
class SegmentHead:
    """What a segment holds. `read`, `lines`: documents and hashed lines of the unit up to its end, to go on after."""

    stores: list[str]
    documents: int
    tokens: int
    read: int
    lines: int
    counts: Counts


@dataclass(frozen=True)
class Segment:
    """A finished segment, opened without reading it. `base`: documents in all segments before it."""

    path: Path  # without ending
    head: SegmentHead
    dtype: np.dtype[Any]
    base: int

    @property
    def documents(self) -> NDArray[Any]:
        """Records [documents] of `DOCUMENT`."""
        return _map(self.path.with_suffix(".documents"), DOCUMENT)

    @property
    def tokens(self) -> NDArray[Any]:
        """Ids [tokens] of all documents side by side."""
        return _map(self.path.with_suffix(".tokens"), self.dtype)

    @property
    def bands(self) -> NDArray[np.uint64]:
        """Keys [bands, documents], of a segment that has documents."""
        return _map(self.path.with_suffix(".bands"), np.dtype("<u8")).reshape(-1, self.head.documents)

    @property
    def shingles(self) -> NDArray[np.uint32]:
        """Sets of n-grams [shingles] of all documents side by side."""
        return _map(self.path.with_suffix(".shingles"), np.dtype("<u4"))


class SegmentWriter:
    """Writes a segment as its documents come: nothing of them is held but their bands. Use as a context manager."""

    def __init__(self, path: Path, near: bool):
        """Open its files. `path`: without ending; `near`: documents have bands and shingles."""
        self._path = path
        self._bands: list[NDArray[np.uint64]] = []
        self.num_documents = self.num_tokens = 0
        with ExitStack() as stack:
            endings = (".tokens", ".documents", *((".bands", ".shingles") if near else ()))
            self._files = {ending: stack.enter_context(open(path.with_suffix(ending), "wb")) for ending in endings}
            self._open = stack.pop_all()

    def __enter__(self) -> "SegmentWriter":
        return self

    def __exit__(self, *_: object) -> None:
        self._open.close()

    def add(
        self,
        documents: NDArray[Any],
        tokens: NDArray[Any],
        bands: NDArray[np.uint64] | None,
        shingles: NDArray[np.uint32] | None,
    ) -> None:
        """Append documents; the arrays are those of the files, see the head of this module."""
        self.num_documents += len(documents)
        self.num_tokens += len(tokens)
        documents.tofile(self._files[".documents"])
        tokens.tofile(self._files[".tokens"])
        if bands is not None and shingles is not None:
            self._bands.append(bands)
            shingles.tofile(self._files[".shingles"])

    def commit(self, head: SegmentHead) -> None:
        """Sync everything, and say that the segment is there."""
        if self._bands:
            np.concatenate(self._bands, axis=1).tofile(self._files[".bands"])
        for file in self._files.values():
            file.flush()
            os.fsync(file.fileno())
        # Not `asdict`, which makes counters of pairs.
        _commit(self._path.with_suffix(".json"), vars(head) | {"counts": vars(head.counts)})


def read_head(path: Path) -> SegmentHead | None:
    """The head of a segment, or None when it is not finished."""
    try:
        values = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    return SegmentHead(**{**values, "counts": Counts.from_json(values["counts"])})


def finished_heads(folder: Path) -> list[SegmentHead]:
    """The heads of the finished segments of a unit, in order."""
    heads: list[SegmentHead] = []
    while head := read_head(folder / segment_name(len(heads))):
        heads.append(head)
    return heads


def open_segments(folders: Sequence[Path], dtype: np.dtype[Any]) -> list[Segment]:
    """All segments of finished units, in the order of the input."""
    segments: list[Segment] = []
    base = 0
    for folder in folders:
        for number, head in enumerate(finished_heads(folder)):
            segments.append(Segment(folder / segment_name(number), head, dtype, base))
            base += head.documents
    return segments


def segment_name(number: int) -> str:
    """The name of a unit's segment, without ending."""
    return f"{number:05d}"


def mark_done(folder: Path, counts: Counts, messages: list[str]) -> None:
    """Say that a unit is finished, what became of the rows after its last segment, and what to log of it."""
    _commit(folder / DONE, {"counts": vars(counts), "messages": messages})


def read_done(folder: Path) -> tuple[Counts, list[str]] | None:
    """What `mark_done` wrote, or None for a unit that is not finished."""
    try:
        values = json.loads((folder / DONE).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    return Counts.from_json(values["counts"]), values["messages"]


def iter_tokens(segment: Segment, documents: NDArray[Any], keep: NDArray[np.bool_]) -> Iterator[NDArray[Any]]:
    """Ids of the documents of a segment that `keep` [documents] chooses, in runs of neighbours."""
    ends = np.cumsum(documents["tokens"])
    edges = np.flatnonzero(np.diff(np.concatenate([[False], keep, [False]]).astype(np.int8)))
    starts = (ends - documents["tokens"])[edges[::2]]
    tokens = np.asarray(segment.tokens)  # slices of a `memmap` take longer
    for start, end in zip(starts.tolist(), ends[edges[1::2] - 1].tolist(), strict=True):
        yield tokens[start:end]


def _commit(path: Path, values: dict[str, Any]) -> None:
    temporary = path.with_name(f"{path.name}.tmp")
    write_synced(temporary, json.dumps(values, ensure_ascii=False))
    temporary.replace(path)
    sync_directory(path.parent)


def _map(path: Path, dtype: np.dtype[Any]) -> NDArray[Any]:
    # An empty file cannot be memory-mapped.
    return np.memmap(path, dtype=dtype, mode="r") if path.stat().st_size else np.empty(0, dtype)
