"""Two hosts, each with a network of its own: disks that are not shared, a plug pulled for good, and for a while."""

import json
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from megalite.checkpoint_folder import newest_checkpoint
from megalite.guard.run_state import read_state
from tests.cluster.lab import wait_until
from tests.cluster.runs import FOUR, STEPS, await_log, log, losses, start, train_command


@pytest.fixture(scope="module")
def straight(store, tmp_path_factory):
    """What an uninterrupted run comes to."""
    run_dir = tmp_path_factory.mktemp("straight") / "run"
    command = train_command(run_dir, store, "launch.nproc_per_node=4", steps=STEPS)
    subprocess.run(command, check=True, capture_output=True)
    return losses(run_dir)


@pytest.fixture
def apart(cluster, tmp_path) -> Iterator[tuple[Path, dict[str, Path]]]:
    """A run directory that is another disk on each host; and where these are seen from here."""
    run_dir, disks = tmp_path / "run", {host: tmp_path / host for host in cluster.nodes}
    run_dir.mkdir()
    for host, disk in disks.items():
        disk.mkdir()
        cluster.hosts.run(host, "mount", "--bind", str(disk), str(run_dir))
    yield run_dir, disks
    for host in disks:
        cluster.hosts.run(host, "umount", "--lazy", str(run_dir))


def step_of(run_dir: Path) -> int:
    found = newest_checkpoint(run_dir)
    return int(found.name.removeprefix("step_")) if found else 0


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
def test_ranks_take_the_interface_that_they_are_given(cluster, store, tmp_path):
    """Host names lead to eth0; what ranks send each other goes over eth1, which no name leads to."""
    run_dir = tmp_path / "run"
    command = train_command(run_dir, store, *FOUR, "launch.interface=eth1", "launch.wait=true")
    done = cluster.user(*command, cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr + log(run_dir)
    assert "host nodea: 10.213.8.9 on eth1" in log(run_dir)
    assert "host nodeb: 10.213.8.10 on eth1" in log(run_dir)
    assert len(losses(run_dir)) == 10


@pytest.mark.cluster
def test_hosts_that_share_no_run_directory_train_and_resume_as_one_machine(cluster, store, straight, apart, tmp_path):
    """A rank is killed; then the first host loses its disk, and goes on from the other one's copy."""
    run_dir, disks = apart
    launch = ("launch=torchrun", "launch.nodes=2", "launch.nproc_per_node=2", "launch.address=nodea")
    command = train_command(
        run_dir, store, *launch, "launch.restarts=3", "launch.grace=10", "checkpoint.save_every=20", steps=STEPS
    )

    def start_both() -> list[subprocess.Popen]:
        return [
            cluster.hosts.start(host, *command, log=tmp_path / f"{host}.txt", environment=cluster.environment)
            for host in disks
        ]

    def said() -> str:
        return "".join((tmp_path / f"{host}.txt").read_text() for host in disks)

    started = start_both()
    wait_until(lambda: any(len(losses(disk)) >= 45 for disk in disks.values()), 300, said)
    first, other = cluster.nodes
    victim = json.loads((disks[other] / "logs/heartbeats/rank_00003.json").read_text())
    cluster.hosts.run(other, "kill", "-9", str(victim["pid"]))
    assert [process.wait(300) for process in started] == [0, 0], said()
    assert f"is not the same directory on {other} as on {first}: checkpoints are kept on {first}" in said()
    assert f"is not that of {first} for ranks 2, 3 on {other}: " in said()
    copied = step_of(disks[other])
    assert copied in (40, 60)
    assert f"starting them again from step {copied}" in said()
    assert f"step_{copied:08d} is sent from rank 0 to rank 2" in said()
    assert losses(disks[first]) == pytest.approx(straight, abs=1e-6)
    assert step_of(disks[first]) == STEPS
    assert (disks[first] / "config.yaml").read_bytes() == (disks[other] / "config.yaml").read_bytes()
    assert list(run_dir.iterdir()) == [], "nothing is written but on the hosts' own disks"

    for path in disks[first].iterdir():
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    assert [process.wait(300) for process in start_both()] == [0, 0], said()
    assert f"{first} has no checkpoint, {other} step_{copied:08d}; continuing from " in said()
    assert losses(disks[first]) == pytest.approx(straight[copied:], abs=1e-6)
    assert (step_of(disks[first]), step_of(disks[other])) == (STEPS, copied)


@pytest.mark.cluster
def test_a_job_whose_hosts_share_no_run_directory_goes_on_where_it_was(cluster, store, straight, apart, tmp_path):
    """A rank is killed, then the job goes back into the queue: its driver sees the first host's disk alone."""
    run_dir, disks = apart
    first, other = cluster.nodes
    keys = ("checkpoint.save_every=20", f"launch.slurm.options=['--output={tmp_path}/slurm_%j.log']")
    done = cluster.user(*train_command(run_dir, store, *FOUR, *keys, steps=STEPS), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    job = (run_dir / "job.txt").read_text().strip()

    def said() -> str:
        path = tmp_path / f"slurm_{job}.log"
        return path.read_text(errors="replace") if path.exists() else ""

    def await_steps(number: int) -> None:
        wait_until(lambda: disks[first].exists() and len(losses(disks[first])) >= number, 300, said)

    await_steps(25)
    victim = json.loads((disks[other] / "logs/heartbeats/rank_00003.json").read_text())
    cluster.hosts.run(other, "kill", "-9", str(victim["pid"]))
    wait_until(lambda: "starting them again from step" in said(), 120, said)
    await_steps(45)
    cluster.ask("scancel", "--signal=USR1", "--batch", job)  # as before a time limit
    wait_until(lambda: "back into the queue" in said(), 120, said)
    assert cluster.wait_for(job, 300) == "COMPLETED", said()
    assert losses(disks[first]) == straight
    assert step_of(disks[first]) == STEPS
    assert 45 <= step_of(disks[other]) < STEPS, "what it was sent when it went on"


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
