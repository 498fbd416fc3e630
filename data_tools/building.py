"""Documents -> token stores: `output/{train,validation}/<source>/`, and a report beside them.

The parent reads and writes in order; worker processes only encode, so the bytes do not depend on how many there are.
Everything is written under a temporary name and renamed once, when all stores are whole.
"""

import functools
import json
import multiprocessing
import os
import signal
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack, closing
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import xxhash
from numpy.typing import NDArray

from megalite.config.schema_data import DataBuildConfig
from megalite.config.validate_commands import validate_data_build
from megalite.data.files import new_directory, write_synced
from megalite.data.writer import StoreWriter
from megalite.errors import DataError, ResourceError
from megalite.log import get_logger
from megalite.tokenizer import Tokenizer, load_tokenizer

from .readers import Document, ReadReport, iter_documents

log = get_logger(__name__)

REPORT = "build_report.json"
_CHUNK_BYTES = 1 << 18  # text that a worker encodes at a time
_CHUNK_DOCUMENTS = 1024
_MAX_SOURCES = 64  # each holds up to six files open
_LOG_SECONDS = 30

Encoded = tuple[NDArray[np.uint32], list[int]]  # ids of a chunk's documents side by side, and their counts


@dataclass
class StoreReport:
    """Counts of one store; tokens include the end-of-document ones. `unknown_tokens` are text that was lost."""

    documents: int
    tokens: int
    unknown_tokens: int
    bytes: int
    bytes_per_token: float


@dataclass
class BuildReport:
    """What a build read, skipped and wrote. `stores` is keyed by the path below `output`, such as train/books."""

    output: str
    tokenizer_digest: str
    files: int = 0
    documents_read: int = 0
    skipped: dict[str, int] = field(default_factory=dict)
    stores: dict[str, StoreReport] = field(default_factory=dict)

    @property
    def paths(self) -> dict[str, Path]:
        """Where each store stands."""
        return {name: Path(self.output) / name for name in self.stores}


def build_store(config: DataBuildConfig) -> BuildReport:
    """Tokenise `config.input` into stores below `config.output`.

    Raises `ConfigError` for values out of range, `DataError` for bad input, an unfit tokenizer, an output that exists
    (without `overwrite`) or no document at all, `ResourceError` when the disk or a worker gives out. After an error
    nothing stands under the final name.
    """
    validate_data_build(config)
    tokenizer = load_tokenizer(config.tokenizer.path)
    output = Path(config.output)
    read = ReadReport()
    report = BuildReport(output=config.output, tokenizer_digest=tokenizer.digest)
    try:
        with new_directory(output, overwrite_mark=REPORT if config.overwrite else None) as temporary:
            documents = iter_documents(config.input, config.reader, read)
            with closing(_encoded(documents, tokenizer, config)) as encoded:
                writers, unknown = _write_stores(temporary, encoded, tokenizer, config)
            if not writers:
                raise DataError(
                    f"no document is left of {read.files} files; skipped: {dict(read.skipped) or 'nothing'}"
                )
            report.files, report.documents_read = read.files, read.documents
            report.skipped = dict(sorted(read.skipped.items()))
            report.stores = {name: _store_report(writer, unknown[name]) for name, writer in sorted(writers.items())}
            write_synced(temporary / REPORT, json.dumps(asdict(report), indent=2, ensure_ascii=False) + "\n")
    except OSError as error:
        raise ResourceError(f"writing {output} failed: {error}. Is the disk full, or the folder read-only?") from None
    except BrokenProcessPool:
        raise ResourceError("a worker process died, perhaps for want of memory: set a smaller workers=") from None
    return report


def _write_stores(
    folder: Path, encoded: Iterable[tuple[Document, NDArray[np.uint32]]], tokenizer: Tokenizer, config: DataBuildConfig
) -> tuple[dict[str, StoreWriter], Counter[str]]:
    """Write each document into the store of its split and source.

    Returns the writers, closed, and the counts of unknown tokens, both by path below `folder`.
    """
    writers: dict[str, StoreWriter] = {}
    unknown: Counter[str] = Counter()
    logged, documents = time.monotonic(), 0
    with ExitStack() as stack:
        for document, ids in encoded:
            name = f"{document.split or _split_by_hash(document.id, config)}/{document.source}"
            if name not in writers:
                if len({key.split("/", 1)[1] for key in writers} | {document.source}) > _MAX_SOURCES:
                    raise DataError(
                        f"more than {_MAX_SOURCES} sources: is reader.source_column={config.reader.source_column} "
                        "the right column?"
                    )
                writers[name] = stack.enter_context(_new_writer(folder / name, document.source, tokenizer, config))
                writers[name].add_tokenizer(tokenizer)
            writers[name].add_document(ids, document.num_bytes)
            unknown[name] += 0 if tokenizer.unknown is None else int(np.count_nonzero(ids == tokenizer.unknown))
            documents += 1
            if time.monotonic() - logged > _LOG_SECONDS:
                logged = time.monotonic()
                log.info("%d documents, %d tokens", documents, sum(w.num_tokens for w in writers.values()))
    if unknown.total():
        log.warning(
            "%d of %d tokens are unknown: text that the tokenizer cannot spell is lost; train one with byte fallback",
            unknown.total(),
            sum(writer.num_tokens for writer in writers.values()),
        )
    return writers, unknown


