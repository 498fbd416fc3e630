"""The batch host's process of a Slurm job: starts the steps, passes signals on, and sends the job back into the queue.

`python -m megalite.launch.slurm_job`, from the script of `launch=slurm`. Imports no torch.
"""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from megalite.config.frozen import sent_config
from megalite.config.schema import TrainConfig
from megalite.errors import EXIT_OK, EXIT_REQUEUE, ConfigError, MegaliteError, ResourceError
from megalite.guard.run_state import read_state
from megalite.log import setup_logging

from .lives import run_lives, saved_step
from .prepare import world_of
from .slurm import command

_POLL_SECONDS = 0.2
_MASTER_PORT = 20000  # for ranks that srun starts, plus a part of the job's number: jobs may share a node


def main() -> int:
    """Run the job's training; returns its exit code."""
    setup_logging()
    try:
        config = sent_config()
        if config is None or "SLURM_JOB_ID" not in os.environ:
            raise ConfigError("megalite.launch.slurm_job runs in the script of launch=slurm, and nowhere else")
        return run_job(config)
    except MegaliteError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return error.exit_code


def run_job(config: TrainConfig) -> int:
    """The steps of a job, and what is to become of it."""
    run_dir, job = Path(config.run_dir), os.environ["SLURM_JOB_ID"]
    began, stop = saved_step(run_dir), _Stop()
    restarts = os.environ.get("SLURM_RESTART_COUNT", "0")
    hosts = command("scontrol", "show", "hostnames", os.environ["SLURM_JOB_NODELIST"]).split()
    print(f"job {job}, start {int(restarts) + 1}: step {began}, on {', '.join(hosts)}", file=sys.stderr)
    code = run_lives(lambda: _run_step(config, hosts, stop), config)
    if code == EXIT_OK or not (code == EXIT_REQUEUE or stop.by_slurm):
        return code
    stands = saved_step(run_dir)
    if not config.launch.slurm.requeue:
        return code
    if not stop.by_slurm:
        return code  # somebody asked the ranks to stop, and did not ask Slurm to go on
    if stands <= began:
        raise ResourceError(
            f"the time limit came before a step was saved: the job stood at step {began} when it started and stands "
            f"there still, and so would the next. Raise launch.slurm.time (found {config.launch.slurm.time}), or "
            f"launch.slurm.signal_seconds (found {config.launch.slurm.signal_seconds}) if saving takes longer"
        )
    print(f"job {job}: from step {began} to {stands}; back into the queue", file=sys.stderr)
    sys.stderr.flush()
    command("scontrol", "requeue", job)
    return EXIT_REQUEUE


class _Stop:
    """Who asked this job to stop: Slurm, before its time limit, by SIGUSR1; a person, by SIGTERM."""

    def __init__(self) -> None:
        self.by_slurm = False
        self.received: list[int] = []
        for number in (signal.SIGUSR1, signal.SIGTERM):
            signal.signal(number, self._note)

    def _note(self, number: int, frame: object) -> None:
        self.by_slurm |= number == signal.SIGUSR1
        self.received.append(number)


def _run_step(config: TrainConfig, hosts: list[str], stop: _Stop) -> int:
    """Ranks on all nodes, as one step of Slurm; returns their exit code."""
    environment = dict(os.environ) | _meeting_point(config, hosts)
    before = read_state(Path(config.run_dir))
    child = subprocess.Popen(srun_command(config), env=environment)
    told = 0
    while child.poll() is None:
        if len(stop.received) > told:  # srun tells its tasks
            told = len(stop.received)
            child.send_signal(signal.SIGUSR1 if stop.by_slurm else signal.SIGTERM)
        time.sleep(_POLL_SECONDS)
    code = child.returncode if child.returncode >= 0 else 128 - child.returncode
    state = read_state(Path(config.run_dir))
    if code and state is not None and (before is None or state.started != before.started):
        # srun says the largest code of all tasks; rank 0 wrote down what became of the run.
        return state.exit_code or code
    return code


def _meeting_point(config: TrainConfig, hosts: list[str]) -> dict[str, str]:
    port = config.launch.port or _MASTER_PORT + int(os.environ["SLURM_JOB_ID"]) % 10000
    return {"MEGALITE_HOSTS": " ".join(hosts), "MASTER_ADDR": hosts[0], "MASTER_PORT": str(port)}


def srun_command(config: TrainConfig) -> list[str]:
    """How srun starts ranks, or one torchrun on every node."""
    launch, slurm = config.launch, config.launch.slurm
    ranks_per_node = world_of(launch)[0] // launch.nodes
    tasks = 1 if slurm.tasks == "node" else ranks_per_node
    words = [
        "srun", f"--nodes={launch.nodes}", f"--ntasks={launch.nodes * tasks}", f"--ntasks-per-node={tasks}",
        "--kill-on-bad-exit=1", "--unbuffered", f"--job-name={config.run_name}", "--export=ALL",
    ]  # fmt: skip
    if slurm.cpus_per_task:
        words.append(f"--cpus-per-task={slurm.cpus_per_task}")  # srun forgets what sbatch was told
    python = sys.executable
    if slurm.container:
        words.append(f"--container-image={slurm.container}")
        python = "python"
        if slurm.mounts:
            words.append(f"--container-mounts={','.join(slurm.mounts)}")
    module = "megalite.launch.slurm_node" if slurm.tasks == "node" else "megalite.train"
    return [*words, python, "-m", module]


if __name__ == "__main__":
    sys.exit(main())
