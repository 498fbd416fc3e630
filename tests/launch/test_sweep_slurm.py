"""Sweeps as arrays of Slurm: what is submitted, and what a task of it does. Slurm's commands are stubs here."""

import multiprocessing
import os
import re
import signal
import time
from dataclasses import replace
from pathlib import Path

import pytest

from megalite.config.frozen import FROZEN, read_config, sent_config
from megalite.errors import ResourceError
from megalite.launch.cli import main
from megalite.launch.monitor.run_status import survey
from megalite.launch.sweep import array as sweep_slurm
from megalite.launch.sweep import plan as sweep_plan
from megalite.launch.sweep import task as sweep_task
from megalite.launch.sweep.array import CONFIG, JOB, is_queued
from tests.launch.sweeps import MODEL, compose_quickly, read_table, use_stub
from tests.launch.test_sweep_search import LR, lives, run_by_hand, trials, wait_until

DIRECTORY = Path("outputs/sweeps/s")
SLURM = {
    "sbatch": 'cp "$2" submitted.sh; echo "7;cluster"',
    "scontrol": 'echo "$@" > requeued',
    "squeue": '[ -e queue ] && exec cat queue; echo "slurm_load_jobs error: Invalid job id specified" >&2; exit 1',
}


@pytest.fixture
def command(store, tmp_path, monkeypatch):
    """A command line, and Slurm's own commands on PATH: what is queued stands in the file `queue`."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sweep_plan, "compose_train", compose_quickly)
    use_stub(monkeypatch)
    (tmp_path / "bin").mkdir()
    for name, body in SLURM.items():
        path = tmp_path / "bin" / name
        path.write_text(f"#!/bin/sh\n{body}\n")
        path.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    words = [
        "launch=slurm",
        "launch.nodes=2",
        "launch.nproc_per_node=1",
        "launch.slurm.time=30",
        "trainer.micro_batch_size=1",
    ]
    return ["train", "-m", f"data.train={store}", *MODEL, "sweep.name=s", *words]


def submitted():
    """The script that sbatch was given."""
    return Path("submitted.sh").read_text()


def run_tasks(monkeypatch, tasks, code_of):
    """Run tasks of the array as Slurm would; `code_of` stands for their trainings."""
    directory = re.search(r"megalite.launch.sweep.task (\S+)", submitted())[1]
    codes = []
    for task in tasks:
        monkeypatch.setenv("SLURM_ARRAY_TASK_ID", str(task))
        monkeypatch.setattr(sweep_task, "run_job", code_of)
        codes.append(sweep_task.main([directory]))
    monkeypatch.delenv("SLURM_ARRAY_TASK_ID")
    return codes


def test_a_sweep_of_six_is_one_array_and_only_what_failed_is_submitted_again(command, monkeypatch, capsys, tmp_path):
    sweep = [*command, "optimizer.lr=1e-3,1e-2", "optimizer.weight_decay=0.1,0.2,2", "sweep.parallel=3"]
    assert main(sweep) == 0
    text = submitted()
    for option in ("--array=0-5%3", "--job-name=s", "--nodes=2", "--time=30", "--requeue"):
        assert f"#SBATCH {option}\n" in text
    assert f'#SBATCH --output="{tmp_path / DIRECTORY}/logs/slurm_%A_%a.log"\n' in text
    assert "optimizer" not in text, "each task finds its own configuration"
    assert [row["state"] for row in read_table(DIRECTORY)] == ["not started"] * 6

    def train(config):
        if config.optimizer.weight_decay > 1:
            raise ResourceError("a planted one")
        finish(config)
        return 0

    assert run_tasks(monkeypatch, range(6), train) == [0, 0, 5, 0, 0, 5]
    Path("queue").write_text("RUNNING\n")
    capsys.readouterr()
    assert main(sweep) == 5
    assert "sweep.dir: job 7 of outputs/sweeps/s is in the queue" in capsys.readouterr().err
    Path("queue").unlink()
    assert main(sweep) == 0
    assert "#SBATCH --array=0-1%3\n" in submitted()
    rows = read_table(DIRECTORY)
    assert [row["state"] for row in rows] == ["finished", "finished", "failed"] * 2
    assert rows[5]["error"] == "ResourceError: a planted one"
    assert run_tasks(monkeypatch, [0, 1], lambda config: finish(config) or 0) == [0, 0]
    os.remove("submitted.sh")
    assert main(sweep) == 0
    assert not Path("submitted.sh").exists(), "nothing is left to submit"
    assert {row["state"] for row in read_table(DIRECTORY)} == {"finished"}


def finish(config):
    """What a training would leave behind."""

    class Job:
        run_dir = Path(config.run_dir)
        training = type("Training", (), {"config": config})

    Path(config.run_dir).mkdir(parents=True, exist_ok=True)
    run_by_hand(Job, [3.0, 2.0, 1.0], "finished")


def test_trainings_that_were_planned_before_their_store_was_there_are_finished(command, monkeypatch):
    """Their ranks write down the vocabulary that they found in it."""
    command[2] = "data.train=later"

    def train(config):
        assert config.model.vocab_size is None
        finish(replace(config, model=replace(config.model, vocab_size=300)))
        return 0

    monkeypatch.setattr(sweep_slurm, "is_queued", lambda *_: bool(any(run_tasks(monkeypatch, [0, 1], train))))
    assert main([*command, "seed=1,2", "launch.slurm.after=[3]", "launch.wait=true"]) == 0
    assert {row["state"] for row in read_table(DIRECTORY)} == {"finished"}


def test_a_task_takes_the_configuration_of_its_number(command, monkeypatch):
    assert main([*command, "optimizer.lr=1e-3,1e-2", "seed=1,2"]) == 0
    assert "#SBATCH --array=0-3\n" in submitted()
    seen = []
    run_tasks(monkeypatch, [3, 1], lambda config: seen.append(config) or 0)
    assert [(config.optimizer.lr, config.seed) for config in seen] == [(0.01, 2), (0.001, 2)]
    assert read_config(DIRECTORY / "jobs" / "lr=0.01,seed=2" / CONFIG) == seen[0]


def test_jobs_lists_the_trainings_of_an_array_and_nothing_else(command, monkeypatch):
    """The sweep's own directory, and what it keeps of each task, are no runs."""
    assert main([*command, "seed=1,2"]) == 0
    assert [run.run for run in survey(Path("outputs")).runs] == []
    run_tasks(monkeypatch, [1], lambda config: finish(config) or 0)
    (run,) = survey(Path("outputs")).runs
    assert run.run == "sweeps/s/seed=2"


