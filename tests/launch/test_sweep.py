"""`megalite train -m`: every combination, side by side, resumed; what the table says. Trainings are stubs, but two."""

import json
import multiprocessing
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from megalite.config.frozen import FROZEN, config_yaml
from megalite.config.schema_sweep import SweepConfig
from megalite.guard.run_state import read_state
from megalite.launch.cli import main
from megalite.launch.prepare import Training
from megalite.launch.sweep import job as sweep_job
from megalite.launch.sweep import plan as sweep_plan
from megalite.launch.sweep import run as sweep_run
from megalite.launch.sweep import table as sweep_table
from megalite.launch.sweep.plan import Job, label_of, read_command
from megalite.launch.sweep.run import slots_of
from megalite.launch.sweep.state import Row
from megalite.launch.sweep.table import best_of
from megalite.metrics.jsonl import read_metrics
from megalite.preflight import preflight
from tests.launch.sweeps import MODEL, compose_quickly, read_table, use_stub, wait_until
from tests.runs import tiny_config


@pytest.fixture
def command(store, tmp_path, monkeypatch):
    """Everything of the command line that a test does not look at; a working directory of its own."""
    monkeypatch.chdir(tmp_path)
    use_stub(monkeypatch)
    return ["train", "-m", f"data.train={store}", *MODEL, "sweep.name=s"]


@pytest.fixture
def quick(monkeypatch):
    """Without the time that Hydra takes for each training."""
    monkeypatch.setattr(sweep_plan, "compose_train", compose_quickly)


def lives(directory):
    """Folder -> how often a training was started in it."""
    return {path.parent.name: len(path.read_text().splitlines()) for path in sorted(directory.glob("*/lives.txt"))}


def test_six_trainings_of_which_two_fail_and_the_same_command_again(quick, command, tmp_path, capsys):
    sweep = [*command, "optimizer.lr=1e-3,1e-2", "optimizer.weight_decay=0.1,0.2,2", "sweep.parallel=2"]
    directory = Path("outputs/sweeps/s")
    assert main([*sweep]) == 1
    rows = read_table(directory)
    labels = [f"lr={lr},weight_decay={decay}" for lr in ("0.001", "0.01") for decay in ("0.1", "0.2", "2")]
    assert [row["job"] for row in rows] == labels
    assert [row["state"] for row in rows] == ["finished", "finished", "failed"] * 2
    assert [row["error"] for row in rows] == ["", "", "MegaliteError: a planted one"] * 2
    assert [(row["step"], row["steps"]) for row in rows] == [("3", "3"), ("3", "3"), ("0", "3")] * 2
    assert [row["best"] for row in rows] == ["best", "", "", "", "", ""]
    assert float(rows[0]["loss"]) == pytest.approx(1 / 3)
    assert [row["loss"] for row in rows[2::3]] == ["", ""]
    said = capsys.readouterr().out
    assert "best: lr=0.001,weight_decay=0.1, loss 0.333333" in said
    assert "lr=0.01,weight_decay=2: MegaliteError: a planted one" in said
    (directory.parent / "mended").touch()
    assert main([*sweep]) == 0
    assert lives(directory) == {label: 2 if label.endswith("=2") else 1 for label in labels}
    assert {row["state"] for row in read_table(directory)} == {"finished"}
    assert not any(Path().rglob("multirun*")), "nothing of Hydra's own"


