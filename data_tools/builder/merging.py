"""Segments of encoded documents -> token stores, in the order of the input."""

from collections import Counter
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megalite.config.schema_data import DataBuildConfig
from megalite.data.writer import StoreWriter
from megalite.tokenizer import Tokenizer

from .segments import Segment, iter_tokens
from .units import check_sources


@dataclass
class WrittenStore:
    """A store's writer, closed, and its documents by the power of two above their length in tokens."""

    writer: StoreWriter
    lengths: Counter[int] = field(default_factory=Counter)

    def add(self, segment: Segment, documents: NDArray[Any], chosen: NDArray[np.bool_]) -> None:
        """Append the `chosen` [documents] of a segment."""
        tokens = [*iter_tokens(segment, documents, chosen)]
        mine = documents[chosen]
        flat = tokens[0] if len(tokens) == 1 else np.concatenate(tokens)
        self.writer.add_documents(flat, mine["tokens"], mine["bytes"])
        powers, counts = np.unique(np.ceil(np.log2(mine["tokens"])).astype(int), return_counts=True)
        self.lengths.update({2 ** int(power): int(count) for power, count in zip(powers, counts, strict=True)})


def write_stores(
    folder: Path,
    segments: Sequence[Segment],
    dropped: NDArray[np.bool_],
    tokenizer: Tokenizer,
    config: DataBuildConfig,
) -> dict[str, WrittenStore]:
    """Write every document that is not `dropped` [documents] to the store of its split and source below `folder`.

    Returns what was written by the store's path below `folder`. Raises `DataError` for too many sources.
    """
    written: dict[str, WrittenStore] = {}
    with ExitStack() as stack:
        for segment in segments:
            documents = segment.documents
            keep = ~dropped[segment.base : segment.base + len(documents)]
            for number, name in enumerate(segment.head.stores):
                chosen = keep & (documents["store"] == number)
                if not chosen.any():
                    continue
                if name not in written:
                    writer = stack.enter_context(_new_writer(folder / name, name, tokenizer, config))
                    writer.add_tokenizer(tokenizer)
                    written[name] = WrittenStore(writer)
                    check_sources(written, config)
                written[name].add(segment, documents, chosen)
    return written


def _new_writer(path: Path, name: str, tokenizer: Tokenizer, config: DataBuildConfig) -> StoreWriter:
    return StoreWriter(
        path,
        vocab_size=tokenizer.vocab_size,
        end_of_document=tokenizer.end_of_document,
        source=name.split("/", 1)[1],
        shard_tokens=config.shard_tokens,
    )
