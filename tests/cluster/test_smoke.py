"""Two nodes of a real Slurm, two CPU ranks each: the numbers of one machine, and a rank that is killed."""

import json
import subprocess
import time

import pytest

from megalite.guard.run_state import read_state
from tests.cluster.runs import FOUR, STEPS, await_log, files, log, losses, start, train_command


@pytest.fixture(scope="module")
def straight(store, tmp_path_factory):
    """Four ranks on one machine, with no launcher but ours."""
    run_dir = tmp_path_factory.mktemp("straight") / "run"
    command = train_command(run_dir, store, "launch.nproc_per_node=4", steps=STEPS)
    subprocess.run(command, check=True, capture_output=True)
    return run_dir


@pytest.mark.parametrize("tasks", ["node", pytest.param("rank", marks=pytest.mark.cluster)])
def test_a_job_of_two_nodes_learns_what_one_machine_learns(tasks, cluster, store, straight, tmp_path):
    """One torchrun a node, or one task a rank."""
    run_dir = tmp_path / "run"
    command = train_command(run_dir, store, *FOUR, "launch.wait=true", f"launch.slurm.tasks={tasks}", steps=STEPS)
    done = cluster.user(*command, cwd=tmp_path, seconds=600)
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}\n{log(run_dir)}"
    assert losses(run_dir) == pytest.approx(losses(straight), abs=1e-6)
    assert files(run_dir) == files(straight)
    state = read_state(run_dir)
    assert state is not None
    assert state.host == "nodea", "rank 0 is on the job's first host"
    assert {path.name for path in tmp_path.iterdir()} == {"run"}
    if cluster.has_accounting:
        job = (run_dir / "job.txt").read_text().strip()
        assert cluster.ask("sacct", "--noheader", "--jobs", job, "--format=JobName%20").split()[0] == "tiny"
    assert ("warning: 1 core(s) for 2 ranks on node" in log(run_dir)) == (tasks == "node"), "one task has one core"
    for host in cluster.nodes:
        assert f"host {host}: " in log(run_dir) or tasks == "rank"
        assert not cluster.hosts.processes(host, "megalite")


def test_a_killed_rank_is_named_and_the_job_goes_on(cluster, store, straight, tmp_path):
    run_dir = tmp_path / "run"
    job = start(cluster, store, run_dir)
    victim = json.loads((run_dir / "logs/heartbeats/rank_00003.json").read_text())
    cluster.hosts.run(victim["host"], "kill", "-9", str(victim["pid"]))
    began = time.monotonic()
    await_log(run_dir, f"rank {victim['rank']} (pid {victim['pid']}) was ended by SIGKILL", 120)
    if cluster.has_accounting:  # all of this room is run, with nothing beside it
        assert time.monotonic() - began < 10
    await_log(run_dir, "starting them again from step", 180)
    assert cluster.wait_for(job, 600) == "COMPLETED", log(run_dir)
    assert "continuing from" in log(run_dir)
    assert losses(run_dir) == losses(straight)
