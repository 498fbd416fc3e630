"""One task of a sweep's array: `python -m megalite.launch.sweep.task DIRECTORY`, from the script of `array`."""

import json
import os
import signal
import sys
import time
from contextlib import suppress
from pathlib import Path

from megalite.config.frozen import read_config
from megalite.config.place import own_job
from megalite.errors import EXIT_RESOURCE, ConfigError, MegaliteError, ResourceError
from megalite.log import setup_logging

from ..slurm.job import run_job
from ..slurm.submit import command
from .array import ARRAY_FILE, CONFIG
from .plan import Sweep, read_command
from .run import Slot, run_side_by_side
from .search import Search
from .state import JOBS, Outcome, outcome_of, save_outcome


def main(arguments: list[str]) -> int:
    """Run the task's training, or trials until there are enough; returns the exit code."""
    setup_logging()
    try:
        if len(arguments) != 1 or "SLURM_ARRAY_TASK_ID" not in os.environ:
            raise ConfigError("megalite.launch.sweep.task runs in the array of a sweep, and nowhere else")
        directory = Path(arguments[0])
        array = json.loads((directory / ARRAY_FILE).read_text(encoding="utf-8"))
        if not array["labels"]:
            return _work(read_command(array["arguments"]))
        return _train(directory, array["labels"][int(os.environ["SLURM_ARRAY_TASK_ID"])])
    except OSError as error:
        print(f"ResourceError: sweep.dir: {arguments[0]} cannot be read or written: {error}", file=sys.stderr)
        return EXIT_RESOURCE
    except MegaliteError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return error.exit_code


def _train(directory: Path, label: str) -> int:
    started = time.time()
    print(f"training {label}", file=sys.stderr)
    try:
        config = read_config(directory / JOBS / label / CONFIG)
        code = run_job(config)
    except MegaliteError as caught:
        save_outcome(directory, label, Outcome(started, caught.exit_code, f"{type(caught).__name__}: {caught}"))
        raise
    save_outcome(directory, label, outcome_of(None, started, code, config.run_dir))
    return code


def _work(sweep: Sweep) -> int:
    """Trials until there are enough. Before its time limit the task goes back into the queue: more of them may wait."""
    received: list[int] = []
    search = Search(sweep)
    code = run_side_by_side(search, [Slot(0)], sweep.directory, received) or search.problem
    if search.in_vain:
        print(f"ResourceError: {search.in_vain}", file=sys.stderr)
        return EXIT_RESOURCE  # another life of this task would end as this one did
    if signal.SIGUSR1 in received and search.requeues:
        with suppress(ResourceError):  # the training has seen to it already
            command("scontrol", "requeue", own_job())
    return code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
