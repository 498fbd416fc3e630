"""One logger for the package. The launcher tells it the rank; libraries below only call `get_logger`."""

import contextlib
import logging
import sys
from collections.abc import Iterator
from pathlib import Path

_ROOT = "megalite"


def get_logger(name: str) -> logging.Logger:
    """The logger of a module, `megalite.<...>`; pass `__name__`."""
    return logging.getLogger(name if name.startswith(_ROOT) else f"{_ROOT}.{name}")


def setup_logging(rank: int = 0, log_file: Path | None = None) -> None:
    """Send messages to `log_file` (every rank its own) and, from rank 0, to standard error too.

    Other ranks print only errors to the terminal, so that sixty-four ranks do not say the same thing sixty-four times.
    """
    root = logging.getLogger(_ROOT)
    root.handlers.clear()
    root.propagate = False
    root.setLevel(logging.INFO)
    terminal = logging.StreamHandler(sys.stderr)
    terminal.setLevel(logging.INFO if rank == 0 else logging.ERROR)
    prefix = "" if rank == 0 else f"[rank {rank}] "
    terminal.setFormatter(logging.Formatter(prefix + "%(message)s"))
    root.addHandler(terminal)
    if log_file is not None:
        file = _PatientFileHandler(log_file, encoding="utf-8")
        file.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
        root.addHandler(file)


class _PatientFileHandler(logging.FileHandler):
    """Says once that a disk takes no more, and goes on trying: its buffer keeps what is to be written."""

    _has_warned = False

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802  logging's name
        """Within an `except` of logging's."""
        if not self._has_warned:
            self._has_warned = True
            sys.stderr.write(f"{self.baseFilename} cannot be written: {sys.exc_info()[1]}. This is said once.\n")


@contextlib.contextmanager
def errors_in_log(expected: type[Exception]) -> Iterator[None]:
    """An exception that leaves the block is written to the log file; on the terminal its launcher shows it.

    One that is `expected` is no error.
    """
    try:
        yield
    except Exception as error:
        level = logging.INFO if isinstance(error, expected) else logging.ERROR
        for handler in logging.getLogger(_ROOT).handlers:
            if isinstance(handler, logging.FileHandler):
                text = f"{type(error).__name__}: {error}"
                handler.handle(logging.LogRecord(_ROOT, level, __file__, 0, text, None, None))
        raise
