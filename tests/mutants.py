"""Mutated files read in forked children: what crashes, hangs, takes too much memory or raises a foreign error is named.

A mutant is a number, from which everything about it follows, so that one can be looked at again by itself.
"""

import faulthandler
import json
import os
import random
import resource
import signal
import struct
import traceback
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megalite.errors import MegaliteError

SPARE_BYTES = 64 << 20  # what a child may take besides twice the files' size
_IN_A_CHILD = 50
_NUMBERS = (
    0,
    1,
    2,
    7,
    2**15,
    2**16,
    2**31 - 1,
    2**31,
    2**32 - 1,
    2**32,
    2**40,
    2**61,
    2**62,
    2**63 - 1,
    2**63,
    2**64 - 1,
)
_DEEP, _LONG = "@deep@", "@long@"  # stand for what json.dumps itself refuses to write
_VALUES: tuple[Any, ...] = (
    *(-1, 0, 1, 2, 65_536, 65_537, 2**31, 2**32, 2**62, 2**63, 2**64, 10**40, 10**4000, -(10**4000)),
    *(0.5, 1e308, float("nan"), float("inf"), None, True, False, [], {}, [[]], {"a": 1}, _DEEP, _LONG),
    *("", ".", "..", "../x", "/etc/passwd", "a/../../b", "tokenizer", "manifest.json", "tokens_00000.bin"),
    *("a\0b", "\ud800", "a" * 300, "a/" * 3000, "\u202e", "uint16", "uint32", "int64"),
)


@dataclass
class Outcome:
    """What became of the mutants: how many were read, how many refused, and what must not be."""

    read: int = 0
    refused: Counter[str] = field(default_factory=Counter)  # by the kind of error
    bad: dict[int, str] = field(default_factory=dict)  # mutant -> what it did


def run_mutants(
    numbers: Iterable[int], read: Callable[[int, Path], None], folder: Path, seconds: float = 5.0
) -> Outcome:
    """Call `read(number, scratch folder)` for every mutant in forked children.

    It makes the mutant there, calls `limit_memory` with the size of its files, and reads it; `seconds` bounds that.
    """
    outcome = Outcome()
    left = list(numbers)
    while left:
        batch, log = left[:_IN_A_CHILD], folder / f"log_{left[0]}"
        pid = os.fork()
        if pid == 0:
            _child(batch, read, folder, log, seconds)
        _, status = os.waitpid(pid, 0)
        lines = [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []
        started = [number for number, what in lines if what == "started"]
        for number, what in lines:
            if what == "read":
                outcome.read += 1
            elif what.startswith("refused "):
                outcome.refused[what.removeprefix("refused ")] += 1
            elif what != "started":
                outcome.bad[number] = what
        if status:
            last = started[-1] if started else batch[0]
            outcome.bad[last] = _ending(status, seconds)
            left = left[len(started) or 1 :]
        else:
            left = left[len(batch) :]
    return outcome


def limit_memory(num_bytes: int) -> None:
    """Let this process take twice `num_bytes` and the spare more than it has now."""
    size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    hard = resource.getrlimit(resource.RLIMIT_AS)[1]
    resource.setrlimit(resource.RLIMIT_AS, (size + 2 * num_bytes + SPARE_BYTES, hard))


def free_memory() -> None:
    """Take the limit away."""
    hard = resource.getrlimit(resource.RLIMIT_AS)[1]
    resource.setrlimit(resource.RLIMIT_AS, (hard, hard))


def mutate_bytes(data: bytes, rng: random.Random) -> bytes:
    """One to four changes: bits, cuts, insertions, numbers of 2, 4 or 8 bytes, pieces doubled."""
    changed = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 4))):
        at = rng.randrange(len(changed) + 1)
        kind = rng.randrange(6)
        if kind == 0 and at < len(changed):
            changed[at] ^= 1 << rng.randrange(8)
        elif kind == 1:
            del changed[at:]
        elif kind == 2:
            changed[at:at] = rng.randbytes(rng.choice((1, 2, 8, 100)))
        elif kind == 3:
            del changed[at : at + rng.choice((1, 2, 8, 100))]
        elif kind == 4:
            changed[at:at] = changed[at : at + 8 * rng.randrange(1, 9)]
        else:
            width, layout = rng.choice(((2, "<H"), (4, "<I"), (8, "<Q")))
            if len(changed) >= width:
                at = rng.randrange(len(changed) - width + 1)
                at -= at % width if rng.random() < 0.5 else 0
                struct.pack_into(layout, changed, at, rng.choice(_NUMBERS) % 256**width)
    return bytes(changed)


def mutate_json(values: Any, rng: random.Random) -> str:
    """The text of `values` with one to three of its nodes changed, taken out, doubled or renamed."""
    for _ in range(rng.choice((1, 1, 2, 3))):
        values = _changed_node(values, rng)
    text = json.dumps(values)
    return text.replace(f'"{_DEEP}"', "[" * 100_000 + "]" * 100_000).replace(f'"{_LONG}"', "9" * 5000)


def _changed_node(value: Any, rng: random.Random) -> Any:
    inner: Sequence[Any] = (
        list(value) if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ()
    )
    if not inner or rng.random() < 0.15:
        return rng.choice(_VALUES)
    key, copy = rng.choice(inner), value.copy()
    action = rng.random()
    if action < 0.7:
        copy[key] = _changed_node(value[key], rng)
    elif action < 0.85:
        del copy[key]
    elif isinstance(copy, list):
        copy.append(value[key])
    else:
        copy[str(rng.choice(_VALUES))[:50]] = copy[key]
    return copy


def _child(batch: Sequence[int], read: Callable[[int, Path], None], folder: Path, log: Path, seconds: float) -> None:
    """Read the mutants of a batch, and leave without what pytest does at the end of a process."""
    code = 1
    try:
        faulthandler.disable()  # a crash is told by the parent
        os.fsync = lambda descriptor: None  # type: ignore[assignment]  # thousands of stores that nobody keeps
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        with open(log, "w") as file:
            for number in batch:
                scratch = folder / str(number)
                scratch.mkdir()
                print(json.dumps([number, "started"]), file=file, flush=True)
                signal.setitimer(signal.ITIMER_REAL, seconds)
                what = _told(number, read, scratch)
                signal.setitimer(signal.ITIMER_REAL, 0)
                free_memory()
                print(json.dumps([number, what]), file=file, flush=True)
        code = 0
    finally:
        os._exit(code)


def _told(number: int, read: Callable[[int, Path], None], scratch: Path) -> str:
    try:
        read(number, scratch)
    except MegaliteError as error:
        str(error).encode("utf-8", "backslashreplace")
        return f"refused {type(error).__name__}"
    except BaseException:
        free_memory()
        return traceback.format_exc()
    return "read"


def _ending(status: int, seconds: float) -> str:
    code = os.waitstatus_to_exitcode(status)
    if code == -signal.SIGALRM:
        return f"took longer than {seconds} s"
    return f"ended by {signal.Signals(-code).name}" if code < 0 else f"left with code {code}"
