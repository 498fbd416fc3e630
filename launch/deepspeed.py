"""`launch=deepspeed`: DeepSpeed's own launcher, on this machine or over the hosts of a hostfile."""

import shlex
import sys
import tempfile
from pathlib import Path

from megalite.config.frozen import FROZEN, encoded_config
from megalite.errors import ConfigError
from megalite.network import free_port

from .lives import run_lives
from .prepare import Training
from .supervise import supervise
from .torchrun import PORT, rank_environment


def start_deepspeed(training: Training) -> int:
    """Run the launcher to its end, again where ranks died; returns the run's exit code."""
    config = training.config

    def once() -> int:
        environment = rank_environment(config)
        if config.launch.nodes == 1:
            return supervise(deepspeed_command(training), environment, config.launch.grace)
        with tempfile.TemporaryDirectory(prefix="megalite-") as folder:
            # Over ssh only those variables travel that stand in this file, each on one line.
            sent = config.launch.environment | {"OMP_NUM_THREADS": environment["OMP_NUM_THREADS"]}
            lines = [f"{name}={value}" for name, value in sent.items()]
            lines.append(f"{FROZEN}={encoded_config(config)}")
            (Path(folder) / "environment").write_text("\n".join(lines) + "\n")
            environment["DS_ENV_FILE"] = str(Path(folder) / "environment")
            return supervise(deepspeed_command(training), environment, config.launch.grace)

    return run_lives(once, config)


def deepspeed_command(training: Training) -> list[str]:
    """The command line. Raises `ConfigError` for a hostfile that does not hold the hosts that `launch.nodes` counts."""
    launch = training.config.launch
    command = [sys.executable, "-m", "deepspeed.launcher.runner", f"--num_gpus={training.ranks_per_node}"]
    if launch.nodes == 1:
        command += ["--master_addr=127.0.0.1", f"--master_port={launch.port or free_port()}"]
    else:
        hosts = _hosts(Path(str(launch.hostfile)))
        if len(hosts) < launch.nodes:
            raise ConfigError(
                f"launch.hostfile: {launch.hostfile} names {len(hosts)} hosts, launch.nodes={launch.nodes}"
            )
        command += [
            f"--hostfile={launch.hostfile}", f"--num_nodes={launch.nodes}", f"--master_port={launch.port or PORT}",
            f"--master_addr={launch.address or hosts[0]}",
        ]  # fmt: skip
    return [*command, "--no_local_rank", "--module", "megalite.train"]


def describe_deepspeed(training: Training) -> str:
    """What `start_deepspeed` runs."""
    return shlex.join(deepspeed_command(training))


def _hosts(path: Path) -> list[str]:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"launch.hostfile: {path} cannot be read: {error}") from None
    return [line.split()[0] for line in lines if line.strip() and not line.lstrip().startswith("#")]
