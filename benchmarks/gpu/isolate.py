"""Run one part of the sweep in a process of its own, so that nothing it does can end the sweep.

A CUDA error poisons its process, a kernel may hang, a leak would count as memory of what comes next. The parent never
touches the device, so it can fork; rows travel through a file, line by line, and survive a process that is killed.
"""

import json
import multiprocessing
import os
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

Row = dict[str, Any]
Emit = Callable[[Row], None]


def run_isolated(function: Callable[..., None], seconds: float, *arguments: Any) -> list[Row]:
    """Call `function(emit, *arguments)` in a forked process; returns the rows it emitted, of any JSON values.

    A failure becomes a last row `{"status": "failed", "error": ...}`: an exception, a signal, or more than `seconds`.
    """
    with tempfile.TemporaryDirectory(prefix="megalite-sweep-") as folder:
        file = Path(folder) / "rows.jsonl"
        process = multiprocessing.get_context("fork").Process(target=_child, args=(function, file, arguments))
        process.start()
        process.join(seconds)
        overran = process.is_alive()
        if overran:
            process.kill()
            process.join()
        rows = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
    if overran:
        rows.append(_failure(f"stopped after {seconds:.0f} s: the time limit"))
    elif process.exitcode and not (rows and rows[-1]["status"] == "failed"):
        how = f"ended by signal {-process.exitcode}" if process.exitcode < 0 else f"exit code {process.exitcode}"
        rows.append(_failure(f"the process died: {how}"))
    return rows


def short_error(error: BaseException) -> str:
    """`Type: first line (file:line)`, with the deepest frame."""
    frames = traceback.extract_tb(error.__traceback__)
    place = f" ({Path(frames[-1].filename).name}:{frames[-1].lineno})" if frames else ""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:300] if lines else ''}{place}"


def _failure(error: str) -> Row:
    return {"status": "failed", "error": error}


def _child(function: Callable[..., None], file: Path, arguments: tuple[Any, ...]) -> None:
    code = 0
    # What libraries print is not part of the table.
    os.dup2(2, 1)
    with file.open("a", buffering=1) as out:

        def emit(row: Row) -> None:
            out.write(json.dumps(row) + "\n")

        started = time.perf_counter()
        try:
            function(emit, *arguments)
        except BaseException as error:
            traceback.print_exc()
            emit(_failure(short_error(error)) | {"seconds": time.perf_counter() - started})
            code = 1
    sys.stderr.flush()
    os._exit(code)  # not the interpreter's teardown, where threads of process groups may wait