def test_what_is_wrong_with_one_training_is_said_before_any_starts(command, capsys):
    assert main([*command, "parallel.tensor=1,2", "optimizer.lr=1e-3,1e-4"]) == 2
    said = capsys.readouterr().err
    assert said.startswith("ConfigError: lr=0.001,tensor=2: parallel.tensor: found 2, must divide")
    assert not Path("outputs").exists()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["seed=1"], ["-m: no key has several values"]),
        (["seed=1,2", "seed=3"], ["seed is given twice"]),
        (["sede=1,2"], ["unknown key sede"]),
        (["hydra/sweeper=other", "seed=1,2"], ["unknown key hydra/sweeper"]),
        (["model=tiny,small"], ["model: found 'small', allowed: gpt2_124m"]),
        (["model=glob(big*)"], ["model=glob(big*): stands for no value"]),
        (["optimizer.lr=interval(0,1)"], ["optimizer.lr=interval(0,1)", "sweep.trials=N"]),
        (["optimizer.lr=tag(log,interval(0,1))", "sweep.trials=2"], ["must rise, from above 0"]),
        (["seed=1,2", "sweep.prune=true"], ["sweep.prune", "needs sweep.trials"]),
        (["seed=range(0,200)", "data.prefetch=range(1,99)"], ["-m: 19,600 combinations, at most 10,000"]),
        (["seed=1,2", "sweep.parallel=0"], ["sweep.parallel: found 0"]),
        (["seed=1,2", "sweep.name=a/b"], ["sweep.name: found 'a/b'"]),
        (["seed=1,1"], ["run_dir: seed=1 and seed=1 would both have outputs/sweeps/s/seed=1"]),
        (["seed=1,2", "run_dir=here"], ["run_dir: seed=1 and seed=2 would both have here", "${seed}"]),
        (["seed=1,2", "run_name=one"], ["run_name: seed=1 and seed=2 would both have one"]),
        (["seed=range(1,9)", "sweep.trials=2", "run_dir=here"], ["run_dir=here", "sweep.dir"]),
        (["seed=1,2", "launch=torchrun", "launch.nodes=2", "launch.address=h"], ["launch.nodes: found 2"]),
        (["launch=local,slurm"], ["launch: with launch=slurm", "launch=slurm asks for other things than launch=local"]),
    ],
)
def test_a_sweep_that_cannot_be(quick, command, capsys, arguments, words):
    assert main([*command, *arguments]) == 2
    said = capsys.readouterr().err
    assert "Traceback" not in said
    for word in words:
        assert word in said
    assert not Path("outputs").exists()


def test_keys_of_sweeps_without_a_sweep(capsys):
    assert main(["train", "sweep.trials=3"]) == 2
    assert "sweep.trials=3: is for several trainings: megalite train -m" in capsys.readouterr().err


def test_a_dry_run_and_the_configurations(command, capsys):
    assert main([*command, "seed=1,2", "launch.dry_run=true"]) == 0
    assert capsys.readouterr().out == "2 trainings in outputs/sweeps/s:\nseed=1  not started\nseed=2  not started\n"
    assert main([*command, "seed=1,2", "--cfg"]) == 0
    said = capsys.readouterr().out
    assert re.findall(r"^seed: (\d)$", said, re.MULTILINE) == ["1", "2"]
    assert said.count("---\n") == 1
    assert not Path("outputs").exists()


def test_folders_of_a_users_own(command):
    assert main([*command, "seed=1,2", "run_dir=mine/${seed}"]) == 0
    assert [row["run_dir"] for row in read_table(Path("outputs/sweeps/s"))] == ["mine/1", "mine/2"]
    assert lives(Path("mine")) == {"1": 1, "2": 1}


@pytest.mark.parametrize(
    ("keys", "values", "label"),
    [
        (["optimizer.lr", "model"], ["0.0001", "tiny"], "lr=0.0001,model=tiny"),
        (
            ["data.sequence_length", "model.max_sequence_length"],
            ["8", "16"],
            "sequence_length=8,max_sequence_length=16",
        ),
        (["a.lr", "b.lr"], ["1", "2"], "a.lr=1,b.lr=2"),
        (["data.train"], ["stores/books"], r"train=stores-books-[0-9a-f]{8}"),
        (["data.train"], ["../.."], r"train=..-..-[0-9a-f]{8}"),
        (["optimizer.betas"], ["[0.9,0.95]"], r"betas=-0.9,0.95--[0-9a-f]{8}"),
        (["x" * 99], ["123"], r"x{91}-[0-9a-f]{8}"),
    ],
)
def test_the_folder_of_a_training(keys, values, label):
    dimensions = tuple(sweep_plan.Dimension(key, key) for key in keys)
    sweep = sweep_plan.Sweep(SweepConfig(), "s", Path("s"), dimensions, (), ())
    assert re.fullmatch(label, label_of(sweep, values))


