"""One node of a Slurm job: `srun python -m megalite.launch.slurm.node` runs torchrun for the ranks of this host."""

import os
import sys

from megalite.config.frozen import sent_config
from megalite.errors import ConfigError, MegaliteError
from megalite.log import setup_logging

from ..hosts import MeetingPoint
from ..prepare import world_of
from ..torchrun import run_on_host

_MARGIN_SECONDS = 30.0


def main() -> int:
    """Returns the exit code of this host's ranks."""
    setup_logging(int(os.environ.get("SLURM_NODEID", "0")))
    try:
        config = sent_config()
        if config is None or "MASTER_ADDR" not in os.environ:
            raise ConfigError("megalite.launch.slurm.node runs under the srun of launch=slurm, and nowhere else")
        hosts = tuple(os.environ["MEGALITE_HOSTS"].split())
        point = MeetingPoint(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), hosts)
        nodes, slurm = config.launch.nodes, config.launch.slurm
        # All the time that Slurm gives is for saving, but for its own part in ending a step.
        patience = max(config.launch.grace, slurm.signal_seconds - _MARGIN_SECONDS)
        # Not again where ranks died: the driver on the batch host does that, with a step of its own.
        return run_on_host(config, world_of(config.launch)[0] // nodes, point if nodes > 1 else None, patience)
    except MegaliteError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return error.exit_code


if __name__ == "__main__":
    sys.exit(main())
