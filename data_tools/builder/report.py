"""What a build read, left out and wrote: as JSON for programs and as a page for people."""

import bisect
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from megalite.tokenizer import Tokenizer

from .dedup import DedupReport
from .merging import WrittenStore
from .segments import Counts, Segment

REPORT, REPORT_PAGE = "build_report.json", "build_report.html"
_HEAD_TOKENS = 30
STAGES = ("cleaning", "lines", "decontamination", "exact", "near")  # in which documents are left out, in order


@dataclass
class StoreReport:
    """Counts of one store; tokens include the end-of-document ones. `unknown_tokens` are text that was lost.

    `lengths`: documents by length, keyed by the power of two above it, in tokens.
    """

    documents: int
    tokens: int
    unknown_tokens: int
    bytes: int
    bytes_per_token: float
    lengths: dict[str, int]


@dataclass
class DuplicateExample:
    """How two documents begin, of which the second was left out."""

    kept: str
    dropped: str
    similarity: float


@dataclass
class BuildReport:
    """What a build read, left out and wrote. `stores` is keyed by the path below `output`, such as train/books."""

    output: str
    tokenizer_digest: str
    files: int
    documents_read: int
    skipped: dict[str, int]  # bad rows, by reason
    cleaning: dict[str, int]  # documents that a step changed or dropped
    dropped: dict[str, int]  # documents, by stage: see `STAGES`
    examples: dict[str, list[str]]  # some of them, by stage: where they stood, or how they begin
    compared_pairs: int  # candidates for near duplicates
    duplicates: list[DuplicateExample]
    stores: dict[str, StoreReport] = field(default_factory=dict)

    @property
    def paths(self) -> dict[str, Path]:
        """Where each store stands."""
        return {name: Path(self.output) / name for name in self.stores}

    @property
    def page(self) -> Path:
        """The report as a page."""
        return Path(self.output) / REPORT_PAGE

    @property
    def stages(self) -> list[tuple[str, int, int]]:
        """(stage, documents in, documents out) in order."""
        rows, left = [], self.documents_read
        for stage, count in self.dropped.items():
            rows.append((stage, left, left - count))
            left -= count
        return rows


def make_report(
    output: str,
    tokenizer: Tokenizer,
    files: int,
    counts: Counts,
    duplicates: DedupReport,
    written: Mapping[str, WrittenStore],
    segments: Sequence[Segment],
) -> BuildReport:
    """Put together what the parts of a build counted."""
    dropped = dict(counts.dropped) | {"exact": duplicates.exact, "near": duplicates.near}
    heads = _Heads(segments, tokenizer)
    return BuildReport(
        output=output,
        tokenizer_digest=tokenizer.digest,
        files=files,
        documents_read=counts.read,
        skipped=dict(sorted(counts.skipped.items())),
        cleaning=dict(sorted(counts.cleaning.items())),
        dropped={stage: dropped[stage] for stage in STAGES if dropped.get(stage)},
        examples=counts.examples,
        compared_pairs=duplicates.pairs,
        duplicates=[
            DuplicateExample(heads.of(kept), heads.of(left), round(similarity, 4))
            for kept, left, similarity in duplicates.examples
        ],
        stores={name: _store_report(store, counts.unknown[name]) for name, store in sorted(written.items())},
    )


def read_report(output: Path) -> BuildReport:
    """The report of a finished build."""
    values = json.loads((output / REPORT).read_text(encoding="utf-8"))
    stores = {name: StoreReport(**store) for name, store in values.pop("stores").items()}
    duplicates = [DuplicateExample(**example) for example in values.pop("duplicates")]
    return BuildReport(**values, stores=stores, duplicates=duplicates)


class _Heads:
    """How documents begin, by number."""

    def __init__(self, segments: Sequence[Segment], tokenizer: Tokenizer):
        self._segments, self._tokenizer = [segment for segment in segments if segment.head.documents], tokenizer

    def of(self, number: int) -> str:
        """The first words of a document."""
        segment = self._segments[bisect.bisect_right([s.base for s in self._segments], number) - 1]
        documents = segment.documents
        index = number - segment.base
        end = int(np.cumsum(documents["tokens"])[index])
        ids = segment.tokens[end - int(documents["tokens"][index]) : end][:_HEAD_TOKENS]
        # A character may be cut in two by the last token.
        return " ".join(self._tokenizer.decode(ids.tolist()).rstrip("\ufffd").split())


def _store_report(store: WrittenStore, unknown_tokens: int) -> StoreReport:
    writer = store.writer
    return StoreReport(
        documents=writer.num_documents,
        tokens=writer.num_tokens,
        unknown_tokens=unknown_tokens,
        bytes=writer.num_bytes,
        bytes_per_token=round(writer.num_bytes / writer.num_tokens, 4),
        lengths={str(length): count for length, count in sorted(store.lengths.items())},
    )
