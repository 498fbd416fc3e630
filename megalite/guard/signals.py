"""A signal asks a run to stop where it can go on later; a second one ends it at once."""

import contextlib
import os
import signal
import threading
import time
from collections.abc import Iterator

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
# A scheduler tells a launcher and its ranks, and the launcher tells the ranks again: that is one signal, not two.
TOGETHER_SECONDS = 1.0


@contextlib.contextmanager
def ending_at_once(code: int) -> Iterator[None]:
    """Within the block SIGTERM and SIGUSR1 end this process with `code`: nothing has begun that would be saved."""

    def end(number: int, frame: object) -> None:
        os.write(2, f"stopped by {signal.Signals(number).name} before training began\n".encode())
        os._exit(code)  # no exception: what is being imported may swallow it

    handlers = {number: signal.signal(number, end) for number in (signal.SIGTERM, signal.SIGUSR1)}
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


class StopSignals:
    """Catches SIGTERM, SIGUSR1 and SIGINT in this process, from its main thread, until closed.

    What to do about a stop is for all ranks to agree on: here it is only noted. Nothing is done in a handler. A thread
    reads what the interpreter writes to a pipe at once, so that a second signal counts while the main thread waits in a
    collective that will never end.
    """

    def __init__(self) -> None:
        self.received: str | None = None  # the first signal's name
        self._first = 0.0
        read, write = os.pipe()
        os.set_blocking(write, False)
        self._pipe = read, write
        self._wakeup = signal.set_wakeup_fd(write, warn_on_full_buffer=False)
        self._handlers = {number: signal.signal(number, lambda *_: None) for number in SIGNALS}
        self._thread = threading.Thread(target=self._listen, name="signals", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Put back what was there before."""
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(self._wakeup)
        os.close(self._pipe[1])  # ends the thread
        self._thread.join()
        os.close(self._pipe[0])

    def _listen(self) -> None:
        while numbers := os.read(self._pipe[0], 64):
            for number in numbers:
                if number in SIGNALS:
                    self._note(number)

    def _note(self, number: int) -> None:
        now = time.monotonic()
        if self.received is None:
            self.received, self._first = signal.Signals(number).name, now
        elif now - self._first > TOGETHER_SECONDS:
            os._exit(128 + number)