def test_the_order_in_which_keys_are_said_changes_nothing():
    words = ["trainer.steps=1,2", "optimizer.lr=3e-4,4e-4"]
    one, two = read_command(words), read_command(words[::-1])
    assert one.dimensions == two.dimensions
    assert (one.name, one.keys) == (two.name, ["optimizer.lr", "trainer.steps"])


def test_the_sweeps_own_name_follows_what_changes_numbers():
    names = [
        read_command(arguments).name
        for arguments in (
            ["optimizer.lr=1e-3,1e-4", "seed=3", "data.train=a"],
            [
                "data.train=a",
                "seed=3",
                "launch=slurm",
                "sweep.parallel=2",
                "optimizer.lr=1e-3,1e-4",
                "logging.tensorboard=true",
            ],
            ["optimizer.lr=1e-3,1e-4", "seed=4", "data.train=a"],
            ["optimizer.lr=1e-3,1e-4", "experiment=quickstart"],
        )
    ]
    assert names[0] == names[1] != names[2]
    assert re.fullmatch(r"quickstart-[0-9a-f]{8}", names[3])


def test_a_folder_that_holds_another_training_is_no_result(quick, command):
    sweep, directory = [*command, "optimizer.lr=1e-3,1e-2"], Path("outputs/sweeps/s")
    assert main([*sweep]) == 0
    assert main([*sweep, "optimizer.eps=1e-7"]) == 0
    assert lives(directory) == {"lr=0.001": 2, "lr=0.01": 2}


def run_command(arguments, directory):
    os.chdir(directory)
    os._exit(main(arguments))


def start(arguments, directory):
    """The command in a process of its own, forked."""
    process = multiprocessing.get_context("fork").Process(target=run_command, args=(arguments, directory))
    process.start()
    return process


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_reaches_all_trainings_and_the_same_command_continues(quick, command, tmp_path, number, capsys):
    sweep = [*command, "optimizer.lr=1e-3,1e-2,1e-4", "sweep.parallel=2"]
    directory = tmp_path / "outputs/sweeps/s"
    directory.mkdir(parents=True)
    (directory.parent / "hold").touch()
    process = start(sweep, tmp_path)
    wait_until(lambda: len(list(directory.glob("*/metrics.jsonl"))) == 2)
    assert main(sweep) == 5  # one command at a time
    assert "sweep.dir: outputs/sweeps/s is in use by another sweep" in capsys.readouterr().err
    os.kill(process.pid, number)
    process.join()
    assert process.exitcode == 75
    assert [row["state"] for row in read_table(directory)] == ["preempted", "preempted", "not started"]
    (directory.parent / "hold").unlink()
    assert main(sweep) == 0
    assert lives(directory) == {"lr=0.001": 2, "lr=0.01": 2, "lr=0.0001": 1}
    text = (directory / "lr=0.001" / "lives.txt").read_text()
    assert [line.split()[0] for line in text.splitlines()] == ["0", "1"]  # continued where it stood
    cores = [line.split(" ", 2)[2] for line in text.splitlines()]
    assert cores[0] != str(sorted(os.sched_getaffinity(0))) or len(os.sched_getaffinity(0)) == 1


def test_trainings_end_with_the_sweep_however_it_ends(command, tmp_path):
    """Through the real process of a training, which is asked to stop when its parent is gone."""
    code = (
        "import os, signal, subprocess, sys, time\n"
        "from megalite.launch.sweep.job import _end_with\n"
        "_end_with(os.getppid())\n"
        "print('ready', flush=True)\n"
        "time.sleep(60)\n"
    )
    parent = f"import subprocess, sys, time; subprocess.Popen([sys.executable, '-c', {code!r}]); time.sleep(60)"
    process = subprocess.Popen([sys.executable, "-c", parent], stdout=subprocess.PIPE)
    assert process.stdout.readline() == b"ready\n"
    process.kill()
    process.wait()
    started = time.monotonic()
    assert process.stdout.read() == b""  # to its end: nobody holds the other side any more
    assert time.monotonic() - started < 30
    process.stdout.close()


