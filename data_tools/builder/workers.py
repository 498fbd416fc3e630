"""The processes of a build: this one, and as many more as are asked for."""

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from megalite.config.place import count_cores
from megalite.config.schema_data import DataBuildConfig
from megalite.log import get_logger
from megalite.tokenizer import Tokenizer

from .segments import finished_heads, read_done
from .units import Unit, Worker

log = get_logger(__name__)

_LOG_SECONDS = 30


def run_units(
    work: Callable[[Worker, Unit], None],
    units: Sequence[Unit],
    config: DataBuildConfig,
    leaks: Path | None,
    tokenizer: Tokenizer,
) -> None:
    """Do what is not done of a kind of work. One of the workers is this process itself."""
    workers = min(config.workers or count_cores(), len(units))
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
