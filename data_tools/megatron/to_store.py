"""A dataset of Megatron -> a token store."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megalite.config.schema_data import DataConvertConfig
from megalite.config.validate_commands import validate_data_convert
from megalite.data.manifest import DTYPES, dtype_for
from megalite.data.writer import StoreWriter
from megalite.errors import ConfigError, DataError
from megalite.tokenizer import Tokenizer, load_tokenizer

from ..store_tools.byte_counts import ByteCounter
from ..store_tools.documents import BLOCK_TOKENS, writing
from .index import MegatronIndex, bin_path, idx_path, iter_document_lengths, read_index


@dataclass(frozen=True)
class ImportReport:
    """What a conversion to a token store found and wrote."""

    format: str  # of the index: MMIDIDX or TNTIDX
    megatron_documents: int
    documents: int  # more than Megatron's where ends inside documents cut them
    tokens: int
    ended: int  # documents that ended with the end-of-document token as they stood
    given_ends: int  # documents that were given one
    bytes: int | None  # None: not known without a tokenizer
    common_last: int | None  # the one id that all documents end with, if it is not the end-of-document token


def import_dataset(config: DataConvertConfig) -> ImportReport:
    """Write Megatron's dataset `config.input` as the token store `config.output`.

    A document without the end-of-document token at its end gets one, so that datasets written with and without
    Megatron's --append-eod come out alike. Raises `ConfigError` when neither a tokenizer nor `vocab_size` and
    `end_of_document` are given, or they contradict it; `DataError` for a damaged dataset, ids outside the vocabulary,
    and an end inside a document (unless `inner_ends=split`); `ResourceError` when the disk gives out.
    """
    validate_data_convert(config)
    output = Path(config.output)
    with writing(output):
        tokenizer = load_tokenizer(config.tokenizer.path) if config.tokenizer.path else None
        vocab_size, end = _vocabulary(config, tokenizer)
        index = read_index(config.input)
        source = index.prefix.name if config.source is None else config.source
        with StoreWriter(output, vocab_size=vocab_size, end_of_document=end, source=source) as writer:
            ended, last_ids = _write(index, writer, tokenizer, config.inner_ends == "split")
            if tokenizer:
                writer.add_tokenizer(tokenizer)
    common = last_ids.pop() if len(last_ids) == 1 else end
    return ImportReport(
        format=index.format,
        megatron_documents=index.num_documents,
        documents=writer.num_documents,
        tokens=writer.num_tokens,
        ended=ended,
        given_ends=index.num_documents - ended,
        bytes=writer.num_bytes if tokenizer else None,
        common_last=common if common != end else None,
    )


def _vocabulary(config: DataConvertConfig, tokenizer: Tokenizer | None) -> tuple[int, int]:
    """Entries of the vocabulary and the end-of-document id, from the tokenizer or the keys."""
    found = (config.vocab_size, config.end_of_document)
    if tokenizer is None:
        if config.vocab_size is None or config.end_of_document is None:
            raise ConfigError(
                "Megatron's files do not tell what their ids mean: give tokenizer.path, or vocab_size and "
                f"end_of_document (found {found[0]} and {found[1]})"
            )
        if config.end_of_document >= config.vocab_size:
            raise ConfigError(f"end_of_document: found {found[1]}, must be below vocab_size={config.vocab_size}")
        return config.vocab_size, config.end_of_document
    expected = (tokenizer.vocab_size, tokenizer.end_of_document)
    for key, given, known in zip(("vocab_size", "end_of_document"), found, expected, strict=True):
        if given is not None and given != known:
            raise ConfigError(f"{key}: found {given}, but the tokenizer {tokenizer.name} says {known}; leave it out")
    return expected


def _write(index: MegatronIndex, writer: StoreWriter, tokenizer: Tokenizer | None, split: bool) -> tuple[int, set[int]]:
    """Write all documents; how many had their end, and which ids documents end with (two of them at most)."""
    counter = ByteCounter(tokenizer) if tokenizer else None
    end, ended = writer.end_of_document, 0
    last_ids: set[int] = set()
    for first, tokens, lengths in _blocks(index):
        _check_ids(index, tokens, writer.vocab_size)
        tokens = tokens.astype(DTYPES[dtype_for(writer.vocab_size)], copy=False)  # where `end` fits, too
        lasts = np.cumsum(lengths) - 1
        has_end = np.zeros(len(lengths), bool)
        filled = lengths > 0
        has_end[filled] = tokens[lasts[filled]] == end
        ended += int(np.count_nonzero(has_end))
        if len(last_ids) < 2:
            last_ids.update(np.unique(tokens[lasts[filled]])[:2].tolist())
        whole = np.insert(tokens, lasts[~has_end] + 1, end)
        ends = np.flatnonzero(whole == end) + 1
        if len(ends) != len(lengths) and not split:
            wanted = np.cumsum(lengths + ~has_end)
            document = first + int(np.searchsorted(wanted, ends[~np.isin(ends, wanted)][0]))
            raise DataError(
                f"{bin_path(index.prefix)}: document {document} holds the end-of-document id {end} before its end. "
                "inner_ends=split makes documents of its parts; is end_of_document the right id?"
            )
        whole_lengths = np.diff(ends, prepend=0)
        num_bytes = counter.count(whole, whole_lengths) if counter else np.zeros(len(ends), np.uint64)
        writer.add_documents(whole, whole_lengths, num_bytes)
    if not writer.num_documents:
        raise DataError(f"{idx_path(index.prefix)} names no document")
    return ended, last_ids


def _blocks(index: MegatronIndex) -> Iterator[tuple[int, NDArray[Any], NDArray[np.int64]]]:
    """Documents in blocks of bounded size: the number of the first, ids, and tokens of each, which may be 0."""
    tokens = index.tokens()
    position = 0
    for first, lengths in iter_document_lengths(index):
        ends = np.cumsum(lengths)
        start = 0
        while start < len(lengths):
            before = int(ends[start - 1]) if start else 0
            stop = max(int(np.searchsorted(ends, before + BLOCK_TOKENS, side="right")), start + 1)
            size = int(ends[stop - 1]) - before
            yield first + start, np.asarray(tokens[position : position + size]), lengths[start:stop]
            position, start = position + size, stop


def _check_ids(index: MegatronIndex, tokens: NDArray[Any], vocab_size: int) -> None:
    if len(tokens) and not 0 <= tokens.min() <= tokens.max() < vocab_size:
        raise DataError(
            f"{bin_path(index.prefix)}: token ids from {tokens.min()} to {tokens.max()} do not fit a vocabulary of "
            f"{vocab_size}: is it the tokenizer that wrote them?"
        )
