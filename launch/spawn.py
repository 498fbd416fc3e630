"""Start ranks on this machine: the only place in the project that starts processes of a training run.

Ranks are forked from a parent that has done the slow imports and has touched no device (importing DeepSpeed would where
there is a GPU, so there each rank imports it). They meet through a file, so no port is taken.
"""

import contextlib
import ctypes
import multiprocessing
import os
import signal
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from types import FrameType
from typing import Any

import xxhash

from megalite.config.place import Place
from megalite.errors import EXIT_FAILURE, EXIT_REQUEUE, MegaliteError
from megalite.guard.goodput import process_started
from megalite.guard.signals import SIGNALS

_PR_SET_PDEATHSIG = 1
_GRACE_SECONDS = 3.0  # between the polite signal and the last one, for ranks that wait for one that has failed


def spawn_ranks(target: Callable[[Place], None], world_size: int) -> int:
    """Run `target(place)` in `world_size` forked processes and wait for all; returns the exit code of the run.

    When one rank fails, the others, which wait for it in a collective, are ended, and the first failure's code is
    returned; ranks that were asked to stop each end in their own time. A `MegaliteError` is printed without a
    traceback, and once when several ranks raise the same. SIGINT, SIGTERM and SIGUSR1 are passed on to the ranks; when
    one ends a rank that does not listen yet, the code is EXIT_REQUEUE: nothing has begun that could be lost. A rank
    dies with its parent.
    """
    context = multiprocessing.get_context("fork")
    # Held back, in ranks too, until there is somebody to pass them on to: none is lost, and none runs a handler twice.
    before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    with _unblocked_after(before), tempfile.TemporaryDirectory(prefix="megalite-") as folder:
        init_method = f"file://{Path(folder) / 'store'}"
        ranks = [
            context.Process(
                target=_run,
                args=(
                    target,
                    Place(r, r, world_size, world_size, init_method, started=process_started()),
                    os.getpid(),
                    Path(folder),
                    before,
                ),
                name=f"rank {r}",
            )
            for r in range(world_size)
        ]
        passed_on: list[int] = []
        previous = {number: signal.signal(number, _forwarder(ranks, passed_on)) for number in SIGNALS}
        try:
            for process in ranks:
                process.start()
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
            return _wait(ranks, passed_on)
        finally:
            _end(ranks)
            for number, handler in previous.items():
                signal.signal(number, handler)


@contextlib.contextmanager
def _unblocked_after(mask: Iterable[int]) -> Iterator[None]:
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)


def _run(target: Callable[[Place], None], place: Place, parent: int, folder: Path, mask: Iterable[int]) -> None:
    """The life of one rank; `folder` is shared by all of them, `mask` the signals that are blocked in it."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(EXIT_FAILURE)  # the parent died before the line above
    for number in SIGNALS:
        signal.signal(number, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_SETMASK, mask)
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")  # all ranks are on this machine: listen on the loopback only
    code = 0
    try:
        target(place)
    except MegaliteError as error:
        message = f"{type(error).__name__}: {error}"
        if _is_first_to_say(message, folder):
            _say(f"rank {place.rank}: {message}")
        code = error.exit_code
    except SystemExit as exit_request:
        code = exit_request.code if isinstance(exit_request.code, int) else EXIT_FAILURE
    except BaseException:
        _say(f"rank {place.rank}:\n{traceback.format_exc()}")
        code = EXIT_FAILURE
    sys.stdout.flush()
    sys.stderr.flush()
    # Skip the interpreter's teardown: process groups hold threads that may wait for a peer which has already gone.
    os._exit(code)


def _say(text: str) -> None:
    """Write a line in one piece: `print` writes text and newline apart, and an unbuffered stream mixes ranks up."""
    sys.stderr.write(f"{text}\n")


def _is_first_to_say(message: str, folder: Path) -> bool:
    """True for one of the ranks that fail with the same words: the user reads them once."""
    try:
        (folder / xxhash.xxh3_64_hexdigest(message.encode())).touch(exist_ok=False)
    except FileExistsError:
        return False
    except OSError:
        return True  # the parent and its folder are gone
    return True


def _wait(ranks: Sequence[BaseProcess], passed_on: Sequence[int]) -> int:
    waiting: dict[Any, BaseProcess] = {process.sentinel: process for process in ranks}
    code = 0
    while waiting:
        for sentinel in wait(list(waiting)):
            process = waiting.pop(sentinel)
            process.join()
            if process.exitcode == EXIT_REQUEUE:
                code = EXIT_REQUEUE  # by agreement: the others come to it too
            elif process.exitcode:
                if -process.exitcode in passed_on:
                    return EXIT_REQUEUE
                if process.exitcode < 0:
                    print(f"{process.name} was ended by {_describe_signal(-process.exitcode)}", file=sys.stderr)
                return process.exitcode if process.exitcode > 0 else 128 - process.exitcode
    return code


def _describe_signal(number: int) -> str:
    # The kernel kills whom it finds when memory runs out, and says so in its own log only.
    hint = ": perhaps for want of memory" if number == signal.SIGKILL else ""
    return f"signal {number} ({signal.Signals(number).name}){hint}"


def _forwarder(ranks: Sequence[BaseProcess], passed_on: list[int]) -> Callable[[int, FrameType | None], None]:
    def forward(number: int, frame: FrameType | None) -> None:
        passed_on.append(number)
        for process in ranks:
            if process.is_alive() and process.pid is not None:
                os.kill(process.pid, number)

    return forward


def _end(ranks: Sequence[BaseProcess]) -> None:
    started = [process for process in ranks if process.pid is not None]
    for process in started:
        if process.is_alive():
            process.terminate()
    for process in started:
        process.join(_GRACE_SECONDS)
        if process.is_alive():
            process.kill()
            process.join()
