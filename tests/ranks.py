"""Run a function on several real ranks: forked from the pytest process, which holds the slow imports; gloo, CPU.

A fork of a warm process takes milliseconds, so every test gets fresh ranks, with no state left by the test before.
"""

import pickle
import signal
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from deepspeed.utils import groups

from megalite.config.place import Place
from megalite.launch.spawn import spawn_ranks


def run_ranks(world_size: int, function: Callable[..., Any], *args: Any) -> list[Any]:
    """Run `function(*args)` on every rank, inside a process group; returns the ranks' results in order.

    An exception on any rank is raised here, with that rank's number. A rank that dies in native code (met once in some
    thousand forks: glibc found its heap damaged) is reported as a warning, and all ranks run once more.
    """
    try:
        return _run_once(world_size, function, *args)
    except NativeCrashError as crash:
        warnings.warn(f"{crash}; run again", stacklevel=2)
        return _run_once(world_size, function, *args)


class NativeCrashError(RuntimeError):
    """A rank was ended by SIGABRT or SIGSEGV."""


def _run_once(world_size: int, function: Callable[..., Any], *args: Any) -> list[Any]:
    # Process groups have threads, which a fork does not take along: letting go of an inherited one would wait for ever.
    assert groups.mpu is None, "an engine was built in the pytest process itself; build it in run_ranks"
    with tempfile.TemporaryDirectory() as folder:

        def rank_main(place: Place) -> None:
            torch.set_num_threads(1)
            dist.init_process_group("gloo", init_method=place.init_method, rank=place.rank, world_size=world_size)
            try:
                outcome: tuple[str, Any] = ("result", function(*args))
            except BaseException as error:
                outcome = ("error", f"{type(error).__name__}: {error}")
                raise
            finally:
                temporary = Path(folder) / f"{place.rank}.tmp"
                temporary.write_bytes(pickle.dumps(outcome))
                temporary.rename(Path(folder) / str(place.rank))

        code = spawn_ranks(rank_main, world_size)
        outcomes = {int(file.name): pickle.loads(file.read_bytes()) for file in Path(folder).glob("[0-9]*")}  # noqa: S301
    errors = [f"rank {rank}: {value}" for rank, (kind, value) in sorted(outcomes.items()) if kind == "error"]
    if code in (128 + signal.SIGABRT, 128 + signal.SIGSEGV):
        raise NativeCrashError(f"a rank of {getattr(function, '__name__', function)} ended with code {code}")
    if errors or code:
        raise RuntimeError("\n".join(errors) or f"a rank ended with code {code}")
    return [outcomes[rank][1] for rank in range(world_size)]
