"""Two hosts, each with a network of its own: a rank is killed, a plug is pulled for good, and for a while."""

import subprocess
import time

import pytest

from megalite.guard.run_state import read_state
from tests.cluster.lab import wait_until
from tests.cluster.runs import STEPS, await_log, log, losses, start, train_command

FOUR = ("launch=slurm", "launch.nodes=2", "launch.nproc_per_node=2", "launch.start_timeout=120", "launch.grace=10")


@pytest.fixture(scope="module")
def straight(store, tmp_path_factory):
    """What an uninterrupted run comes to."""
    run_dir = tmp_path_factory.mktemp("straight") / "run"
    command = train_command(run_dir, store, "launch.nproc_per_node=4", steps=STEPS)
    subprocess.run(command, check=True, capture_output=True)
    return losses(run_dir)


@pytest.mark.cluster
def test_a_host_that_is_cut_off_is_named_and_the_job_goes_on_when_it_is_back(cluster, store, straight, tmp_path):
    run_dir = tmp_path / "run"
    job = start(cluster, store, run_dir, "guard.timeout=20")
    cluster.hosts.cut("nodeb")
    try:
        await_log(run_dir, "on nodeb are cut off from ", 20 + 10)
        wait_until(lambda: not cluster.hosts.processes("nodea", "megalite"), 120, lambda: log(run_dir))
        wait_until(lambda: not cluster.hosts.processes("nodeb", "megalite"), 60, "ranks live on where nobody sees them")
        cluster.wait_for(job, 90, "PENDING")
    finally:
        cluster.hosts.mend("nodeb")
    assert cluster.wait_for(job, 400) == "COMPLETED", log(run_dir)
    assert losses(run_dir) == straight


@pytest.mark.cluster
def test_a_cut_of_20_seconds_is_survived(cluster, store, straight, tmp_path):
    run_dir = tmp_path / "run"
    job = start(cluster, store, run_dir, "guard.timeout=60")
    cluster.hosts.cut("nodeb")
    time.sleep(20)
    cluster.hosts.mend("nodeb")
    assert cluster.wait_for(job, 240) == "COMPLETED", log(run_dir)
    assert "ranks died" not in log(run_dir)
    assert losses(run_dir) == straight


@pytest.mark.cluster
def test_a_host_that_does_not_come_is_named(cluster, store, tmp_path):
    """By hand, with torchrun on each host: the second command is never given."""
    run_dir = tmp_path / "run"
    launch = ("launch=torchrun", "launch.nodes=2", "launch.nproc_per_node=2", "launch.address=nodea")
    command = train_command(run_dir, store, *launch, "launch.start_timeout=5")
    done = subprocess.run(
        cluster.hosts.command("nodea", *command), env=cluster.environment, cwd=tmp_path, capture_output=True, text=True,
        timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 5, done.stderr
    assert "1 of 2 hosts came within launch.start_timeout=5 s: nodea; 1 missing" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.cluster
def test_the_same_command_on_both_hosts_is_one_run(cluster, store, tmp_path):
    """`launch=torchrun` by hand; and hosts that were given different commands are told so."""
    launch = ("launch=torchrun", "launch.nodes=2", "launch.nproc_per_node=2", "launch.address=nodea")

    def both(run_dir, *others) -> list[int]:
        commands = [train_command(run_dir, store, *launch, *of_one) for of_one in ((), others)]
        started = [
            cluster.hosts.start(host, *command, log=tmp_path / f"{host}.txt", environment=cluster.environment)
            for host, command in zip(cluster.nodes, commands, strict=True)
        ]
        return [process.wait(300) for process in started]

    def said() -> str:
        return "".join((tmp_path / f"{host}.txt").read_text() for host in cluster.nodes)

    assert both(tmp_path / "run") == [0, 0], said()
    state = read_state(tmp_path / "run")
    assert state is not None
    assert (state.state, state.world_size, state.step) == ("finished", 4, 10)
    assert both(tmp_path / "other", "optimizer.lr=1") == [5, 5], said()
    assert "nodeb was started with another configuration than nodea" in said()