def test_gpus_and_cores_are_shared_out(monkeypatch, command, capsys):
    monkeypatch.setattr(sweep_run, "count_gpus", lambda: 4)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {2, 3, 5, 7, 11})
    assert [slot.gpus for slot in slots_of(2, 2)] == [("0", "1"), ("2", "3")]
    assert [sorted(slot.cores) for slot in slots_of(2, 2)] == [[2, 3], [5, 7, 11]]
    assert [len(slot.cores) for slot in slots_of(7, 1)] == [1] * 7
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "6,2,GPU-1,0")
    assert [slot.gpus for slot in slots_of(3, 1)] == [("6",), ("2",), ("GPU-1",)]
    assert slots_of(1, 4) == [sweep_run.Slot(0)]
    monkeypatch.setattr(sweep_plan, "count_gpus", lambda: 4)
    assert main([*command, "seed=1,2", "sweep.parallel=3", "launch.nproc_per_node=2"]) == 2
    assert "sweep.parallel: found 3, but there are 4 GPUs for trainings of 2 each" in capsys.readouterr().err


def test_trainings_side_by_side_have_gpus_threads_and_ports_of_their_own(monkeypatch, command):
    """What each was given, as the stub found it; the second one has two ranks, and both parts are of that size."""
    monkeypatch.setattr(sweep_run, "count_gpus", lambda: 4)
    monkeypatch.setattr(sweep_plan, "count_gpus", lambda: 4)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 1})
    monkeypatch.setattr(os, "sched_setaffinity", lambda pid, cores: None)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    Path("outputs/sweeps/s").mkdir(parents=True)
    (Path("outputs/sweeps") / "hold").touch()
    words = ["launch=torchrun", "launch.port=7000", "launch.nproc_per_node=1,2", "sweep.parallel=2"]
    words.append("trainer.micro_batch_size=1")
    process = multiprocessing.get_context("fork").Process(target=lambda: os._exit(main([*command, *words])))
    process.start()
    found = Path("outputs/sweeps/s")
    wait_until(lambda: len(list(found.glob("*/given.json"))) == 2)
    (Path("outputs/sweeps") / "hold").unlink()
    process.join()
    given = {path.parent.name: json.loads(path.read_text()) for path in found.glob("*/given.json")}
    assert {one["gpus"] for one in given.values()} == {"0,1", "2,3"}
    assert {one["port"] for one in given.values()} == {"7000", "7002"}
    assert {one["threads"] for one in given.values()} == {"1"}
    assert {one["group"] for one in given.values()} == {"s"}, "a group of wandb"
    assert not [row["command"] for row in read_table(found) if row["command"].count(" launch.nproc_per_node=") != 1]


def test_a_finished_training_without_the_metric_is_said(quick, command, capsys):
    assert main([*command, "seed=1,2"]) == 0
    capsys.readouterr()
    assert main([*command, "seed=1,2", f"data.validation={command[2].partition('=')[2]}"]) == 0
    said = capsys.readouterr().out
    assert "seed=1, seed=2: trained without eval/words/loss" in said


def test_trainings_side_by_side_do_not_take_one_port(tmp_path):
    """Launchers take a free one each; a given one is the first of several."""
    launch = {"name": "deepspeed", "nproc_per_node": 2}

    def placed(number, **more):
        config = tiny_config(tmp_path / "run", "store", launch=launch | more)
        training = Training(config, 2, "cpu")
        return sweep_run._placed(Job("x", (), training, ""), sweep_run.Slot(number)).launch.port

    assert [placed(number) for number in range(3)] == [None] * 3
    assert [placed(number, port=7000) for number in range(3)] == [7000, 7002, 7004]


def test_the_best_is_a_finite_result_of_a_training_at_its_end():
    def row(label, state, loss):
        return Row(label, (), Path(label), state, figures={} if loss is None else {"loss": loss})

    rows = [row("a", "finished", 2.0), row("b", "failed", 0.5), row("c", "finished", float("nan"))]
    rows += [row("d", "stopped", 1.5), row("e", "finished", 1.5), row("f", "pruned", 0.1), row("g", "finished", None)]
    assert best_of(rows, "loss", "minimize") is rows[3]
    assert best_of(rows, "loss", "maximize") is rows[0]
    assert best_of(rows[1:3], "loss", "minimize") is None


