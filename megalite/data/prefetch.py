"""Reading ahead: a thread that prepares what will be asked for next."""

import queue
import threading
import time
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Generic, TypeVar

T = TypeVar("T")
_CLOSE_SECONDS = 30.0  # a read that takes longer is left behind
_LOOK_SECONDS = 0.1  # how often a thread with nowhere to put its work looks whether anybody still wants it


class Prefetcher(Generic[T]):
    """`next()` gives `make(position)` for one position after the other, made ahead in a thread; close it after use.

    What is made, and in which order, does not depend on `depth`. An exception of `make` comes out of the `next` that
    would have returned its result, and of every later one. At most `depth` results wait; with depth 0 there is no
    thread and `next` makes them itself.
    """

    def __init__(self, make: Callable[[int], T], positions: Sequence[int], depth: int):
        """`positions`: everything that will be asked for, in order."""
        self.wait_seconds = 0.0  # that `next` has taken, all calls together
        self._make, self._positions = make, iter(positions)
        self._closed = threading.Event()
        self._ready: queue.Queue[tuple[T | None, BaseException | None]] = queue.Queue(depth)
        self._failure: BaseException | None = None
        # A daemon: a read that hangs on a dead file system must not keep the process from ending.
        self._thread = threading.Thread(target=self._work, name="prefetch", daemon=True) if depth else None
        if self._thread:
            self._thread.start()

    def next(self) -> T:
        """The result for the next position. Raises what `make` raised, and `StopIteration` after the last position."""
        started = time.perf_counter()
        try:
            if self._failure is not None:
                raise self._failure
            if self._thread is None:
                return self._make(next(self._positions))
            result, self._failure = self._ready.get()
            if self._failure is not None:
                raise self._failure
            return result  # type: ignore[return-value]
        finally:
            self.wait_seconds += time.perf_counter() - started

    def close(self) -> None:
        """Stop reading ahead and wait for the thread; results that nobody asked for are dropped. Twice does no harm."""
        self._closed.set()
        if self._thread is not None:
            self._thread.join(_CLOSE_SECONDS)

    def __enter__(self) -> "Prefetcher[T]":
        """For `with`."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close."""
        self.close()

    def _work(self) -> None:
        try:
            for position in self._positions:
                if not self._put(self._make(position), None):
                    return
            raise StopIteration
        except BaseException as error:  # whatever it is, the trainer must hear of it instead of waiting for ever
            self._put(None, error)

    def _put(self, result: T | None, failure: BaseException | None) -> bool:
        """False when nobody wants it any more."""
        while not self._closed.is_set():
            try:
                self._ready.put((result, failure), timeout=_LOOK_SECONDS)
                return True
            except queue.Full:
                continue
        return False
