"""The batch host's process of a Slurm job: starts the steps, passes signals on, and sends the job back into the queue.

`python -m megalite.launch.slurm.job`, from the script of `launch=slurm`. Imports no torch.
"""

import json
import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

from megalite.config.frozen import FROZEN, config_to_send, sent_config
from megalite.config.place import own_job, port_of_job
from megalite.config.schema import TrainConfig
from megalite.errors import EXIT_FAILURE, EXIT_OK, EXIT_REQUEUE, ConfigError, MegaliteError, ResourceError
from megalite.guard.observer import read_json
from megalite.guard.run_state import RunState, read_life_since, read_state
from megalite.log import setup_logging

from ..lives import FINAL, run_lives, saved_step
from ..prepare import given_environment, world_of
from ..supervise import clean_environment
from .submit import command, job_record

_POLL_SECONDS = 0.2
_REQUEUE_SECONDS = 600.0  # in which the controller may be away when the job goes back into the queue
_POLL_REQUEUE_SECONDS = 10.0
_MARGIN_SECONDS = 30.0  # for Slurm's own part in ending a step
_LAST_SECONDS = 10.0  # between TERM and KILL for an srun that waits for a lost node
_STARTS_IN_VAIN = 4  # in a row, after which a job does not go back into the queue


def main() -> int:
    """Run the job's training; returns its exit code."""
    setup_logging()
    try:
        config = sent_config()
        if config is None or "SLURM_JOB_ID" not in os.environ:
            raise ConfigError("megalite.launch.slurm.job runs in the script of launch=slurm, and nowhere else")
        return run_job(config)
    except MegaliteError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return error.exit_code


def run_job(config: TrainConfig) -> int:
    """The steps of a job, and what is to become of it."""
    run_dir, job = Path(config.run_dir), own_job()
    began, stop = saved_step(run_dir), _Stop(job)
    restarts = int(os.environ.get("SLURM_RESTART_COUNT", "0"))
    hosts = command("scontrol", "show", "hostnames", os.environ["SLURM_JOB_NODELIST"]).split()
    print(f"job {job}, start {restarts + 1}: step {began}, on {', '.join(hosts)}", file=sys.stderr)
    _refuse_starts_in_vain(run_dir, job, restarts, began)
    _tell_of_few_cores(config, hosts[0])
    step = _Step(config, hosts, stop)
    code = run_lives(step.run, config, is_hopeless=lambda: step.has_lost_a_host or bool(stop.received))
    if code == EXIT_OK or not config.launch.slurm.requeue:
        return code
    is_preempted = stop.is_preempted()
    if not (step.has_lost_a_host or is_preempted or stop.by_slurm):
        return code  # a person asked the ranks to stop, and did not ask Slurm to go on
    stands = saved_step(run_dir)
    if stop.by_slurm and not is_preempted and stands <= began:
        raise ResourceError(
            f"the time limit came before a step was saved: the job stood at step {began} when it started and stands "
            f"there still, and so would the next. Raise launch.slurm.time (found {config.launch.slurm.time}); where a "
            f"step and a save take longer, launch.slurm.signal_seconds (found {config.launch.slurm.signal_seconds})"
        )
    print(f"job {job}: from step {began} to {stands}; back into the queue", file=sys.stderr)
    sys.stderr.flush()
    _requeue(job, restarts)
    return EXIT_REQUEUE


def _requeue(job: str, restarts: int) -> None:
    """Put this life of the job back into the queue; its next life is none of our business.

    A host whose network was cut does not hear that Slurm has long done so, and has the job at work elsewhere.
    """
    deadline = time.monotonic() + _REQUEUE_SECONDS
    while True:
        try:
            shown = job_record(job)
            if shown["JobState"] != "RUNNING" or shown.get("Restarts") != str(restarts):
                return
            command("scontrol", "requeue", job)
            return
        except ResourceError:
            if time.monotonic() > deadline:
                raise
            time.sleep(_POLL_REQUEUE_SECONDS)


