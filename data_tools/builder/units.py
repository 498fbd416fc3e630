"""What one worker does with one unit of the input: read, clean, look for leaks, hash, encode, write segments."""

import ctypes
import os
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, islice, pairwise
from pathlib import Path

import numpy as np
import xxhash
from numpy.typing import NDArray

from megalite.config.schema_data import DataBuildConfig
from megalite.data.manifest import DTYPES, dtype_for
from megalite.errors import DataError
from megalite.tokenizer import Encoder, Tokenizer, load_tokenizer

from ..cleaning import Cleaner, build_cleaner
from ..formats import Span
from ..readers import Document, ReadReport, iter_file_documents, status_of
from .decontamination import LeakFinder
from .line_dedup import LineDropper, write_lines
from .minhash import band_keys
from .segments import (
    DOCUMENT,
    Counts,
    SegmentHead,
    SegmentWriter,
    finished_heads,
    mark_done,
    read_done,
    segment_name,
)
from .shingles import shingle_hashes

MAX_SOURCES = 64  # each store of a build holds files open
SEGMENT_BYTES = 1 << 26  # of text in a segment: what a killed build does again
_SEGMENT_DOCUMENTS = 1 << 17  # whose bands are held: 22 MB
_CHUNK_BYTES = 1 << 19  # of text worked on at a time
_CHUNK_DOCUMENTS = 1024
_FORGET_BYTES = 3 << 26  # of text after which a worker's encoder forgets: a load costs 1% of the time
_GROWTH = 1 << 27  # of a worker's memory, in bytes, after which it forgets too


@dataclass(frozen=True)
class Part:
    """A file or a span of it; `size` and `changed` (nanoseconds) as it was when the build began."""

    path: Path
    span: Span
    size: int
    changed: int


@dataclass(frozen=True)
class Unit:
    """What one worker reads from beginning to end: a part, or some small ones. `folder`: where its segments go."""

    parts: tuple[Part, ...]
    source: str  # of documents without a column for it
    folder: Path


class Worker:
    """What every unit of a build is done with; made once in a process."""

    def __init__(self, config: DataBuildConfig, leaks: Path | None, tokenizer: Tokenizer | None = None):
        """`leaks`: the n-grams of `LeakFinder`, when the build looks for them. `tokenizer`: of `config`, loaded."""
        self.config = config
        self.tokenizer = tokenizer or load_tokenizer(config.tokenizer.path)
        self.encoder = Encoder(self.tokenizer, config.tokenizer.engine)
        self.cleaner: Cleaner | None = build_cleaner(config.clean) if config.clean else None
        self._markup = any(step.step == "html" for step in config.clean)  # which takes the text out, once
        self.leaks = LeakFinder(leaks, config.decontaminate) if leaks else None
        self.dtype = DTYPES[dtype_for(self.tokenizer.vocab_size)]
        self._memory, self._encoded = _anonymous_bytes(), 0  # when the encoder was new; bytes of text since then

    def run(self, unit: Unit) -> None:
        """Do what is not done yet of `unit`. Raises `DataError` for bad input."""
        if read_done(unit.folder):
            return
        unit.folder.mkdir(exist_ok=True)
        finished = finished_heads(unit.folder)
        report = ReadReport(quiet=True)
        documents = self._documents(unit, report)
        for _ in islice(documents, finished[-1].read if finished else 0):
            pass  # in a finished segment
        skipped = report.skipped.copy() if finished else Counter[str]()
        dedup = self.config.dedup
        lines = None
        if dedup.lines:
            lines = LineDropper(unit.folder, dedup.min_line_characters, finished[-1].lines if finished else 0)
        for number, chunks in enumerate(_segments(documents), start=len(finished)):
            with SegmentWriter(unit.folder / segment_name(number), dedup.near) as writer:
                segment = _SegmentBuilder(self, lines, writer)
                for chunk in chunks:
                    segment.add(chunk)
                    self._bound_memory(chunk)
                segment.commit(report.documents, report.skipped - skipped)
            skipped = report.skipped.copy()
            _trim()
        mark_done(unit.folder, Counts(skipped=report.skipped - skipped), report.messages)

    def hash_lines(self, unit: Unit) -> None:
        """Write the hashes of the lines of `unit`. Raises `DataError` for bad input."""
        cleaned = (self.clean(document, Counter()) for document in self._documents(unit, ReadReport(quiet=True)))
        texts = (text for text in cleaned if text is not None)
        write_lines(unit.folder, texts, self.config.dedup.min_line_characters)

    def clean(self, document: Document, counts: Counter[str]) -> str | None:
        """The text that the steps leave of a document, or None when they drop it."""
        if self.cleaner is None:
            return document.text
        return self.cleaner.clean(document.text, document.language, counts)

    def _bound_memory(self, chunk: Sequence[Document]) -> None:
        """Let the encoder forget its words now and then, and soon where nearly all are new: Chinese clauses, say."""
        self._encoded += sum(document.num_bytes for document in chunk)
        if self._encoded > _FORGET_BYTES or _anonymous_bytes() > self._memory + _GROWTH:
            self.encoder.forget()
            _trim()
            self._memory, self._encoded = _anonymous_bytes(), 0

    def _documents(self, unit: Unit, report: ReadReport) -> Iterator[Document]:
        """Raises `DataError` for a file that is not the one with which the build began."""
        for part in unit.parts:
            try:
                status = status_of(part.path)
                found = (status.st_size, status.st_mtime_ns)
            except FileNotFoundError:
                found = None
            if found != (part.size, part.changed):
                raise DataError(
                    f"{part.path} changed since the build began: give the same command again, it is read anew"
                )
            yield from iter_file_documents(part.path, self.config.reader, unit.source, report, part.span, self._markup)

    def store_of(self, document: Document) -> str:
        """The store that a document goes to, as a path below the output. `split`: told by a column, or by a hash.

        The hash is of the seed and the document's id, so that the order of the input does not matter.
        """
        split = document.split
        if split is None:
            key = f"{self.config.seed}/{document.id}".encode("utf-8", "surrogatepass")
            share = xxhash.xxh3_64_intdigest(key) / 2**64
            split = "validation" if share < self.config.validation_fraction else "train"
        return f"{split}/{document.source}"


