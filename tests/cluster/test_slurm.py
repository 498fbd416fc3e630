"""A real Slurm: `launch=slurm` at its time limit, and srun by hand."""

import subprocess
import sys
from pathlib import Path

import pytest

from megalite.guard.run_state import read_state
from tests.cluster.lab import BIN, wait_until
from tests.cluster.runs import FOUR, STEPS, await_log, files, log, losses, start, train_command


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


@pytest.mark.cluster
def test_the_quickstart_learns_on_two_nodes_what_it_learns_on_one(cluster, tmp_path):
    """The shipped corpus, from its text on, as the Makefile has it; some steps of the recipe, tensor 2 x data 2."""
    corpus = Path(__file__).parents[2] / "data_tools/sample_corpus/corpus.parquet"
    columns = ("reader.language_column=language", "reader.split_column=split")
    commands = (
        ("tokenizer", "train", f"input={corpus}", "output=outputs/sample/tokenizer", "tokenizer.vocab_size=4096",
         "tokenizer.character_coverage=0.95", "tokenizer.language_balance=0.5", *columns, "split=train"),
        ("data", "build", f"input={corpus}", "output=outputs/sample/store", "tokenizer.path=outputs/sample/tokenizer",
         "reader.source_column=source", *columns),
    )  # fmt: skip
    for words in commands:
        done = cluster.user(str(BIN / "megalite"), *words, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
    keys = ("train", "experiment=quickstart", "parallel=tp2", "trainer.stop_after=6", "trainer.log_every=1")
    here = ("data.validation=[]", "trainer.micro_batch_size=0")
    done = cluster.user(
        str(BIN / "megalite"), *keys, *here, "run_name=nodes", *FOUR, "launch.wait=true", cwd=tmp_path, seconds=400
    )
    assert done.returncode == 0, done.stdout + done.stderr
    local = (*keys, *here, "run_name=one", "launch.nproc_per_node=4")
    subprocess.run([str(BIN / "megalite"), *local], cwd=tmp_path, check=True, capture_output=True)
    runs = tmp_path / "outputs"
    assert len(losses(runs / "one")) == 6
    assert losses(runs / "nodes") == pytest.approx(losses(runs / "one"), abs=1e-6)


@pytest.mark.cluster
def test_a_job_that_makes_room_for_another_goes_on_when_that_is_through(cluster, store, tmp_path):
    run_dir = tmp_path / "run"
    job = start(cluster, store, run_dir, "launch.slurm.exclusive=true")
    words = ("--partition=urgent", "--nodes=2", "--exclusive", f"--output={tmp_path}/urgent.log", "--wrap=sleep 5")
    cluster.ask("sbatch", *words)
    await_log(run_dir, "back into the queue", 60)
    assert cluster.wait_for(job, 300) == "COMPLETED", log(run_dir)
    assert f"job {job}, start 2: step " in log(run_dir)
    straight = tmp_path / "straight"
    subprocess.run(
        train_command(straight, store, "launch.nproc_per_node=4", steps=STEPS), check=True, capture_output=True
    )
    assert losses(run_dir) == losses(straight)


@pytest.mark.cluster
def test_the_drivers_own_sigterm_saves(cluster, store, tmp_path):
    """`scancel --batch --signal=TERM`: a person wants the job to end, and what it has learned."""
    run_dir = tmp_path / "run"
    job = start(cluster, store, run_dir)
    cluster.ask("scancel", "--batch", "--signal=TERM", job)
    cluster.wait_for(job, 60)
    state = read_state(run_dir)
    assert state is not None
    assert (state.state, state.exit_code) == ("preempted", 75), log(run_dir)[-3000:]
    assert f"step_{state.step:08d}" in {path.name for path in run_dir.glob("checkpoints/*")}


@pytest.mark.cluster
def test_srun_by_hand_starts_a_rank_a_task(cluster, store, tmp_path):
    """`srun python -m megalite.node_checks`, then `megalite.train`: where ranks meet, only Slurm's variables tell."""
    srun = ["srun", "--nodes=2", "--ntasks-per-node=2", sys.executable, "-m"]
    looked = cluster.user(*srun, "megalite.node_checks", f"run_dir={tmp_path / 'run'}", "size_mib=1", cwd=tmp_path)
    assert looked.returncode == 0, looked.stdout + looked.stderr
    assert "these hosts can train together" in looked.stdout
    assert all(f"{host} " in looked.stdout for host in cluster.nodes)
    assert "all-reduce: " in looked.stdout

    by_hand, local = tmp_path / "by_hand", tmp_path / "local"
    keys = train_command(by_hand, store)[2:]
    done = cluster.user(*srun, "megalite.train", *keys, cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    subprocess.run(train_command(local, store, "launch.nproc_per_node=4"), check=True, capture_output=True)
    assert losses(by_hand) == pytest.approx(losses(local), abs=1e-6)
    assert files(by_hand) == files(local)
