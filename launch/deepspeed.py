"""`launch=deepspeed`: DeepSpeed's own launcher, on this machine or over the hosts of a hostfile."""

import os
import re
import secrets
import shlex
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from megalite.config.frozen import FROZEN, encoded_config
from megalite.config.schema import TrainConfig
from megalite.errors import EXIT_FAILURE, EXIT_OK, EXIT_REQUEUE, ConfigError, ResourceError
from megalite.guard.observer import FOLDER
from megalite.guard.run_state import RunState, read_life_since, read_state
from megalite.guard.stall import parse_record
from megalite.network import PORT_SECONDS, await_port, free_port

from .far_ranks import MARK, FarRanks
from .lives import run_lives
from .prepare import Training
from .supervise import ENDED, supervise
from .torchrun import PORT, rank_environment

_VARIABLES = "DS_ENV_FILE"  # names the file of variables that the runner sends to the hosts, each on one line


def start_deepspeed(training: Training) -> int:
    """Run the launcher to its end, again where ranks died; returns the run's exit code.

    Raises `ResourceError` where several hosts are to be reached and there is no pdsh.
    """
    config = training.config
    if config.launch.nodes > 1 and shutil.which("pdsh") is None:
        raise ResourceError("launch=deepspeed reaches other hosts by pdsh, which is not installed on this one")

    def once() -> int:
        if config.launch.nodes > 1:
            return _run_over_hosts(training)
        if config.launch.port:
            await_port("127.0.0.1", config.launch.port, PORT_SECONDS)
        return supervise(deepspeed_command(training), rank_environment(config), config.launch.grace)

    return run_lives(once, config)


def _run_over_hosts(training: Training) -> int:
    """One life of ranks on several hosts."""
    config, run_dir, mark = training.config, Path(training.config.run_dir), secrets.token_hex(8)
    environment = rank_environment(config)
    given = {name: str(value) for name, value in config.launch.environment.items()}
    sent = {"OMP_NUM_THREADS": environment["OMP_NUM_THREADS"]} | given
    sent["LOCAL_WORLD_SIZE"] = str(training.ranks_per_node)  # which the launcher does not tell
    sent |= {FROZEN: encoded_config(config), MARK: mark}
    hosts = _hosts(training)
    with tempfile.TemporaryDirectory(prefix="megalite-") as folder:
        path = Path(folder) / "environment"
        path.write_text("".join([*_own_variables(), *(f"{name}={_escaped(name, sent[name])}\n" for name in sent)]))
        environment[_VARIABLES] = str(path)
        before = read_state(run_dir)
        code = supervise(
            deepspeed_command(training),
            environment,
            config.launch.grace,
            lambda child: FarRanks(child, hosts, mark, environment, lambda: _is_training(config)),
        )
    return _outcome(code, read_life_since(before, run_dir))


def _own_variables() -> Iterator[str]:
    """The lines of the file of variables that the runner would send if ours did not take its place."""
    for folder in (Path.home(), Path()):
        path = folder / os.environ.get(_VARIABLES, ".deepspeed_env")
        if path.is_file():
            yield path.read_text(encoding="utf-8").rstrip("\n") + "\n"


def _escaped(name: str, value: str) -> str:
    """So that it arrives as it is: the runner puts what is no plain word between double quotes, for the hosts' shells.

    pdsh replaces what follows a `%`.
    """
    if "\n" in value or value != value.strip():
        raise ConfigError(
            f"launch.environment.{name}: {value!r} has a line break, or blanks around it, and to DeepSpeed's launcher "
            "a variable is one line"
        )
    return re.sub(r'([\\"$`])', r"\\\1", value).replace("%", "%%")


def _is_training(config: TrainConfig) -> bool:
    """Whether rank 0, where its record is seen from here, is in no part of its life that others may end before."""
    if not config.guard.watchdog:
        return False
    try:
        record = parse_record((Path(config.run_dir) / "logs" / FOLDER / "rank_00000.json").read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError):
        return False
    return record is not None and not record.phase.startswith(("save", "other: closing", "end"))


def _outcome(code: int, life: RunState | None) -> int:
    """The exit code of a life: that which rank 0 wrote down, where it is seen from here.

    pdsh says the largest of all hosts, perhaps of ranks that another took along; the runner 0 where pdsh was killed.
    """
    if life is None:
        return code
    if life.exit_code is None:
        return code if code not in (EXIT_OK, EXIT_REQUEUE) else EXIT_FAILURE  # it was not asked, or did not hear
    return code if code == ENDED and life.exit_code not in (EXIT_OK, EXIT_REQUEUE) else life.exit_code


def deepspeed_command(training: Training) -> list[str]:
    """The command line. Raises `ConfigError` for a hostfile that does not hold the hosts that `launch.nodes` counts."""
    launch = training.config.launch
    command = [sys.executable, "-m", "deepspeed.launcher.runner"]
    if launch.nodes == 1:
        # Without a file of hosts: where none is given the runner takes /job/hostfile, if that is there.
        command += [_devices(training), "--hostfile=", "--master_addr=127.0.0.1"]
        command += [f"--master_port={launch.port or free_port()}"]
    else:
        command += [
            f"--num_gpus={training.ranks_per_node}", f"--hostfile={launch.hostfile}", f"--num_nodes={launch.nodes}",
            f"--master_port={launch.port or PORT}", f"--master_addr={launch.address or _hosts(training)[0]}",
        ]  # fmt: skip
    return [*command, "--no_local_rank", "--module", "megalite.train"]


def _devices(training: Training) -> str:
    """On this host. To a number of devices the runner takes the first ones, whatever CUDA_VISIBLE_DEVICES says."""
    visible = [device.strip() for device in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")]
    chosen = visible[: training.ranks_per_node]
    if training.device == "cuda" and len(chosen) == training.ranks_per_node and all(map(str.isdecimal, chosen)):
        return f"--include=localhost:{','.join(chosen)}"
    return f"--num_gpus={training.ranks_per_node}"


def describe_deepspeed(training: Training) -> str:
    """What `start_deepspeed` runs."""
    return shlex.join(deepspeed_command(training))


def _hosts(training: Training) -> list[str]:
    """The first `launch.nodes` hosts of the hostfile."""
    launch = training.config.launch
    path = Path(str(launch.hostfile))
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"launch.hostfile: {path} cannot be read: {error}") from None
    lines = [line.strip() for line in lines if line.strip() and not line.lstrip().startswith("#")]
    if odd := [line for line in lines if not re.match(r"\S+\s+slots=\d+", line)]:
        raise ConfigError(f"launch.hostfile: {path} has the line {odd[0]!r}; a line is HOST slots=N")
    hosts = [line.split()[0] for line in lines]
    if len(hosts) < launch.nodes:
        raise ConfigError(f"launch.hostfile: {path} names {len(hosts)} hosts, launch.nodes={launch.nodes}")
    return hosts[: launch.nodes]