class _SegmentBuilder:
    """The documents of one segment, chunk by chunk."""

    def __init__(self, worker: Worker, lines: LineDropper | None, writer: SegmentWriter):
        self._worker, self._lines, self._writer, self._counts = worker, lines, writer, Counts()
        self._stores: dict[str, int] = {}

    def add(self, chunk: Sequence[Document]) -> None:
        """Clean, check, hash and encode documents."""
        worker = self._worker
        self._counts.read += len(chunk)
        cleaned = [(document, self._clean(document)) for document in chunk]
        kept = self._without_leaks([(document, text) for document, text in cleaned if text is not None])
        if not kept:
            return
        texts = [text for _, text in kept]
        ids, counts = worker.encoder.encode(texts)
        documents = np.zeros(len(kept), DOCUMENT)
        documents["tokens"] = counts + 1
        documents["store"] = [self._store(document) for document, _ in kept]
        data = [text.encode() for text in texts]
        documents["bytes"] = [len(content) for content in data]
        digests = b"".join(xxhash.xxh3_128_digest(content) for content in data)
        documents["digest"] = np.frombuffer(digests, "<u8").reshape(-1, 2)
        bands = shingles = None
        if worker.config.dedup.near:
            hashes, offsets = shingle_hashes(texts, worker.config.dedup.ngram)
            bands = band_keys(hashes, offsets)
            short = (hashes >> np.uint64(32)).astype(np.uint32)  # 32 bits tell the n-grams of two documents apart
            sets = [_set_of(short[start:end]) for start, end in pairwise(offsets.tolist())]
            documents["shingles"] = [len(values) for values in sets]
            shingles = np.concatenate(sets)
        tokens = np.insert(ids.astype(worker.dtype), np.cumsum(counts), worker.tokenizer.end_of_document)
        if worker.tokenizer.unknown is not None:
            unknown = np.repeat(documents["store"], documents["tokens"])[tokens == worker.tokenizer.unknown]
            for name, count in zip(self._stores, np.bincount(unknown, minlength=len(self._stores)), strict=True):
                self._counts.unknown[name] += int(count)
        self._writer.add(documents, tokens, bands, shingles)

    def commit(self, read: int, skipped: Counter[str]) -> None:
        """Finish the segment; `read`: documents of the unit up to its end, `skipped`: its bad rows by reason."""
        self._counts.skipped = skipped
        self._writer.commit(
            SegmentHead(
                stores=list(self._stores),
                documents=self._writer.num_documents,
                tokens=self._writer.num_tokens,
                read=read,
                lines=self._lines.position if self._lines else 0,
                counts=self._counts,
            )
        )

    def _store(self, document: Document) -> int:
        """The number of a document's store. Raises `DataError` when there are too many."""
        number = self._stores.setdefault(self._worker.store_of(document), len(self._stores))
        check_sources(self._stores, self._worker.config)
        return number

    def _clean(self, document: Document) -> str | None:
        """The text that is kept of a document, or None when it is dropped."""
        text = self._worker.clean(document, self._counts.cleaning)
        if text is None or not text.strip():
            self._drop("cleaning", document)
            return None
        if self._lines:
            text = self._lines.drop(text, self._counts.cleaning)
            if not text.strip():
                self._drop("lines", document)
                return None
        return text

    def _drop(self, stage: str, document: Document) -> None:
        self._counts.dropped[stage] += 1
        self._counts.example(stage, document.id)  # not what it says: perhaps nobody should read that

    def _without_leaks(self, kept: list[tuple[Document, str]]) -> list[tuple[Document, str]]:
        if self._worker.leaks is None:
            return kept
        leaked = self._worker.leaks.find([text for _, text in kept])
        for (_, text), leak in zip(kept, leaked, strict=True):
            if leak:
                self._counts.dropped["decontamination"] += 1
                self._counts.example("decontamination", text)
        return [item for item, leak in zip(kept, leaked, strict=True) if not leak]