def test_the_page_runs_nothing_and_loads_nothing(quick, command):
    assert main([*command, "optimizer.lr=1e-3,1e-2", "optimizer.weight_decay=0.1,2"]) == 1
    page = Path("outputs/sweeps/s/sweep.html").read_text()
    assert "default-src 'none'" in page
    assert page.count("<tr") == 5
    (picture,) = re.findall(r"<svg.*?</svg>", page, re.DOTALL)
    assert 'aria-label="loss, the best 2 of 4"' in picture, "two failed before their first step"
    assert [label in picture for label in ("lr=0.001,weight_decay=0.1", "lr=0.01,weight_decay=0.1")] == [True, True]
    assert page.count("<tr class='best'>") == 1
    assert "MegaliteError: a planted one" in page
    assert not re.search(r"<script|src=|https?:", page)


@pytest.mark.parametrize(("every", "title"), [(1, "eval/a/loss"), (4, "loss")])
def test_a_metric_that_was_looked_at_once_makes_no_curve(tmp_path, every, title):
    """As with trainer.eval_every=0: then the curves are those of the training loss."""
    rows = []
    for label in ("x", "y"):
        (tmp_path / label).mkdir()
        steps = [{"step": s, "loss": 9.0 - s} | ({} if s % every else {"eval/a/loss": 8.0 - s}) for s in range(1, 5)]
        (tmp_path / label / "metrics.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in steps))
        rows.append(Row(label, (), tmp_path / label, "finished", figures={"loss": 5.0, "eval/a/loss": 4.0}))
    sweep = sweep_plan.Sweep(SweepConfig(), "s", tmp_path, (), (), ())
    chart = sweep_table._curves(sweep, rows, "eval/a/loss")
    assert chart.title == title
    assert [len(series.points) for series in chart.series] == [4, 4]


def train_here(config, parent):
    """The process of a training, forked from one that has done the slow imports."""
    os.environ[FROZEN] = config_yaml(config)
    os._exit(sweep_job.main([str(parent)]))


def test_the_process_of_a_training_trains_what_was_sent(store, tmp_path):
    config = preflight(tiny_config(tmp_path / "run", store, trainer={"steps": 2, "global_batch_size": 2}))
    process = multiprocessing.get_context("fork").Process(target=train_here, args=(config, os.getpid()))
    process.start()
    process.join()
    assert process.exitcode == 0
    assert read_state(tmp_path / "run").state == "finished"
    orphan = multiprocessing.get_context("fork").Process(target=train_here, args=(config, 1))
    orphan.start()
    orphan.join()
    assert orphan.exitcode == 75


@pytest.mark.slow
def test_real_trainings_and_the_command_that_repeats_the_best(store, tmp_path, monkeypatch, capsys):
    """Two of them, side by side; the printed line, given to a shell, reaches the same loss."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    arguments = [
        "train",
        "-m",
        f"data.train={store}",
        *MODEL,
        "optimizer.lr=1e-3,1e-2",
        "sweep.parallel=2",
        "sweep.dir=a b",
    ]
    assert main(arguments) == 0
    rows = read_table(Path("a b"))
    assert [row["state"] for row in rows] == ["finished", "finished"]
    best = next(row for row in rows if row["best"])
    words = shlex.split(capsys.readouterr().out.strip().splitlines()[-1])
    assert words[:2] == ["megalite", "train"]
    assert words == shlex.split(best["command"])
    (run_dir,) = (word.removeprefix("run_dir=") for word in words if word.startswith("run_dir="))
    assert main(words[1:]) == 0
    assert repr(read_metrics(Path(run_dir) / "metrics.jsonl")[-1]["loss"]) == best["loss"]
    assert main(arguments) == 0  # nothing is left to do
    assert "starts" not in capsys.readouterr().err
