"""One training of a sweep in a process of its own: `run` starts `python -m megalite.launch.sweep.job PARENT`."""

import ctypes
import os
import signal
import sys

from megalite.config.frozen import FROZEN, sent_config
from megalite.errors import EXIT_REQUEUE, ConfigError, MegaliteError
from megalite.guard.signals import ending_at_once
from megalite.log import setup_logging

from ..prepare import Training, import_for_ranks, world_of

_PR_SET_PDEATHSIG = 1


def main(arguments: list[str]) -> int:
    """Start the configuration that was sent along, as `megalite train` would; returns the run's exit code."""
    setup_logging()
    try:
        with ending_at_once(EXIT_REQUEUE):
            config = sent_config()
            if config is None or len(arguments) != 1:
                raise ConfigError("megalite.launch.sweep.job is started by megalite train -m, and by nothing else")
            _end_with(int(arguments[0]))
            del os.environ[FROZEN]  # launchers hand it on themselves
            from ..launchers import LAUNCHERS

            training = Training(config, *world_of(config.launch))
            if config.launch.name == "local":
                import_for_ranks(training)
        if config.launch.name == "slurm":  # this is a task of the sweep's array
            from ..slurm.job import run_job

            return run_job(config)
        return LAUNCHERS[config.launch.name][1](training)
    except MegaliteError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        return EXIT_REQUEUE


def _end_with(parent: int) -> None:
    """Be told to stop when the sweep's process is gone, however it ended: the training saves and ends."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != parent:
        os._exit(EXIT_REQUEUE)  # it went before the line above


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
