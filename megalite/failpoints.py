"""Named places where a test kills, stops or fails a process; anywhere else they do nothing."""

from collections.abc import Callable

on_failpoint: Callable[[str], None] | None = None  # set by tests alone, with the names below


def failpoint(name: str) -> None:
    """Here is the place called `name`."""
    if on_failpoint is not None:
        on_failpoint(name)