def test_the_ranks_of_a_task_are_sent_its_configuration(command, monkeypatch):
    """They know of no sweep: they read what every launcher of ours sends."""
    assert main([*command, "seed=1,2"]) == 0
    for name, body in {"scontrol": "echo nodea; echo nodeb", "srun": 'printf %s "$MEGALITE_CONFIG" > srun_got'}.items():
        Path("bin", name).write_text(f"#!/bin/sh\n{body}\n")
        Path("bin", name).chmod(0o755)
    for name, value in {"SLURM_JOB_ID": "8", "SLURM_JOB_NODELIST": "node[a-b]", "SLURM_ARRAY_TASK_ID": "1"}.items():
        monkeypatch.setenv(name, value)
    before = {number: signal.getsignal(number) for number in (signal.SIGUSR1, signal.SIGTERM)}
    try:
        assert sweep_task.main([str(DIRECTORY)]) == 0
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    assert sent_config({FROZEN: Path("srun_got").read_text()}).seed == 2


def test_waiting_ends_with_the_queue_and_says_whether_all_is_well(command, monkeypatch):
    Path("queue").write_text("PENDING\n")

    def wait(seconds):
        if seconds != sweep_slurm._POLL_SECONDS:
            return  # subprocess waits too
        asked.append(seconds)
        Path("queue").unlink()
        if len(asked) > 1:
            for path in DIRECTORY.glob(f"jobs/*/{CONFIG}"):
                finish(read_config(path))

    asked = []
    monkeypatch.setattr(sweep_slurm.time, "sleep", wait)
    monkeypatch.setattr(sweep_slurm, "_refuse_a_second", lambda sweep: None)
    assert main([*command, "seed=1,2", "launch.wait=true"]) == 1
    Path("queue").write_text("PENDING\n")
    assert main([*command, "seed=1,2", "launch.wait=true"]) == 0
    assert len(asked) == 2


