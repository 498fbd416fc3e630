"""Documents -> token stores: `output/{train,validation}/<source>/`, and a report beside them.

1. The input is cut into units (files). Workers read, clean, hash and encode them into segments (`units.py`), in a work
   directory beside the output. A segment is written whole and done once: a build that was killed goes on from there.
2. Duplicates are found over all segments (`dedup.py`).
3. The segments that are left are put together, in the order of the input (`merging.py`), and get the final name.

The segments depend on the input and the configuration alone, so the stores are the same bytes for any number of workers
and however often the build was killed.
"""

import dataclasses
import glob
import json
import multiprocessing
import os
import shutil
import signal
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from functools import partial
from importlib import metadata
from pathlib import Path

import xxhash

import megalite
from megalite.config.schema_data import DataBuildConfig
from megalite.config.validate_commands import validate_data_build
from megalite.data.files import OVERWRITE_HINT, commit_directory, disk_errors, refuse_existing, write_synced
from megalite.data.manifest import DTYPES, dtype_for
from megalite.errors import DataError, ResourceError
from megalite.guard.lock import RunLock
from megalite.log import get_logger
from megalite.tokenizer import Tokenizer, load_tokenizer

from ..cleaning import build_cleaner
from ..formats import WHOLE
from ..readers import default_source, find_files, spans_of, status_of
from .decontamination import write_ngrams
from .dedup import find_duplicates
from .line_dedup import mark_repeats
from .merging import WrittenStore, write_stores
from .minhash import require_minhash
from .page import build_page
from .report import REPORT, REPORT_PAGE, BuildReport, make_report, read_report
from .segments import DOCUMENT, Counts, finished_heads, open_segments, read_done
from .units import SEGMENT_BYTES, Part, Unit, Worker

log = get_logger(__name__)

_LOG_SECONDS = 30
_TOGETHER_BYTES, _TOGETHER_FILES = 1 << 23, 256  # small files that make one unit
_LIBRARIES = ("ftfy", "selectolax", "py3langid", "trafilatura", "rensa")  # whose versions may change what is kept
# What the bytes of a build do not depend on, or where they go.
_NOT_IN_DIGEST = ("workers", "overwrite", "output")


def build_store(config: DataBuildConfig) -> BuildReport:
    """Tokenise `config.input` into stores below `config.output`; a build that was killed is gone on with.

    Raises `ConfigError` for values out of range, `DataError` for bad input, an unfit tokenizer, an output that exists
    (without `overwrite`) or no document at all, `ResourceError` when the disk or a worker gives out, or another build
    is at it. After an error nothing stands under the final name.
    """
    validate_data_build(config)
    build_cleaner(config.clean)  # its options are checked before a worker starts
    if config.dedup.near:
        require_minhash()
    mark = REPORT if config.overwrite else None
    output = Path(config.output)
    tokenizer = load_tokenizer(config.tokenizer.path)
    files = _without_builds(find_files(config.input, config.reader.format), output)
    work = output.with_name(f"{output.name}.work-{_digest(config, tokenizer, files)}")
    units = _units(config, files, work)
    if _was_committed(work, output, units):
        log.info("%s was finished already", output)
        _remove(work)
        return read_report(output)
    refuse_existing(output, mark, OVERWRITE_HINT)
    try:
        with disk_errors(output), _work_directory(work, units):
            report = _build(config, units, tokenizer, work)
            # So that what comes after the next line is known for what it is.
            (work / REPORT).write_text(_names(units), encoding="utf-8")
            commit_directory(work / "stores", output, mark)
    except BrokenProcessPool:
        raise ResourceError("a worker process died, perhaps for want of memory: set a smaller workers=") from None
    return report


def _without_builds(files: Sequence[Path], output: Path) -> list[Path]:
    """`files` but for those that a build of `output` has written itself, below an input that holds it."""
    own = output.resolve()
    began = f"{own.name}.work-"

    def is_own(path: Path) -> bool:
        folders = Path(os.path.realpath(path)).parents  # not resolve(), which raises for a loop of links
        return own in folders or any(f.parent == own.parent and f.name.startswith(began) for f in folders)

    kept = [path for path in files if not is_own(path)]
    if len(kept) < len(files):
        log.info("%d files below %s are left out of the input: a build wrote them", len(files) - len(kept), output)
    if not kept:
        raise DataError(f"input: every file found lies in the output, {output}")
    return kept


def _names(units: Sequence[Unit]) -> str:
    """What the input was, in short."""
    return "\n".join(unit.folder.name for unit in units)


