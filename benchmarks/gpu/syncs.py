"""Where the host waits for the device during one training step.

On CUDA torch itself reports synchronising operations (`torch.cuda.set_sync_debug_mode`, which does not see those of
torch.distributed); explicit waits are counted by wrapping them. On a CPU, where nothing is asynchronous, the operations
that would wait on a GPU are counted as they are dispatched: `.item()`, `nonzero` and their kin.
"""

import collections
import contextlib
import importlib.util
import os
import sys
import traceback
import warnings
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.gpu.facts import pick_device
from benchmarks.gpu.isolate import Emit
from benchmarks.gpu.training import TrainingCell, ZeroStage, cell_config, prepared_engine

# Operations whose result, or its size, the host must know.
_READS = ("_local_scalar_dense", "equal", "is_nonzero", "masked_select", "nonzero", "unique_consecutive", "_unique2")
_WAITS = ((torch.cuda, "synchronize"), (torch.cuda.Stream, "synchronize"), (torch.cuda.Event, "synchronize"))


class SyncLog:
    """Places where the host waited, with how often."""

    def __init__(self) -> None:
        self.counts: collections.Counter[tuple[str, str]] = collections.Counter()
        specs = {name: importlib.util.find_spec(name) for name in ("megalite", "deepspeed")}
        self._folders = {name: os.path.dirname(spec.origin) for name, spec in specs.items() if spec and spec.origin}

    def add(self, what: str) -> None:
        """Count one wait at the innermost line of megalite or DeepSpeed on the stack (else the innermost line)."""
        stack = [frame for frame in traceback.extract_stack() if frame.filename not in (__file__, warnings.__file__)]
        named = [(name, frame) for frame in stack if (name := self._name(frame.filename))]
        name, frame = named[-1] if named else (os.path.basename(stack[-1].filename), stack[-1])
        self.counts[f"{name}:{frame.lineno} {frame.name}", what] += 1

    def _name(self, file: str) -> str | None:
        """`megalite/<file>` or `deepspeed/<file>`; None for other packages' files."""
        for package, folder in self._folders.items():
            if file.startswith(folder + os.sep):
                return package + file[len(folder) :]
        return None

    @property
    def places(self) -> list[dict[str, Any]]:
        """`count`, `where` (file:line function) and `what`, most frequent first."""
        return [{"count": n, "where": where, "what": what} for (where, what), n in self.counts.most_common()]

    @property
    def ours(self) -> int:
        """How many of them lie in megalite."""
        return sum(n for (where, _), n in self.counts.items() if where.startswith(f"megalite{os.sep}"))


@contextlib.contextmanager
def recorded_syncs(device: torch.device) -> Iterator[SyncLog]:
    """Record where the host waits inside the block. Backward passes run on the calling thread, to show their place."""
    log = SyncLog()
    with torch.autograd.set_multithreading_enabled(False), _cuda(log) if device.type == "cuda" else _ReadMode(log):
        yield log


@contextlib.contextmanager
def _cuda(log: SyncLog) -> Iterator[None]:
    def show(message: Warning | str, *_details: Any, **_more: Any) -> None:
        if "synchronizing CUDA operation" in str(message):
            log.add("synchronizing operation")

    with contextlib.ExitStack() as stack:
        stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("always")
        warnings.showwarning = show
        for owner, name in _WAITS:
            stack.enter_context(mock.patch.object(owner, name, _counting(log, owner, name)))
        previous = torch.cuda.get_sync_debug_mode()
        torch.cuda.set_sync_debug_mode("warn")
        stack.callback(torch.cuda.set_sync_debug_mode, previous)
        yield


def _counting(log: SyncLog, owner: Any, name: str) -> Any:
    original = getattr(owner, name)

    def counted(*args: Any, **kwargs: Any) -> Any:
        log.add(f"{owner.__name__}.{name}")
        return original(*args, **kwargs)

    return counted


class _ReadMode(TorchDispatchMode):
    def __init__(self, log: SyncLog) -> None:
        super().__init__()
        self.log = log

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket.__name__ in _READS:
            self.log.add(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


def syncs(emit: Emit, device_name: str, zero_stage: ZeroStage) -> None:
    """One row: the waits of one step of a small model with dropout and two micro batches, data and optimizer inside.

    Fails where one lies in megalite; DeepSpeed's own check for inf and nan is one that is known.
    """
    device = pick_device(device_name)
    cell = TrainingCell("gpt2_124m", False, True, zero_stage, accumulation=2, dropout=0.1, precision="bf16")
    with prepared_engine(cell_config(cell, device.type), device) as run:
        for step in range(3):
            run.train_step(step, 4)
        with recorded_syncs(device) as log:
            run.train_step(3, 4)
    total = sum(log.counts.values())
    emit(
        {
            "case": f"ZeRO {zero_stage}",
            "status": "failed" if log.ours else "ok",
            "method": "torch.cuda.set_sync_debug_mode" if device.type == "cuda" else "dispatched reads",
            "syncs": total,
            "syncs_of_megalite": log.ours,
            "where": log.places,
            "error": f"the step waits {log.ours} times in megalite" if log.ours else "",
        }
    )
    print(f"ZeRO {zero_stage}: {total} host synchronisations", file=sys.stderr)