def test_the_tasks_of_a_search_are_workers_on_one_study(command, monkeypatch):
    # Of their trainings each is a step of Slurm; the stub in its place knows nothing of that.
    search = [*command, LR, "sweep.trials=3", "sweep.parallel=2", "launch.slurm.requeue=false"]
    assert main(search) == 0
    assert "#SBATCH --array=0-1\n" in submitted()
    assert run_tasks(monkeypatch, [0, 1], None) == [0, 0]
    assert trials() == [(number, "COMPLETE") for number in range(3)]
    assert set(map(tuple, lives().values())) == {(0,)}
    os.remove("submitted.sh")
    assert main(search) == 0
    assert not Path("submitted.sh").exists()


def test_an_array_of_workers_that_did_nothing_is_a_failure(command, monkeypatch):
    """Whether they were cancelled or never found their Python: who waits is told."""
    monkeypatch.setattr(sweep_slurm.time, "sleep", lambda seconds: None)
    search = [*command, LR, "sweep.trials=2", "launch.wait=true"]
    assert main(search) == 1
    assert run_tasks(monkeypatch, [0], None) == [0]
    assert main(search) == 0


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGTERM])
def test_a_worker_whose_time_is_up_goes_back_into_the_queue(command, monkeypatch, number):
    """And one that a person cancels does not; its trial waits for the next worker either way."""
    assert main([*command, LR, "sweep.trials=2"]) == 0
    (DIRECTORY.parent / "hold").touch()
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "0")
    monkeypatch.setenv("SLURM_JOB_ID", "8")
    worker = multiprocessing.get_context("fork").Process(target=lambda: os._exit(sweep_task.main([str(DIRECTORY)])))
    worker.start()
    wait_until(lambda: list(DIRECTORY.glob("*/metrics.jsonl")))
    os.kill(worker.pid, number)
    worker.join()
    assert worker.exitcode == 75
    assert trials() == [(0, "RUNNING")]
    assert Path("requeued").exists() == (number == signal.SIGUSR1)
    if number == signal.SIGUSR1:
        assert Path("requeued").read_text() == "requeue 8\n"


def test_a_dry_run_shows_the_array_and_submits_nothing(command, capsys):
    assert main([*command, "seed=1,2", "launch.dry_run=true"]) == 0
    said = capsys.readouterr().out
    assert "#SBATCH --array=0-1\n" in said
    assert "seed=2  not started\n" in said
    assert not Path("submitted.sh").exists()
    assert not Path("outputs").exists()


def test_a_controller_that_does_not_answer_is_no_empty_queue(command):
    (DIRECTORY).mkdir(parents=True)
    (DIRECTORY / JOB).write_text("7\n")
    assert not is_queued("7")
    Path("bin/squeue").write_text("#!/bin/sh\necho 'Unable to contact slurm controller' >&2; exit 1\n")
    with pytest.raises(ResourceError, match="Unable to contact"):
        is_queued("7")
    Path("bin/squeue").write_text(
        "#!/bin/sh\n[ -e away ] && echo PENDING && exit; touch away; echo 'no controller' >&2; exit 1\n"
    )
    assert is_queued("7", patience=0.2)
    Path("bin/squeue").write_text("#!/bin/sh\necho 'slurm_load_jobs error: Invalid job id specified' >&2; exit 1\n")
    before = time.monotonic()
    assert not is_queued("7", patience=60.0)
    assert time.monotonic() < before + 20
    Path("bin/squeue").write_text("#!/bin/sh\necho 'Unable to contact slurm controller' >&2; exit 1\n")
    assert main([*command, "seed=1,2"]) == 5
    assert not Path("submitted.sh").exists()


def test_a_task_elsewhere(capsys):
    assert sweep_task.main(["."]) == 2
    assert "runs in the array of a sweep, and nowhere else" in capsys.readouterr().err