def _was_committed(work: Path, output: Path, units: Sequence[Unit]) -> bool:
    """Whether a build of the same input was killed when its stores had their final name, and its work a folder yet."""
    mark = work / REPORT
    whole = mark.is_file() and (output / REPORT).is_file() and not (work / "stores").exists()
    return whole and mark.read_text(encoding="utf-8") == _names(units)


def _remove(work: Path) -> None:
    """The mark of what was committed goes last: a kill in between leaves it."""
    for path in work.iterdir():
        if path.is_dir():
            shutil.rmtree(path)
        elif path.name != REPORT:
            path.unlink()
    (work / REPORT).unlink(missing_ok=True)
    work.rmdir()


@contextmanager
def _work_directory(work: Path, units: Sequence[Unit]) -> Iterator[None]:
    """Make and lock a build's work directory; an error leaves it when there is much in it to go on from."""
    for other in work.parent.glob(f"{glob.escape(work.name.rsplit('-', 1)[0])}-*"):
        if other != work:
            log.warning("%s is left of a build with other settings: remove it when it is not wanted", other)
    lock = RunLock(work, "output", "build", "output")
    try:
        yield
    except BaseException:
        done = [unit for unit in units if read_done(unit.folder)]
        if len(done) < len(units) and sum(map(_num_bytes, done)) > SEGMENT_BYTES:
            log.warning("%d of %d parts are done and kept in %s: the same command goes on", len(done), len(units), work)
        else:
            shutil.rmtree(work)
        raise
    else:
        _remove(work)
    finally:
        lock.close()


def _build(config: DataBuildConfig, units: Sequence[Unit], tokenizer: Tokenizer, work: Path) -> BuildReport:
    """Fill `work/stores`."""
    leaks = work / "ngrams" if config.decontaminate.input else None
    if leaks:
        looked_for = write_ngrams(leaks, config.decontaminate, config.reader)
        if looked_for.too_short:
            log.warning(
                "%d of %d evaluation texts have fewer than decontaminate.ngram=%d words: they cannot be found",
                looked_for.too_short,
                looked_for.texts,
                config.decontaminate.ngram,
            )
    if config.dedup.lines:
        _run_units(Worker.hash_lines, units, config, leaks, tokenizer)
        mark_repeats([unit.folder for unit in units])
    _run_units(Worker.run, units, config, leaks, tokenizer)
    counts = _gather_counts(units)
    segments = open_segments([unit.folder for unit in units], DTYPES[dtype_for(tokenizer.vocab_size)])
    threshold = config.dedup.threshold if config.dedup.near else None
    dropped, duplicates = find_duplicates(segments, config.dedup.exact, threshold, _fresh(work / "duplicates"))
    stores = _fresh(work / "stores")
    written = write_stores(stores, segments, dropped, tokenizer, config)
    if not written:
        raise DataError(
            f"no document is left of {_num_files(units)} files; skipped: {dict(counts.skipped) or 'nothing'}; "
            f"dropped: {dict(counts.dropped) or 'nothing'}"
        )
    _warn_of_unknown(counts, written)
    report = make_report(config.output, tokenizer, _num_files(units), counts, duplicates, written, segments)
    write_synced(stores / REPORT, json.dumps(dataclasses.asdict(report), indent=2, ensure_ascii=False) + "\n")
    write_synced(stores / REPORT_PAGE, build_page(report))
    return report


def _digest(config: DataBuildConfig, tokenizer: Tokenizer, files: Sequence[Path]) -> str:
    """Of all that segments depend on beside their own files: settings, files that they name, libraries; their layout.

    With `dedup.lines` what is left of one file depends on those before it.
    """
    values = dataclasses.asdict(config)
    for name in _NOT_IN_DIGEST:
        values.pop(name)
    named = [Path(str(value)) for step in config.clean for key, value in step.options.items() if key.endswith("_file")]
    if config.decontaminate.input:
        named += find_files(config.decontaminate.input, "auto")
    if config.dedup.lines:
        named += files
    libraries = {name: _version_of(name) for name in _LIBRARIES}
    parts = [megalite.__version__, DOCUMENT.descr, libraries, tokenizer.digest, values, [*map(_identity, named)]]
    return xxhash.xxh3_64_hexdigest(json.dumps(parts, sort_keys=True).encode())


