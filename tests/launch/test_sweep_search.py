"""Searches: Optuna's study is shared by workers that may be killed at any time. Trainings are stubs, but in one."""

import json
import math
import multiprocessing
import os
import re
import shlex
import signal
import sqlite3
from pathlib import Path

import optuna
import psutil
import pytest

from megalite.config.sweep import Dimension
from megalite.errors import DataError, ResourceError
from megalite.launch.cli import main
from megalite.launch.sweep import plan as sweep_plan
from megalite.launch.sweep import run as sweep_run
from megalite.launch.sweep import search as sweep_search
from megalite.launch.sweep import study as sweep_study
from megalite.launch.sweep.plan import read_command
from megalite.launch.sweep.search import Search
from megalite.launch.sweep.state import Outcome, save_outcome
from megalite.metrics.jsonl import read_metrics
from tests.launch.sweeps import MODEL, compose_quickly, read_table, use_stub, wait_until
from tests.runs import write_store

LR = "optimizer.lr=tag(log,interval(1e-5,1e-1))"
DIRECTORY = Path("outputs/sweeps/s")


@pytest.fixture
def command(store, tmp_path, monkeypatch):
    """Everything of the command line that a test does not look at; a working directory of its own."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sweep_plan, "compose_train", compose_quickly)
    monkeypatch.setattr(sweep_search, "_PAUSE_SECONDS", 0.1)
    use_stub(monkeypatch)
    # Before workers are forked, which would each import it.
    optuna.create_study(storage="sqlite://")
    return ["train", "-m", f"data.train={store}", *MODEL, "sweep.name=s"]


def start(arguments):
    process = multiprocessing.get_context("fork").Process(target=lambda: os._exit(main(arguments)))
    process.start()
    return process


def lives():
    """Trial -> the steps from which its trainings began."""
    return {
        path.parent.name: [int(line.split()[0]) for line in path.read_text().splitlines()]
        for path in sorted(DIRECTORY.glob("*/lives.txt"))
    }


def trials():
    """Number and state of each trial, read without Optuna."""
    with sqlite3.connect(DIRECTORY / "study.sqlite") as database:
        return database.execute("SELECT number, state FROM trials ORDER BY trial_id").fetchall()


def test_twelve_trials_of_three_workers_of_which_one_is_killed(command, capsys):
    arguments = [*command, LR, "sweep.trials=12"]
    DIRECTORY.mkdir(parents=True)
    (DIRECTORY.parent / "hold").touch()
    workers = [start(arguments) for _ in range(3)]
    wait_until(lambda: len(list(DIRECTORY.glob("*/metrics.jsonl"))) == 3)
    os.kill(workers[0].pid, signal.SIGKILL)
    wait_until(lambda: any('"preempted"' in path.read_text() for path in DIRECTORY.glob("*/state.json")))
    (DIRECTORY.parent / "hold").unlink()
    for worker in workers:
        worker.join()
    assert [worker.exitcode for worker in workers] == [-9, 0, 0]
    assert trials() == [(number, "COMPLETE") for number in range(12)]
    begun = lives()
    assert list(begun) == [f"trial_{number:04d}" for number in range(12)]
    assert sorted(begun.values())[:11] == [[0]] * 11, "none twice"
    (again,) = [steps for steps in begun.values() if len(steps) > 1]
    assert again == [0, 1], "continued where its checkpoint stood"
    assert main(arguments) == 0  # shows the table
    assert lives() == begun
    rows = read_table(DIRECTORY)
    rates = [float(row["optimizer.lr"]) for row in rows]
    assert len(set(rates)) == 12
    best = min(rows, key=lambda row: float(row["loss"]))
    assert [row["job"] for row in rows if row["best"]] == [best["job"]]
    assert float(best["loss"]) == pytest.approx((math.log10(float(best["optimizer.lr"])) + 3) ** 2 + 1 / 3)
    words = shlex.split(capsys.readouterr().out.strip().splitlines()[-1])
    assert f"optimizer.lr={best['optimizer.lr']}" in words


def test_a_search_goes_on_to_more_trials_and_refuses_to_become_another(command, capsys):
    arguments = [*command, LR, "sweep.parallel=2"]
    assert main([*arguments, "sweep.trials=1"]) == 0
    assert main([*arguments, "sweep.trials=3", "launch.restarts=1"]) == 0
    assert lives() == {f"trial_{number:04d}": [0] for number in range(3)}
    for other in (["seed=5"], ["sweep.metric=grad_norm"], ["optimizer.weight_decay=0.1,0.2"]):
        assert main([*arguments, "sweep.trials=5", *other]) == 2
        assert "holds a search with other" in capsys.readouterr().err
    assert len(trials()) == 3


def test_values_depend_on_the_seed_and_the_trials_before_alone(command):
    def rates(*names, more=()):
        workers = [
            Search(read_command([*command[2:-1], f"sweep.name={name}", LR, "sweep.trials=3", *more])) for name in names
        ]
        return [worker.next().values for worker in workers]

    first = rates("a", "a", "a")
    assert rates("b", "b", "b") == first
    assert len(set(first)) == 3, "workers that begin together draw different values"
    assert not set(rates("c", "c", "c", more=["sweep.seed=7"])) & set(first)


def test_trials_that_fail_are_told_and_count(command, capsys):
    assert main([*command, LR, "optimizer.weight_decay=2,3", "sweep.trials=2"]) == 1
    assert trials() == [(0, "FAIL"), (1, "FAIL")]
    rows = read_table(DIRECTORY)
    assert [(row["state"], row["error"], row["best"]) for row in rows] == [
        ("failed", "MegaliteError: a planted one", "")
    ] * 2
    assert "best: none" in capsys.readouterr().out


def test_values_that_do_not_fit_together_fail_and_count(command, monkeypatch):
    real = sweep_search.build_job

    def picky(sweep, label, values):
        return real(sweep, label, ["0" if label == "trial_0001" else values[0]])

    monkeypatch.setattr(sweep_search, "build_job", picky)
    assert main([*command, LR, "sweep.trials=3"]) == 0
    assert trials() == [(0, "COMPLETE"), (1, "FAIL"), (2, "COMPLETE")]
    assert read_table(DIRECTORY)[1]["error"] == "optimizer.lr: found 0.0, must be above 0"


def test_a_disk_that_is_away_costs_no_trial(command, monkeypatch, capsys):
    """The one that was about to begin stays, and none of those after it is tried."""
    real = sweep_search.build_job

    def away(sweep, label, values):
        if label == "trial_0001":
            raise DataError(f"{label}: data.train: the disk is away")
        return real(sweep, label, values)

    monkeypatch.setattr(sweep_search, "build_job", away)
    assert main([*command, LR, "sweep.trials=3"]) == 3
    assert "the disk is away; nothing more is started here" in capsys.readouterr().err
    assert trials() == [(0, "COMPLETE"), (1, "RUNNING")]
    monkeypatch.setattr(sweep_search, "build_job", real)
    assert main([*command, LR, "sweep.trials=3"]) == 0
    assert trials() == [(number, "COMPLETE") for number in range(3)]


def test_a_disk_that_takes_no_lock_is_no_other_worker(command, monkeypatch, capsys):
    def full(*args, **kwargs):
        raise ResourceError("sweep.dir: nothing can be written: No space left on device")

    search = Search(read_command([*command[2:], LR, "sweep.trials=1"]))
    monkeypatch.setattr(sweep_search, "RunLock", full)
    with pytest.raises(ResourceError, match="No space left"):
        search.next()


def test_lives_too_short_for_a_step_end_the_worker_with_a_word(command):
    """Another life of its task would end in the same way, and so on for every trial."""
    search = Search(read_command([*command[2:], LR, "sweep.trials=2"]))
    job = search.next()
    save_outcome(DIRECTORY, job.label, Outcome(1.0, 5, "ResourceError: the time limit came before a step was saved"))
    assert search.ended(job, 5) == 5
    assert search.in_vain == "ResourceError: the time limit came before a step was saved"


def test_a_trial_whose_ranks_were_killed_stays(command):
    """Under Slurm its driver ends with 1; what the run itself left behind tells."""
    search = Search(read_command([*command[2:], LR, "sweep.trials=2"]))
    killed, ended = search.next(), search.next()
    run_by_hand(killed, [1.0], "running")  # and nobody holds its lock
    assert search.ended(killed, 1) == 1
    run_by_hand(ended, [1.0], "failed")
    assert search.ended(ended, 1) == 0
    assert trials() == [(0, "RUNNING"), (1, "FAIL")]


def test_another_metric_is_another_search(command, capsys):
    """Also where it is the data that name it."""
    assert main([*command, LR, "sweep.trials=1"]) == 0
    assert main([*command, LR, "sweep.trials=2", f"data.validation={command[2].partition('=')[2]}"]) == 2
    assert "holds a search with other metric: loss, and not eval/words/loss" in capsys.readouterr().err


def test_no_trial_is_given_up_in_the_warm_up(command, monkeypatch):
    monkeypatch.setattr(sweep_search, "_PAUSE_SECONDS", 0.0)
    words = [*command[2:], LR, "sweep.trials=7", "sweep.prune=true", "schedule.warmup_steps=2"]
    search = Search(read_command(words))
    for number in range(5):
        job = search.next()
        run_by_hand(job, [3.0, 2.0, 1.0 + number], "finished")
        assert not search.is_hopeless(job)
        search.ended(job, 0)
    job = search.next()
    run_by_hand(job, [9.0])
    assert not search.is_hopeless(job)
    run_by_hand(job, [9.0, 9.0, 9.0])
    assert search.is_hopeless(job)


def test_figures_that_were_reported_are_not_reported_again(command, monkeypatch, recwarn):
    monkeypatch.setattr(sweep_search, "_PAUSE_SECONDS", 0.0)
    words = read_command([*command[2:], LR, "sweep.trials=1", "sweep.prune=true"])
    search = Search(words)
    job = search.next()
    run_by_hand(job, [3.0, 2.0], "preempted")
    search.is_hopeless(job)
    assert search.ended(job, 75) == 75
    again = Search(words)
    run_by_hand(again.next(), [3.0, 2.0, 1.0])
    again.is_hopeless(job)
    assert not [str(warning.message) for warning in recwarn if "already reported" in str(warning.message)]


def test_what_is_given_up_is_stopped(command):
    """By the loop that runs trainings side by side, and not only by whom it asks."""
    (DIRECTORY.parent).mkdir(parents=True)
    (DIRECTORY.parent / "hold").touch()
    told = []

    class Hopeless(Search):
        def is_hopeless(self, job):
            if not told and (job.run_dir / "state.json").exists():
                told.append(job.label)
                self._hopeless.add(job.label)
            return job.label in told

    search = Hopeless(read_command([*command[2:], LR, "sweep.trials=1"]))
    assert sweep_run.run_side_by_side(search, [sweep_run.Slot(0)], DIRECTORY) == 0
    assert trials() == [(0, "PRUNED")]


def test_values_in_an_order_of_chance_are_refused(command, capsys):
    assert main([*command, "seed=shuffle(1,2,3)", "sweep.trials=2"]) == 2
    assert "seed=shuffle(1,2,3): a search chooses among values in any order" in capsys.readouterr().err


def test_both_ends_are_checked_before_anything_starts(command, capsys):
    assert main([*command, "optimizer.lr=interval(0,1)", "sweep.trials=2"]) == 2
    assert capsys.readouterr().err.startswith("ConfigError: lowest: optimizer.lr: found 0.0")
    arguments = ["optimizer.weight_decay=0.1,-1", "sweep.trials=2"]
    assert main([*command, *arguments]) == 2
    assert capsys.readouterr().err.startswith("ConfigError: highest: optimizer.weight_decay: found -1")
    assert not Path("outputs").exists()


def test_a_trial_that_the_machine_ended_goes_on_with_the_next_command(command, capsys):
    """Killed, for want of memory for instance: its values are not to blame."""
    arguments = [*command, LR, "sweep.trials=2"]
    DIRECTORY.mkdir(parents=True)
    (DIRECTORY.parent / "hold").touch()
    process = start(arguments)
    wait_until(lambda: list(DIRECTORY.glob("*/metrics.jsonl")))
    (training,) = psutil.Process(process.pid).children()
    (DIRECTORY.parent / "hold").unlink()
    training.kill()
    process.join()
    assert process.exitcode == 137
    assert trials() == [(0, "RUNNING"), (1, "COMPLETE")]
    assert main(arguments) == 0
    assert trials() == [(0, "COMPLETE"), (1, "COMPLETE")]


@pytest.mark.parametrize("text", ["", "{"])
def test_a_search_that_a_full_disk_kept_from_beginning_begins(command, text):
    DIRECTORY.mkdir(parents=True)
    (DIRECTORY / "search.json").write_text(text)
    assert main([*command, LR, "sweep.trials=1"]) == 0


@pytest.mark.parametrize("damage", ["no database", "pages"])
def test_a_damaged_study_is_one_error_and_its_trials_stay(command, capsys, damage):
    arguments = [*command, LR, "sweep.trials=2"]
    assert main(arguments) == 0
    study = DIRECTORY / "study.sqlite"
    content = study.read_bytes()
    study.write_bytes(b"nothing" if damage == "no database" else content[:4096] + bytes(len(content) - 4096))
    capsys.readouterr()
    assert main([*arguments[:-1], "sweep.trials=3"]) == 5
    printed = capsys.readouterr().err
    assert re.search("sweep.dir: .*study.sqlite cannot be read or written: .*restore it, or choose another", printed)
    assert "Traceback" not in printed
    assert sorted(lives()) == ["trial_0000", "trial_0001"]


@pytest.mark.parametrize("kind", [["sweep.trials=2", LR], ["optimizer.lr=1e-3,1e-2"]])
def test_a_metric_that_no_row_will_hold_is_refused_before_any_training(command, capsys, kind):
    assert main([*command, *kind, "sweep.metric=nosuch"]) == 2
    assert "sweep.metric: found 'nosuch', allowed: loss, " in capsys.readouterr().err
    assert not list(DIRECTORY.glob("*/metrics.jsonl"))


def test_a_signal_leaves_the_trial_to_the_next_command(command):
    arguments = [*command, LR, "sweep.trials=2"]
    DIRECTORY.mkdir(parents=True)
    (DIRECTORY.parent / "hold").touch()
    process = start(arguments)
    wait_until(lambda: list(DIRECTORY.glob("*/metrics.jsonl")))
    os.kill(process.pid, signal.SIGTERM)
    process.join()
    assert process.exitcode == 75
    assert trials() == [(0, "RUNNING")]
    assert read_table(DIRECTORY)[0]["state"] == "preempted"
    (DIRECTORY.parent / "hold").unlink()
    assert main(arguments) == 0
    assert trials() == [(0, "COMPLETE"), (1, "COMPLETE")]
    assert lives() == {"trial_0000": [0, 1], "trial_0001": [0]}


def test_what_was_finished_but_not_told_is_not_trained_again(command):
    arguments = [*command, LR, "sweep.trials=1"]
    search = Search(read_command(arguments[2:]))
    job = search.next()
    run_by_hand(job, [1.0, 0.5, 0.25], "finished")
    del search  # its lock goes with it, as with a process
    assert main(arguments) == 0
    assert trials() == [(0, "COMPLETE")]
    assert lives() == {}


def run_by_hand(job, losses, state=None):
    """What a training would leave behind."""
    from megalite.config.frozen import save_config

    save_config(job.training.config, job.run_dir / "config.yaml")
    rows = [{"step": 1 + step, "loss": loss} for step, loss in enumerate(losses)]
    (job.run_dir / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    if state:
        stands = {"state": state, "started": 1, "changed": 1, "world_size": 1, "host": "h", "pid": 1, "step": len(rows)}
        (job.run_dir / "state.json").write_text(json.dumps(stands))


def test_a_training_below_the_median_is_given_up(command, monkeypatch):
    monkeypatch.setattr(sweep_search, "_PAUSE_SECONDS", 0.0)
    search = Search(read_command([*command[2:], LR, "sweep.trials=8", "sweep.prune=true"]))
    for number in range(5):
        job = search.next()
        run_by_hand(job, [3.0, 2.0])
        assert not search.is_hopeless(job)
        run_by_hand(job, [3.0, 2.0, 1.0 + number], "finished")
        assert search.ended(job, 0) == 0
    bad, good, unlucky = search.next(), search.next(), search.next()
    run_by_hand(bad, [2.5])
    assert not search.is_hopeless(bad)
    run_by_hand(bad, [2.5, 2.4], "preempted")
    assert search.is_hopeless(bad)
    assert search.ended(bad, 75) == 0
    run_by_hand(good, [2.5, 1.9], "preempted")
    assert not search.is_hopeless(good)
    assert search.ended(good, 75) == 75  # somebody else stopped it: it stays to be taken up
    run_by_hand(unlucky, [9.0, 9.0])
    assert search.is_hopeless(unlucky)
    run_by_hand(unlucky, [9.0, 9.0, 0.1], "finished")  # before it heard of it
    assert search.ended(unlucky, 0) == 0
    assert [state for _, state in trials()] == ["COMPLETE"] * 5 + ["PRUNED", "RUNNING", "COMPLETE"]
    assert search.next() is None
    assert search.is_empty
    rows = search.rows()
    assert [row.state for row in rows[5:]] == ["pruned", "preempted", "finished"]


def test_pruning_needs_something_to_look_at(command, store, tmp_path, capsys):
    held = write_store(tmp_path / "held", seed=1)
    arguments = [*command, LR, "sweep.trials=2", "sweep.prune=true", f"data.validation={held}"]
    assert main(arguments) == 2
    assert "sweep.prune: found true, but eval/held/loss is looked at only in the end" in capsys.readouterr().err


def test_a_figure_that_is_no_number_is_no_result(command):
    search = Search(read_command([*command[2:], LR, "sweep.trials=1"]))
    job = search.next()
    run_by_hand(job, [3.0, 2.0, math.nan], "finished")
    search.ended(job, 0)
    assert trials() == [(0, "FAIL")]


@pytest.mark.parametrize(
    ("dimension", "allowed"),
    [
        (Dimension("k", "", ("a", "'b c'")), {"a", "'b c'"}),
        (Dimension("k", "", ("1", "3", "5"), (1, 5), 2), {"1", "3", "5"}),
        (Dimension("k", "", ("0.0", "0.1", "0.2", "0.3"), (0.0, 0.3), 0.1), {"0.0", "0.1", "0.2", "0.3"}),
        (Dimension("k", "", (), (1, 4)), {"1", "2", "3", "4"}),
        (Dimension("k", "", (), (1, 4), None, True), {"1", "2", "3", "4"}),
        (Dimension("k", "", (), (1e-5, 1e-1), None, True), None),
        (Dimension("k", "", (), (0.0, 0.5)), None),
    ],
)
def test_values_of_a_dimension(dimension, allowed):
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    drawn = []
    for _ in range(60):
        trial = study.ask()
        text = sweep_study.suggest(trial, dimension)
        assert sweep_study.suggest(trial, dimension) == text
        if allowed is None:
            assert float(text) == trial.params["k"], "no digit is lost"
            assert dimension.ends[0] <= float(text) <= dimension.ends[1]
        drawn.append(text)
    assert allowed is None or set(drawn) == allowed
    if dimension.log and allowed is None:
        assert sum(float(text) < 1e-3 for text in drawn) > 15, "spread over orders of magnitude"


def test_without_optuna(command, monkeypatch, capsys):
    monkeypatch.setitem(__import__("sys").modules, "optuna", None)
    assert main([*command, LR, "sweep.trials=2"]) == 2
    assert "pip install megalite[sweep]" in capsys.readouterr().err


@pytest.mark.slow
def test_a_real_search_and_the_command_that_repeats_its_best(store, tmp_path, monkeypatch, capsys):
    """Twelve trials, three workers, one of them killed; the printed line, given to a shell, reaches the same loss."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    arguments = ["train", "-m", f"data.train={store}", *MODEL, LR, "sweep.trials=12", "sweep.name=s"]
    workers = [start(arguments) for _ in range(3)]
    wait_until(lambda: len(list(DIRECTORY.glob("*/logs/sweep.log"))) == 3, 300)
    os.kill(workers[0].pid, signal.SIGKILL)
    for worker in workers:
        worker.join()
    assert [worker.exitcode for worker in workers] == [-9, 0, 0]
    assert trials() == [(number, "COMPLETE") for number in range(12)]
    assert main(arguments) == 0
    best = next(row for row in read_table(DIRECTORY) if row["best"])
    words = shlex.split(capsys.readouterr().out.strip().splitlines()[-1])
    assert main(words[1:]) == 0
    (run_dir,) = (word.removeprefix("run_dir=") for word in words if word.startswith("run_dir="))
    assert repr(read_metrics(Path(run_dir) / "metrics.jsonl")[-1]["loss"]) == best["loss"]
