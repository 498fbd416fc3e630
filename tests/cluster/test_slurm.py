"""`launch=slurm` at its time limit, on a real Slurm."""

import subprocess

import pytest

from megalite.guard.run_state import read_state
from tests.cluster.lab import wait_until
from tests.cluster.runs import FOUR, await_log, log, losses, train_command


@pytest.mark.cluster
def test_a_time_limit_that_comes_three_times_loses_nothing(cluster, store, tmp_path):
    """The signal comes 60 s before the limit of 3 minutes; Slurm looks every half minute. A person ends it."""
    run_dir = tmp_path / "run"
    size = ("model.hidden_size=128", "trainer.global_batch_size=32", "data.sequence_length=64", "schedule=constant")
    limits = ("launch.slurm.time=3", "launch.slurm.signal_seconds=60", "logging.wandb.mode=offline")
    command = train_command(run_dir, store, *FOUR, *size, *limits, steps=1_000_000)
    done = cluster.user(*command, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    job = (run_dir / "job.txt").read_text().strip()
    stands = 0
    for life in (1, 2, 3):
        cluster.wait_for(job, 120, "RUNNING")
        await_log(run_dir, f"job {job}, start {life}: step {stands},", 60)
        back = await_log(run_dir, f"job {job}: from step {stands} to ", 220)
        after = int(log(run_dir).partition(back)[2].partition(";")[0])
        assert after > stands, "no progress"
        stands = after
    cluster.wait_for(job, 120, "RUNNING")
    wait_until(lambda: len(losses(run_dir)) > stands + 5, 120, lambda: log(run_dir)[-3000:])
    cluster.ask("scancel", job)
    wait_until(lambda: not cluster.hosts.processes("nodea", "megalite"), 60, "ranks live on")
    state = read_state(run_dir)
    assert state is not None
    assert (state.state, state.exit_code) == ("preempted", 75), log(run_dir)[-3000:]
    assert state.step == len(losses(run_dir)) > stands
    ids = {path.name.rpartition("-")[2] for path in (run_dir / "wandb").glob("offline-run-*")}
    assert len(ids) == 1, "one run of wandb"
    straight = tmp_path / "straight"
    alone = ("launch.nproc_per_node=4", f"trainer.stop_after={state.step}", *size)
    subprocess.run(train_command(straight, store, *alone, steps=1_000_000), check=True, capture_output=True)
    assert losses(run_dir) == losses(straight)


@pytest.mark.cluster
def test_a_job_whose_lives_are_too_short_to_save_ends_with_a_word(cluster, store, tmp_path):
    """The signal comes as soon as the job starts, before ranks have taken a step."""
    run_dir = tmp_path / "run"
    limits = ("launch.slurm.time=2", "launch.slurm.signal_seconds=119", "launch.wait=true")
    done = cluster.user(*train_command(run_dir, store, *FOUR, *limits, steps=1_000_000), cwd=tmp_path)
    assert done.returncode == 5, log(run_dir)
    assert "the time limit came before a step was saved" in log(run_dir)