def _version_of(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _units(config: DataBuildConfig, files: Sequence[Path], work: Path) -> list[Unit]:
    """In order; a unit's folder is named by what its files are, so that a changed one is read again."""
    source = default_source(config.input, files, config.reader)
    groups: list[list[Part]] = []
    together = 0  # bytes of the last group
    for path in files:
        _, size, changed = _identity(path)
        for span in spans_of(path, config.reader):
            # Files of a few kB each would cost more in folders than in reading.
            fits = span == WHOLE and groups and together + size <= _TOGETHER_BYTES and len(groups[-1]) < _TOGETHER_FILES
            if not fits:
                groups.append([])
                together = 0
            together += size
            groups[-1].append(Part(path, span, size, changed))
    units = []
    for parts in groups:
        identity = json.dumps([source, *([str(part.path), *dataclasses.astuple(part)[1:]] for part in parts)])
        units.append(Unit(tuple(parts), source, work / f"unit_{xxhash.xxh3_64_hexdigest(identity.encode())}"))
    return units


def _num_files(units: Sequence[Unit]) -> int:
    return len({part.path for unit in units for part in unit.parts})


def _num_bytes(unit: Unit) -> int:
    """Of the segments that are written."""
    return sum(path.stat().st_size for path in unit.folder.iterdir())


def _identity(path: Path) -> tuple[str, int, int]:
    status = status_of(path)
    return str(path), status.st_size, status.st_mtime_ns


def _run_units(
    work: Callable[[Worker, Unit], None],
    units: Sequence[Unit],
    config: DataBuildConfig,
    leaks: Path | None,
    tokenizer: Tokenizer,
) -> None:
    """Do what is not done of a kind of work. One of the workers is this process itself."""
    workers = min(config.workers or os.cpu_count() or 1, len(units))
    own = Worker(config, leaks, tokenizer)
    if workers == 1:
        for unit in units:
            work(own, unit)
        return
    # Spawned, not forked: pyarrow has threads by now. Children import this module, hence no torch.
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(workers - 1, context, initializer=_start_worker, initargs=(config, leaks))
    try:
        with _progress_logged(units):
            futures = [pool.submit(_run_in_worker, work, unit) for unit in units]
            errors = _run_from_the_end(partial(work, own), units, futures)
            for number, future in enumerate(futures):  # in order: the error is the same for any number of workers
                if number in errors:
                    raise errors[number]
                if not future.cancelled():
                    future.result()
    finally:
        pool.shutdown(cancel_futures=True)


def _run_from_the_end(
    work: Callable[[Unit], None], units: Sequence[Unit], futures: "Sequence[Future[None]]"
) -> dict[int, Exception]:
    """Do here what no other worker has begun, until there is nothing left or one fails; returns how, by its number."""
    for number in reversed(range(len(units))):
        if futures[number].cancel():
            try:
                work(units[number])
            except Exception as error:
                return {number: error}
    return {}


@contextmanager
def _progress_logged(units: Sequence[Unit]) -> Iterator[None]:
    """A line now and then, from a thread: this process is at work itself."""
    ended = threading.Event()

    def log_now_and_then() -> None:
        while not ended.wait(_LOG_SECONDS):
            _log_progress(units)

    thread = threading.Thread(target=log_now_and_then, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def _log_progress(units: Sequence[Unit]) -> None:
    heads = [head for unit in units if unit.folder.is_dir() for head in finished_heads(unit.folder)]
    done = sum(1 for unit in units if read_done(unit.folder))
    documents, tokens = sum(head.documents for head in heads), sum(head.tokens for head in heads)
    log.info("%d of %d parts done; so far %d documents, %d tokens", done, len(units), documents, tokens)


def _gather_counts(units: Sequence[Unit]) -> Counts:
    """What became of the input of all units, whose messages are logged."""
    counts = Counts()
    for unit in units:
        done = read_done(unit.folder)
        assert done is not None, f"{unit.parts[0].path} was not finished"
        for head in finished_heads(unit.folder):
            counts.add(head.counts)
        counts.add(done[0])
        for message in done[1]:
            log.warning("%s", message)
    for reason, count in sorted(counts.skipped.items()):
        log.warning("skipped in all: %d x %s", count, reason)
    return counts


def _warn_of_unknown(counts: Counts, written: Mapping[str, WrittenStore]) -> None:
    if unknown := counts.unknown.total():
        log.warning(
            "%d of %d tokens are unknown: text that the tokenizer cannot spell is lost; train one with byte fallback",
            unknown,
            sum(store.writer.num_tokens for store in written.values()),
        )


def _fresh(folder: Path) -> Path:
    """An empty folder, whatever a killed build left there."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    return folder


_worker: Worker | None = None  # of this process, when it is one


def _run_in_worker(work: Callable[[Worker, Unit], None], unit: Unit) -> None:
    assert _worker is not None, "the pool's initializer has made it"
    work(_worker, unit)


def _start_worker(config: DataBuildConfig, leaks: Path | None) -> None:
    """What a worker needs first: one thread, Ctrl-C left to the parent, and an end when the parent is killed.

    Without the last a worker would wait for work for ever.
    """
    global _worker
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    assert parent is not None, "called in a worker"

    def watch() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
    _worker = Worker(config, leaks)