def _new_writer(path: Path, source: str, tokenizer: Tokenizer, config: DataBuildConfig) -> StoreWriter:
    return StoreWriter(
        path,
        vocab_size=tokenizer.vocab_size,
        end_of_document=tokenizer.end_of_document,
        source=source,
        shard_tokens=config.shard_tokens,
    )


def _store_report(writer: StoreWriter, unknown_tokens: int) -> StoreReport:
    ratio = writer.num_bytes / writer.num_tokens
    return StoreReport(writer.num_documents, writer.num_tokens, unknown_tokens, writer.num_bytes, round(ratio, 4))


def _split_by_hash(document_id: str, config: DataBuildConfig) -> str:
    """The split of a document that no column tells: a hash of the seed and its id, so that order does not matter."""
    share = xxhash.xxh3_64_intdigest(f"{config.seed}/{document_id}".encode("utf-8", "surrogatepass")) / 2**64
    return "validation" if share < config.validation_fraction else "train"


def _encoded(
    documents: Iterator[Document], tokenizer: Tokenizer, config: DataBuildConfig
) -> Generator[tuple[Document, NDArray[np.uint32]], None, None]:
    """Documents with their ids, in order. One worker is this process itself."""
    workers = config.workers or os.cpu_count() or 1
    chunks = _chunks(documents)
    if workers == 1:
        for chunk in chunks:
            yield from _split_chunk(chunk, encode_chunk(tokenizer, [d.text for d in chunk]))
        return
    # Spawned, not forked: pyarrow has threads by now. Children import this module, hence no torch.
    pool = ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), initializer=start_worker)
    encode = functools.partial(_encode_in_worker, config.tokenizer.path)
    try:
        yield from _in_order(pool, encode, chunks, at_once=2 * workers)
    finally:
        pool.shutdown(cancel_futures=True)


def _in_order(
    pool: ProcessPoolExecutor, encode: Callable[[list[str]], Encoded], chunks: Iterator[list[Document]], at_once: int
) -> Iterator[tuple[Document, NDArray[np.uint32]]]:
    """Results in the order of the chunks, with a bounded number of them in memory."""
    running: deque[tuple[list[Document], Future[Encoded]]] = deque()
    for chunk in chunks:
        running.append((chunk, pool.submit(encode, [d.text for d in chunk])))
        if len(running) >= at_once:
            done, future = running.popleft()
            yield from _split_chunk(done, future.result())
    for done, future in running:
        yield from _split_chunk(done, future.result())


def _chunks(documents: Iterator[Document]) -> Iterator[list[Document]]:
    chunk: list[Document] = []
    size = 0
    for document in documents:
        chunk.append(document)
        size += document.num_bytes
        if size >= _CHUNK_BYTES or len(chunk) >= _CHUNK_DOCUMENTS:
            yield chunk
            chunk, size = [], 0
    if chunk:
        yield chunk


def encode_chunk(tokenizer: Tokenizer, texts: Sequence[str]) -> Encoded:
    """Ids of some documents in the compact form that travels between processes."""
    encoded = tokenizer.encode_batch(texts)
    return np.concatenate([np.array(ids, np.uint32) for ids in encoded]), [len(ids) for ids in encoded]


def _split_chunk(chunk: list[Document], encoded: Encoded) -> Iterator[tuple[Document, NDArray[np.uint32]]]:
    ids, counts = encoded
    return zip(chunk, np.split(ids, np.cumsum(counts)[:-1]), strict=True)


def _encode_in_worker(tokenizer_path: str, texts: list[str]) -> Encoded:
    return encode_chunk(_tokenizer_of_worker(tokenizer_path), texts)


@functools.lru_cache(maxsize=1)
def _tokenizer_of_worker(path: str) -> Tokenizer:
    return load_tokenizer(path)


def start_worker() -> None:
    """What a worker needs first: one thread, Ctrl-C left to the parent, and an end when the parent is killed.

    Without the last a worker would wait for work for ever.
    """
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    assert parent is not None, "called in a worker"

    def watch() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