def _refuse_starts_in_vain(run_dir: Path, job: str, restarts: int, began: int) -> None:
    """A job that comes back from the queue again and again, and stands where it stood, is ended with a word."""
    path = run_dir / "logs" / f"starts_{job}.json"
    starts = read_json(path, []) if restarts else []
    temporary = path.with_suffix(".tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_text(json.dumps([*starts, began]))
        temporary.replace(path)
    except OSError as error:
        raise ResourceError(f"run_dir: nothing can be written in {run_dir}: {error}") from None
    if len(starts) >= _STARTS_IN_VAIN and set(starts[-_STARTS_IN_VAIN:]) == {began}:
        raise ResourceError(f"{_STARTS_IN_VAIN} starts of job {job} have brought no step: all began at {began}")


def _tell_of_few_cores(config: TrainConfig, host: str) -> None:
    """Slurm gives a task one core where nobody asks for more, and with `tasks=node` a task is all ranks of a node."""
    cores, ranks = int(os.environ.get("SLURM_CPUS_ON_NODE", "0")), world_of(config.launch)[0] // config.launch.nodes
    if 0 < cores < ranks:
        print(
            f"warning: {cores} core(s) for {ranks} ranks on {host}; see launch.slurm.cpus_per_task (a task is what "
            f"launch.slurm.tasks={config.launch.slurm.tasks} says) and launch.slurm.exclusive",
            file=sys.stderr,
        )


class _Stop:
    """Who asked this job to stop: Slurm, before its time limit, by SIGUSR1; a person, by SIGTERM."""

    def __init__(self, job: str) -> None:
        self.by_slurm = False
        self.received: list[int] = []
        self._job = job
        for number in (signal.SIGUSR1, signal.SIGTERM):
            signal.signal(number, self._note)

    def _note(self, number: int, frame: object) -> None:
        self.by_slurm |= number == signal.SIGUSR1
        self.received.append(number)

    def is_preempted(self) -> bool:
        """Whether the job has to make room for another: then the ranks are told by SIGTERM, and the job perhaps not."""
        with suppress(ResourceError, ConfigError):
            return job_record(self._job).get("PreemptTime", "None") not in ("None", "Unknown")
        return False


class _Step:
    """Ranks on all nodes, as one step of Slurm at a time."""

    def __init__(self, config: TrainConfig, hosts: list[str], stop: _Stop):
        self._config, self._hosts, self._stop = config, hosts, stop
        self._run_dir = Path(config.run_dir)
        self.has_lost_a_host = False  # another step on the same nodes would fail as this one did

    def run(self) -> int:
        """Start ranks and wait for all; returns their exit code."""
        sent = {FROZEN: config_to_send(self._config)}  # a task of a sweep found it in a file
        environment = clean_environment() | sent | _meeting_point(self._config, self._hosts)
        if self._config.launch.slurm.tasks == "rank":
            given_environment(self._config.launch)  # which the script exports; with tasks=node each node tells it
        before, told, gone = read_state(self._run_dir), 0, None
        # What is left of ranks and torchruns on nodes that answer is ended within this time.
        patience = 2 * self._config.launch.grace + _MARGIN_SECONDS
        child = subprocess.Popen(srun_command(self._config), env=environment)
        while child.poll() is None:
            time.sleep(_POLL_SECONDS)
            if len(self._stop.received) > told:
                told = len(self._stop.received)
                child.send_signal(signal.SIGUSR1)  # srun tells its tasks; SIGTERM it would take for its own end
            state = read_life_since(before, self._run_dir)
            has_failed = state is not None and state.state in ("failed", "died")
            gone = (gone or time.monotonic()) if has_failed else None
            if gone is not None and time.monotonic() > gone + patience:
                print(f"srun waits for a node since the ranks ended {patience:.0f} s ago: ending it", file=sys.stderr)
                self.has_lost_a_host = True
                _end(child)
        state = read_life_since(before, self._run_dir)
        if child.returncode and state is None:
            # No rank began: a node does not answer, or is unfit; or it was told to stop before it could listen.
            self.has_lost_a_host = child.returncode not in FINAL and not self._stop.received
        return _code(child.returncode, state, bool(self._stop.received))


def _end(child: "subprocess.Popen[bytes]") -> None:
    """srun waits for nodes that do not answer as long as Slurm does; the second signal is for it alone."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        child.send_signal(number)
        with suppress(subprocess.TimeoutExpired):
            child.wait(_LAST_SECONDS)
            return


def _code(code: int, state: RunState | None, was_asked: bool) -> int:
    """srun says the largest code of all tasks, those that it ended too; rank 0 wrote down what became of the run."""
    if code and state is not None and state.exit_code is not None:
        return state.exit_code
    if code < 0 or code > 128:  # a signal's
        return code if code > 0 and was_asked else EXIT_FAILURE
    return code


def _meeting_point(config: TrainConfig, hosts: list[str]) -> dict[str, str]:
    port = config.launch.port or port_of_job(int(os.environ["SLURM_JOB_ID"]))
    first = hosts[0] if len(hosts) > 1 else "127.0.0.1"  # where no other host listens in
    return {"MEGALITE_HOSTS": " ".join(hosts), "MASTER_ADDR": first, "MASTER_PORT": str(port)}


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
        # Relative paths mean the same inside: Pyxis would start in the image's own working directory.
        words += [f"--container-image={slurm.container}", f"--container-workdir={os.getcwd()}"]
        python = "python"
        if slurm.mounts:
            words.append(f"--container-mounts={','.join(slurm.mounts)}")
    module = "megalite.launch.slurm.node" if slurm.tasks == "node" else "megalite.train"
    return [*words, python, "-m", module]


if __name__ == "__main__":
    sys.exit(main())