def _set_of(values: NDArray[np.uint32]) -> NDArray[np.uint32]:
    """Each value once, sorted: `np.unique` takes three times as long."""
    values = np.sort(values)
    return values[np.concatenate([[True], values[1:] != values[:-1]])[: len(values)]]


def _anonymous_bytes() -> int:
    """Memory of this process that no file stands for: proc_pid_statm(5), resident but not shared."""
    _, resident, shared, *_ = map(int, Path("/proc/self/statm").read_text().split())
    return (resident - shared) * os.sysconf("SC_PAGE_SIZE")


def _trim() -> None:
    """Give freed memory back to the system: glibc keeps what long documents took for a moment, for ever."""
    if trim := getattr(ctypes.CDLL(None), "malloc_trim", None):
        trim(0)


def check_sources(stores: Collection[str], config: DataBuildConfig) -> None:
    """Raise `DataError` when a build has more sources than stores can be open at once."""
    if len(stores) > MAX_SOURCES and len({name.split("/", 1)[1] for name in stores}) > MAX_SOURCES:
        raise DataError(
            f"more than {MAX_SOURCES} sources: is reader.source_column={config.reader.source_column} the right column?"
        )


def _segments(documents: Iterator[Document]) -> Iterator[Iterator[list[Document]]]:
    """Documents in chunks, chunks in segments; each is to be used up before the next is asked for."""
    while (first := next(documents, None)) is not None:
        yield _chunks(chain([first], documents))


def _chunks(documents: Iterable[Document]) -> Iterator[list[Document]]:
    """The chunks of one segment."""
    chunk: list[Document] = []
    chunk_bytes = segment_bytes = 0
    for number, document in enumerate(documents, start=1):
        # A long document is a chunk by itself.
        if chunk and (chunk_bytes + document.num_bytes > _CHUNK_BYTES or len(chunk) == _CHUNK_DOCUMENTS):
            yield chunk
            chunk, chunk_bytes = [], 0
        chunk.append(document)
        chunk_bytes += document.num_bytes
        segment_bytes += document.num_bytes
        if segment_bytes >= SEGMENT_BYTES or number == _SEGMENT_DOCUMENTS:
            break
    if chunk:
        yield chunk
