"""torchrun with its failures told in a line a rank: `python -m megalite.launch.torchrun_agent ARGUMENTS`.

torchrun itself ends with exit code 1 whatever its ranks ended with, and with a traceback of its own.
"""

import signal
import sys
import time

from megalite.errors import EXIT_FAILURE, EXIT_OK, EXIT_REQUEUE


def main(arguments: list[str]) -> int:
    """Returns the exit code of the rank that failed first; 128 + a signal's number where one ended it."""
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import elastic_launch
    from torch.distributed.run import config_from_args, parse_args

    config, command, words = config_from_args(parse_args(arguments))
    try:
        elastic_launch(config, command)(*words)
    except ChildFailedError as error:
        _, first = error.get_first_failure()
        if first.exitcode != EXIT_REQUEUE:
            for rank, failure in sorted(error.failures.items()):
                at = time.strftime("%H:%M:%S", time.localtime(failure.timestamp))
                print(f"rank {rank} (pid {failure.pid}) {_describe(failure.exitcode)} at {at}", file=sys.stderr)
        return first.exitcode if first.exitcode > 0 else 128 - first.exitcode
    except SignalException as error:
        return 128 + error.sigval
    except Exception as error:  # of the meeting of torchruns: a traceback of it helps nobody
        print(f"torchrun: {type(error).__name__}: {error}", file=sys.stderr)
        return EXIT_FAILURE
    return EXIT_OK


def _describe(code: int) -> str:
    return f"ended with exit code {code}" if code >= 0 else f"was ended by {signal.Signals(-code).name}"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
