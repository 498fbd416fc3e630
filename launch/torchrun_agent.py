"""torchrun with its failures told in a line a rank: `python -m megalite.launch.torchrun_agent ARGUMENTS`.

torchrun itself ends with exit code 1 whatever its ranks ended with, and with a traceback of its own; it says who failed
once all others have ended, and lets them half a minute, in which they wait for the one that failed.
"""

import signal
import socket
import sys
import time
from datetime import timedelta
from typing import Any

from megalite.errors import EXIT_FAILURE, EXIT_OK, EXIT_REQUEUE

LOOPBACK = "loopback"  # a rendezvous backend of ours, of a single host
_OTHERS_SECONDS = 10  # that ranks have to end, once one has failed: they wait for it
_SAVE_SECONDS = 24 * 3600  # that ranks have which are asked to stop: whoever supervises this process knows better


def main(arguments: list[str]) -> int:
    """Returns the exit code of the rank that failed first; 128 + a signal's number where one ended it."""
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.elastic.rendezvous import rendezvous_handler_registry
    from torch.distributed.launcher.api import elastic_launch
    from torch.distributed.run import config_from_args, parse_args

    rendezvous_handler_registry.register(LOOPBACK, _meet_on_loopback)
    told, ends = _tell_failures_at_once()
    config, command, words = config_from_args(parse_args(arguments))
    try:
        elastic_launch(config, command)(*words)
    except ChildFailedError as error:
        _, first = error.get_first_failure()
        if first.exitcode != EXIT_REQUEUE:
            for rank, failure in sorted(error.failures.items()):
                if failure.pid not in told:
                    _tell(rank, failure)
        return first.exitcode if first.exitcode > 0 else 128 - first.exitcode
    except SignalException as error:
        saved = EXIT_REQUEUE in ends and ends <= {EXIT_OK, EXIT_REQUEUE}
        return EXIT_REQUEUE if saved else 128 + error.sigval
    except Exception as error:  # of the meeting of torchruns: a traceback of it helps nobody
        print(f"torchrun: {type(error).__name__}: {error}", file=sys.stderr)
        return EXIT_FAILURE
    return EXIT_OK


def _meet_on_loopback(params: Any) -> Any:
    """The meeting of the ranks of one host; the stores of torchrun's own backends listen on all addresses."""
    from torch.distributed import PrefixStore, TCPStore
    from torch.distributed.elastic.rendezvous import RendezvousInfo, RendezvousStoreInfo
    from torch.distributed.elastic.rendezvous.static_tcp_rendezvous import StaticTCPRendezvous

    address, _, port = params.endpoint.rpartition(":")
    server = socket.create_server((address, int(port)))
    port, patience = server.getsockname()[1], int(params.config.get("timeout", 60))
    store = TCPStore(
        address, port, 1, True, timedelta(seconds=patience), multi_tenant=True, master_listen_fd=server.detach()
    )

    class Handler(StaticTCPRendezvous):
        def get_backend(self) -> str:
            return LOOPBACK

        def next_rendezvous(self) -> RendezvousInfo:
            place = RendezvousStoreInfo(address, port)
            return RendezvousInfo(PrefixStore(self.run_id, store), 0, 1, place)

    return Handler(address, port, 0, 1, params.run_id, patience)


def _tell_failures_at_once() -> tuple[set[int], set[int]]:
    """Have torchrun say which ranks have failed before it ends the others.

    Returns, to be filled as it comes, the pids of those that were told of, and the exit codes of all when it ends.

    Without a failure it has got a signal itself, as all processes of a step of Slurm do, and its ranks are to save.
    """
    from torch.distributed.elastic.multiprocessing.api import SubprocessContext

    told: set[int] = set()
    ends: set[int] = set()
    close = SubprocessContext.close

    def tell_and_close(self: Any, death_sig: Any = None, timeout: int = 0) -> None:
        failed = [one for one in getattr(self, "_failures", {}).values() if one.exitcode != EXIT_REQUEUE]
        for failure in failed:
            if failure.pid not in told:
                told.add(failure.pid)
                _tell(int(self.envs[failure.local_rank]["RANK"]), failure)
        close(self, death_sig, _OTHERS_SECONDS if failed else _SAVE_SECONDS)
        ends.update(one.proc.returncode for one in getattr(self, "subprocess_handlers", {}).values())

    SubprocessContext.close = tell_and_close  # type: ignore[method-assign]
    return told, ends


def _tell(rank: int, failure: Any) -> None:
    at = time.strftime("%H:%M:%S", time.localtime(failure.timestamp))
    print(f"rank {rank} (pid {failure.pid}) {_describe(failure.exitcode)} at {at}", file=sys.stderr, flush=True)


def _describe(code: int) -> str:
    return f"ended with exit code {code}" if code >= 0 else f"was ended by {signal.Signals(-code).name}"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
