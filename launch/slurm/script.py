"""The batch script of `launch=slurm`: what is asked of Slurm, the environment, the frozen configuration, a driver."""

import shlex
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from megalite.config.frozen import FROZEN
from megalite.config.schema_launch import LaunchConfig

_END = "END_OF_CONFIGURATION"


def batch_script(
    name: str,
    launch: LaunchConfig,
    ranks_per_node: int,
    log: Path,
    body: Sequence[str],
    array: str | None = None,
) -> str:
    """The script of a job, or of an array of jobs when `array` gives their numbers (`0-3%2`).

    `log`: where the job writes, with Slurm's own marks (%j). `body`: what runs once the environment stands.
    """
    options = list(_options(name, launch, ranks_per_node, log)) + ([f"--array={array}"] if array else [])
    lines = ["#!/bin/bash", *(f"#SBATCH {option}" for option in options), "", "set -eo pipefail"]
    if launch.slurm.modules:
        lines += [f"module load {' '.join(launch.slurm.modules)}"]
    lines += launch.slurm.setup
    lines += ["set -u"]  # only now: scripts that activate an environment look at variables that are not set
    lines += [f"export {key}={shlex.quote(str(value))}" for key, value in launch.environment.items()]
    return "\n".join([*lines, *body]) + "\n"


def training_body(config_text: str) -> list[str]:
    """Lines that hand a frozen configuration to the driver of a training: no file of the submitting host is needed."""
    return [
        f"export {FROZEN}=$(cat <<'{_END}'",
        config_text.rstrip("\n"),
        _END,
        ")",
        f"exec {shlex.quote(sys.executable)} -m megalite.launch.slurm.job",
    ]


def dependency(after: Sequence[str]) -> list[str]:
    """Options for a job that starts when all jobs `after` have ended well, and never if one has not."""
    return [f"--dependency=afterok:{':'.join(after)}", "--kill-on-invalid-dep=yes"] if after else []


def _options(name: str, launch: LaunchConfig, ranks_per_node: int, log: Path) -> Iterator[str]:
    slurm = launch.slurm
    yield f"--job-name={name}"
    yield f"--nodes={launch.nodes}"
    yield f"--ntasks-per-node={1 if slurm.tasks == 'node' else ranks_per_node}"
    given = {
        "partition": slurm.partition,
        "account": slurm.account,
        "qos": slurm.qos,
        "constraint": f'"{slurm.constraint}"' if slurm.constraint else None,
        "time": slurm.time,
        "gpus-per-node": slurm.gpus_per_node,
        "cpus-per-task": slurm.cpus_per_task,
        "mem": slurm.memory,
    }
    yield from (f"--{option}={value}" for option, value in given.items() if value is not None)
    if slurm.exclusive:
        yield "--exclusive"
    yield from dependency(slurm.after)
    # Only its name holds marks of Slurm's.
    yield f'--output="{str(log.parent).replace("%", "%%")}/{log.name}"'
    yield "--open-mode=append"
    yield "--requeue" if slurm.requeue else "--no-requeue"
    if slurm.signal_seconds:
        # To the driver alone (B): it passes it on to the ranks, and knows then why they end.
        yield f"--signal=B:USR1@{slurm.signal_seconds}"
    yield from slurm.options
