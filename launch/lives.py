"""Ranks that died are started again, as long as that leads anywhere."""

import signal
import sys
from collections.abc import Callable
from pathlib import Path

from megalite.checkpoint_folder import list_checkpoints
from megalite.config.schema import TrainConfig
from megalite.errors import EXIT_CHECKPOINT, EXIT_CONFIG, EXIT_DATA, EXIT_OK, EXIT_REQUEUE

# The next life would end in the same way, or somebody wants it to end.
FINAL = {
    EXIT_OK, EXIT_CONFIG, EXIT_DATA, EXIT_CHECKPOINT, EXIT_REQUEUE, 128 + signal.SIGINT, 128 + signal.SIGTERM,
}  # fmt: skip


def run_lives(start: Callable[[], int], config: TrainConfig, is_hopeless: Callable[[], bool] = lambda: False) -> int:
    """Call `start`, which runs ranks and returns their exit code, again whenever ranks died; returns the last code.

    `launch.restarts` limits the lives in a row that bring no new checkpoint; 0: there is one life. `is_hopeless`: after
    a life, that no other can succeed here.
    """
    run_dir, in_vain = Path(config.run_dir), 0
    while True:
        before = saved_step(run_dir)
        code = start()
        if code in FINAL or config.launch.restarts == 0 or is_hopeless():
            return code
        stands = saved_step(run_dir)
        in_vain = 0 if stands > before else in_vain + 1
        if in_vain > config.launch.restarts:
            print(f"{in_vain} lives in a row brought no new checkpoint: giving up", file=sys.stderr)
            return code
        print(f"ranks died (exit code {code}): starting them again from step {stands}", file=sys.stderr)


def saved_step(run_dir: Path) -> int:
    """The step of the newest checkpoint; 0 without one."""
    found = list_checkpoints(run_dir / "checkpoints")
    return int(found[-1].name.removeprefix("step_")) if found else 0
