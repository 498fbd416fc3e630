"""`megalite resume-check` on real ranks: interruptions change nothing, planted defects are named, nothing is left."""

import dataclasses
import json
import math
import multiprocessing
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from megalite.checkpoint import load
from megalite.checkpoint_folder import checkpoint_name
from megalite.checkpoint_format import MANIFEST, read_manifest, write_manifest
from megalite.config.schema import LoggingConfig, ResumeCheckConfig
from megalite.errors import ConfigError, DataError
from megalite.launch.cli import main
from megalite.launch.resume_check import command, runs
from megalite.launch.resume_check.command import NOT_REPRODUCIBLE, NOT_RESTORED, NOT_UNTOUCHED, prepare_check
from megalite.launch.resume_check.compare import METRICS, Comparison, compare_rows, compare_runs, describe_tensors
from megalite.launch.resume_check.runs import ResumeCheckError, train_and_kill
from tests.launch.test_cli import PROGRAM
from tests.runs import tiny_config, write_store

MODEL = [
    "model.num_layers=2", "model.hidden_size=32", "model.max_sequence_length=32", "trainer.global_batch_size=4",
    "trainer.micro_batch_size=2", "trainer.steps=50", "engine.precision=fp32", "launch.nproc_per_node=1",
]  # fmt: skip
TENSOR = ["parallel.tensor=2", "launch.nproc_per_node=2", "model.dropout=0.1"]


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> Path:
    return write_store(tmp_path_factory.mktemp("stores") / "words")


@pytest.fixture
def warnings(monkeypatch):
    """What the command warns of."""
    said = []
    monkeypatch.setattr(command.log, "warning", lambda text, *args: said.append(text % args))
    return said


def test_an_interruption_changes_nothing(store, tmp_path, capsys):
    """Tensor parallel, with dropout. The user's run directory is full of things that would break a resume."""
    run_dir, scratch = tmp_path / "run", tmp_path / "scratch"
    (run_dir / "checkpoints" / checkpoint_name(1)).mkdir(parents=True)
    (run_dir / "checkpoints" / checkpoint_name(1) / MANIFEST).write_text("{")
    scratch.mkdir()
    before = sorted(tmp_path.rglob("*"))
    own = [f"resume_check.directory={scratch}", f"run_dir={run_dir}", f"data.train={store}"]
    assert main(["resume-check", *own, *MODEL, *TENSOR]) == 0
    assert sorted(tmp_path.rglob("*")) == before, "nothing is left, nothing is touched"
    lines = capsys.readouterr().out.splitlines()
    assert any("stopped at 2, resumed " in line and "same" in line for line in lines)
    assert any(re.search(r"killed (in|while saving) step 4, resumed at 2 .* 4 .* 84 .*same", line) for line in lines)


def perturb_a_moment(set_tensor):
    """One value of one moment is not what was saved."""
    done = []

    def perturbed(engine, parameter, kind, value):
        if kind == "exp_avg" and value.dim() == 2 and not done:
            done.append(True)
            value = value.clone()
            value[0, 0] += 0.01
        set_tensor(engine, parameter, kind, value)

    return perturbed


@pytest.fixture(scope="module")
def defect(store, tmp_path_factory):
    """The error of a check whose ranks restore a moment wrongly, and the folder that it keeps."""
    folder = tmp_path_factory.mktemp("defect")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(load, "set_tensor", perturb_a_moment(load.set_tensor))
        with pytest.raises(ResumeCheckError) as raised:
            command.resume_check([f"resume_check.directory={folder}", f"data.train={store}", *MODEL])
    (kept,) = folder.iterdir()
    return raised.value, kept


def test_a_defect_is_named_by_step_with_both_values_and_the_tensors(defect):
    error, kept = defect
    assert error.exit_code == 1
    message = str(error)
    # The step after the resume begins with the right weights and ends with wrong ones.
    found = re.search(r"step 4: loss is (\S+) \((\S+)\) in the first run and (\S+) \((\S+)\) in the second", message)
    assert found, message
    for decimal, bits in ((found[1], found[2]), (found[3], found[4])):
        assert float.fromhex(bits) == float(decimal)
    assert found[2] != found[4]
    assert re.search(r"\n  weight of \S+: \d+ of [\d,]+ values differ, by \S+ at most", message)
    assert re.search(r"\n  \.\.\. and \d+ more tensors", message)
    assert NOT_RESTORED in message, "two uninterrupted runs were compared"
    assert message.endswith(f"Kept to be looked into: {kept}")
    assert {path.name for path in kept.iterdir() if path.is_dir()} == {"straight", "stopped", "again"}


def test_two_runs_of_another_launcher_are_compared(defect, capsys):
    _, kept = defect
    assert main(["resume-check", f"resume_check.compare=[{kept}/straight,{kept}/again]"]) == 0
    assert "same" in capsys.readouterr().out
    assert main(["resume-check", f"resume_check.compare=[{kept}/straight,{kept}/stopped]"]) == 1
    shown = capsys.readouterr()
    assert "DIFFERS" in shown.out
    assert shown.err.startswith("ResumeCheckError: ")
    assert "step 4: loss is " in shown.err


def test_a_run_is_not_compared_with_itself(defect, capsys):
    """Under whatever name: it would be the same always."""
    _, kept = defect
    assert main(["resume-check", f"resume_check.compare=[{kept}/again,{kept}/stopped/../again]"]) == 2
    assert "again twice: name a run that was interrupted and one that was not" in capsys.readouterr().err


def test_a_damaged_file_is_no_difference_and_no_sameness(defect, tmp_path, capsys):
    """Its manifest gives the digest of what it was."""
    _, kept = defect
    shutil.copytree(kept / "again", tmp_path / "other")
    folder = tmp_path / "other/checkpoints" / checkpoint_name(4)
    path = folder / read_manifest(folder).files[0].name
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    assert main(["resume-check", f"resume_check.compare=[{kept}/straight,{tmp_path}/other]"]) == 4
    assert re.search(rf"CheckpointError: {path}: its digest is \w+, the manifest says", capsys.readouterr().err)


def test_checkpoints_are_compared_where_the_rows_agree(defect):
    """The figures of the last step are those before its update: only the checkpoint tells."""
    _, kept = defect
    rows = (kept / "stopped" / METRICS).read_text()
    (kept / "stopped" / METRICS).write_text((kept / "straight" / METRICS).read_text())
    try:
        found = compare_runs(kept / "straight", kept / "stopped")
    finally:
        (kept / "stopped" / METRICS).write_text(rows)
    assert found.step is None
    assert found.difference == describe_tensors(kept / "straight", kept / "stopped")[0]
    manifest = read_manifest(kept / "straight/checkpoints" / checkpoint_name(4))
    assert (found.num_steps, found.num_tensors) == (4, sum(len(entry.tensors) for entry in manifest.files))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda manifest: {"optimizer_step": 3}, "optimizer_step is 4 in the first run and 3 in the second"),
        (lambda manifest: {"loss_scaler": {"cur_scale": 2.0}}, "loss_scaler is {} in the first run"),
        (lambda manifest: {"files": manifest.files[1:]}, "consist of different files"),
    ],
)
def test_what_a_checkpoint_holds_beside_tensors_is_compared(defect, tmp_path, change, words):
    _, kept = defect
    shutil.copytree(kept / "again", tmp_path / "other")
    folder = tmp_path / "other/checkpoints" / checkpoint_name(4)
    manifest = read_manifest(folder)
    write_manifest(folder, dataclasses.replace(manifest, **change(manifest)))
    assert words in compare_runs(kept / "straight", tmp_path / "other").difference


def row(step, **figures):
    return {"step": step, "loss": 5.0, "grad_norm": 1.0, "skipped_steps": 0, "tokens_per_second": step} | figures


def test_rows_are_compared_by_their_bits():
    rows = [row(1), row(2), row(3)]
    assert compare_rows(rows, [{**one, "tokens_per_second": 0.5} for one in rows]) == Comparison(3)
    assert compare_rows([row(1, grad_norm=math.nan)], [row(1, grad_norm=math.nan)]) == Comparison(1)
    last_bit = compare_rows(rows, [row(1), row(2, loss=math.nextafter(5.0, 6.0)), row(3, loss=7.0)])
    assert last_bit.step == 2
    assert "loss is 5.0 (0x1.4000000000000p+2)" in last_bit.difference
    assert "5.000000000000001 (0x1.4000000000001p+2)" in last_bit.difference
    assert compare_rows([row(1, loss=0.0)], [row(1, loss=-0.0)]).step == 1
    for name in ("grad_norm", "learning_rate", "tokens_seen", "skipped_steps"):
        assert f"step 3: {name} is" in compare_rows(rows, [row(1), row(2), row(3, **{name: 9})]).difference
    assert compare_rows(rows, rows[:2]).difference == "step 3 has no row in the second run"
    assert compare_rows(rows, rows[1:2], whole=False) == Comparison(1)
    assert compare_rows(rows, [row(4)], whole=False).difference == "step 4 has no row in the first run"
    assert "neither" in compare_rows([], []).difference


def test_checkpoints_of_other_steps_are_a_difference(tmp_path):
    for name, steps in (("a", 2), ("b", 1), ("c", 0)):
        for step in range(1, steps + 1):
            (tmp_path / name / "checkpoints" / checkpoint_name(step)).mkdir(parents=True)
            (tmp_path / name / "checkpoints" / checkpoint_name(step) / MANIFEST).write_text("{}")
        (tmp_path / name).mkdir(exist_ok=True)
        (tmp_path / name / METRICS).write_text(json.dumps(row(1)) + "\n")
    assert "is step_00000002 in" in compare_runs(tmp_path / "a", tmp_path / "b").difference
    assert "none in" in compare_runs(tmp_path / "a", tmp_path / "c").difference
    assert compare_runs(tmp_path / "c", tmp_path / "c").difference
    assert describe_tensors(tmp_path / "a", tmp_path / "c") == []


@pytest.fixture
def fakes(monkeypatch, tmp_path):
    """The command without ranks: `differs` tells which run directories differ, and where."""
    fake = SimpleNamespace(differs={}, went_on=Comparison(2), trained=[], skipped=0)

    def train(config, world_size):
        run_dir = Path(config.run_dir)
        run_dir.mkdir(exist_ok=True)
        (run_dir / METRICS).write_text(json.dumps(row(4, skipped_steps=fake.skipped)) + "\n")
        fake.trained.append((run_dir.name, config.trainer.stop_after))

    monkeypatch.setattr(command, "train", train)
    monkeypatch.setattr(command, "train_and_kill", lambda config, world_size, saved: saved + 1)
    monkeypatch.setattr(command, "compare_rows", lambda *args, **options: fake.went_on)
    monkeypatch.setattr(command, "compare_runs", lambda first, other: fake.differs.get(other.name, Comparison(4)))
    fake.check = lambda **options: command.check(
        tiny_config(tmp_path / "straight"), 1, ResumeCheckConfig(**options), tmp_path
    )
    return fake


AT_1, AT_3, TENSORS = (
    Comparison(4, difference="x", step=1),
    Comparison(4, difference="x", step=3),
    Comparison(4, 9, 9, "x"),
)


@pytest.mark.parametrize(
    ("differs", "went_on", "meaning", "ran_again"),
    [
        ({"stopped": AT_1}, Comparison(2), NOT_REPRODUCIBLE, False),  # before any interruption
        ({"stopped": AT_3}, Comparison(2), NOT_RESTORED, True),
        ({"stopped": TENSORS, "again": TENSORS}, Comparison(2), NOT_REPRODUCIBLE, True),
        ({"killed": AT_3}, Comparison(2), NOT_RESTORED, True),
        ({}, AT_3, NOT_UNTOUCHED, True),
        ({"again": AT_3}, AT_3, NOT_REPRODUCIBLE, True),
    ],
)
def test_what_a_difference_means(fakes, differs, went_on, meaning, ran_again):
    fakes.differs, fakes.went_on = differs, went_on
    with pytest.raises(ResumeCheckError) as raised:
        fakes.check()
    assert str(raised.value).endswith(f"\n{meaning}")
    assert (("again", 4) in fakes.trained) == ran_again


def test_the_kill_can_be_left_out_and_the_steps_be_more(fakes):
    fakes.check(kill=False, steps=3)
    assert fakes.trained == [("straight", None), ("stopped", 3), ("stopped", 6)]
    fakes.check()
    assert fakes.trained[3:] == [("straight", None), ("stopped", 2), ("stopped", 4), ("killed", 4)]


def test_steps_that_were_all_skipped_prove_nothing(fakes, warnings):
    fakes.check(kill=False)
    assert not warnings
    fakes.skipped = 4
    fakes.check(kill=False)
    assert "all 4 steps were skipped" in warnings[0]


def fake_rank(config, place):
    """As much of a training as the killer looks at: it saves step 2, logs step 3, and would never end."""
    run_dir = Path(config.run_dir)
    (run_dir / f"pid_{place.rank}").parent.mkdir(parents=True, exist_ok=True)
    (run_dir / f"pid_{place.rank}").write_text(str(os.getpid()))
    if place.rank == 1:
        while not (run_dir / "pid_0").exists():
            time.sleep(0.005)
        (run_dir / METRICS).write_text(json.dumps(row(3, step_seconds=0.01)) + "\n")
        time.sleep(0.05)  # logged, and not saved yet
        (run_dir / "checkpoints" / checkpoint_name(2)).mkdir(parents=True)
        (run_dir / "checkpoints" / checkpoint_name(2) / MANIFEST).write_text("{}")
    time.sleep(60)


def gone(run_dir: Path) -> bool:
    pids = [int(path.read_text()) for path in run_dir.glob("pid_*")]
    return len(pids) == 2 and not any(Path(f"/proc/{pid}").exists() for pid in pids)


def test_the_kill_waits_for_the_save_and_leaves_no_process(monkeypatch, tmp_path):
    monkeypatch.setattr("megalite.train.train", fake_rank)
    config = tiny_config(tmp_path / "killed")
    assert train_and_kill(config, 2, saved=2) == 3
    assert gone(tmp_path / "killed")
    assert "ended by signal 9" in runs.log_file(config).read_text()


def test_a_run_that_ends_before_the_kill_is_tried_again_and_then_said(monkeypatch, tmp_path):
    monkeypatch.setattr("megalite.train.train", lambda config, place: Path(config.run_dir).mkdir())
    with pytest.raises(ResumeCheckError, match=r"steps are too short. Raise resume_check\.steps"):
        train_and_kill(tiny_config(tmp_path / "killed"), 1, saved=2)


def test_ranks_that_fail_end_the_check_with_their_words_and_their_code(monkeypatch, store, tmp_path):
    def fail(config, place):
        raise DataError("the store has holes")

    monkeypatch.setattr("megalite.train.train", fail)
    with pytest.raises(ResumeCheckError, match="the store has holes") as raised:
        command.resume_check([f"resume_check.directory={tmp_path}", f"data.train={store}", *MODEL])
    assert raised.value.exit_code == DataError.exit_code
    (kept,) = tmp_path.iterdir()
    assert str(raised.value).endswith(str(kept))
    monkeypatch.setattr("megalite.train.train", lambda config, place: sys.exit(143))
    with pytest.raises(SystemExit) as stopped:
        command.resume_check([f"resume_check.directory={tmp_path}", f"data.train={store}", *MODEL])
    assert stopped.value.code == 143
    assert list(tmp_path.iterdir()) == [kept]


def test_a_terminated_check_ends_its_ranks_and_removes_its_folder(monkeypatch, store, tmp_path):
    scratch, mirror = tmp_path / "scratch", tmp_path / "mirror"
    scratch.mkdir()

    def rank(config, place):
        mirror.mkdir(exist_ok=True)
        (mirror / f"pid_{place.rank}").write_text(str(os.getpid()))
        time.sleep(60)

    monkeypatch.setattr("megalite.train.train", rank)
    arguments = [f"resume_check.directory={scratch}", f"data.train={store}", *MODEL, *TENSOR]
    process = multiprocessing.get_context("fork").Process(target=lambda: command.resume_check(arguments))
    process.start()
    while len([path for path in mirror.glob("pid_*") if path.read_text()]) < 2:
        assert process.is_alive()
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGTERM)
    process.join(30)
    assert process.exitcode == 143
    assert gone(mirror)
    assert list(scratch.iterdir()) == []


def test_only_what_must_be_is_replaced(store, tmp_path, warnings):
    overrides = [
        f"data.train={store}", f"data.validation={store}", "checkpoint.resume=elsewhere", "checkpoint.keep_best=true",
        "checkpoint.keep_every=3", "checkpoint.save_every=9", "checkpoint.ephemeral_every=1", "trainer.eval_every=1",
        "checkpoint.asynchronous=true", "logging.wandb.mode=online", "logging.tensorboard=false", "run_dir=mine",
        *MODEL, *TENSOR, "data.prefetch=3", "trainer.stop_after=7",
    ]  # fmt: skip
    config, world_size = prepare_check(overrides, 2, tmp_path)
    assert world_size == 2
    assert (config.run_dir, config.data.validation, config.logging) == (str(tmp_path / "straight"), (), LoggingConfig())
    trainer, checkpoint = config.trainer, config.checkpoint
    assert (trainer.steps, trainer.stop_after, trainer.log_every, trainer.eval_every) == (50, 4, 1, 0)
    assert (checkpoint.save_every, checkpoint.ephemeral_every, checkpoint.keep_every) == (0, 0, 0)
    assert (checkpoint.resume, checkpoint.keep_best, checkpoint.asynchronous) == ("auto", False, True)
    assert (config.model.dropout, config.data.prefetch, config.model.vocab_size) == (0.1, 3, 300)
    assert warnings == ["checkpoint.resume=elsewhere has no effect here: runs start from new weights"]


@pytest.mark.parametrize(("free", "said"), [(1_000_000, 1), (10_000_000, 0)])
def test_a_small_disk_is_warned_of(monkeypatch, warnings, tmp_path, free, said):
    """About 60,000 parameters in three checkpoints of 12 bytes each."""
    monkeypatch.setattr(command.shutil, "disk_usage", lambda folder: SimpleNamespace(free=free))
    command._warn_of_a_small_disk(tiny_config(tmp_path, model={"hidden_size": 32, "vocab_size": 300}), tmp_path)
    assert len(warnings) == said


# Arguments, exit code, and words of the message.
BAD = {
    "own key": (["resume_check.stpes=3"], 2, ["unknown key resume_check.stpes", "Did you mean resume_check.steps?"]),
    "own group": (["resume_check=3"], 2, ["resume_check: expected a group of keys, found 3"]),
    "one step": (["resume_check.steps=1"], 2, ["resume_check.steps: found 1, allowed: 2 or more"]),
    "no number": (["resume_check.kill=maybe"], 2, ["resume_check.kill: expected true or false, found 'maybe'"]),
    "too many steps": (["data.train=store", "trainer.steps=5", "resume_check.steps=3"], 2, ["trainer.steps=5"]),
    "no folder": (["resume_check.directory=nowhere"], 2, ["resume_check.directory: there is no folder nowhere"]),
    "one run": (["resume_check.compare=[a]"], 2, ["resume_check.compare: found ['a'], name two run directories"]),
    "no run": (["resume_check.compare=[a,b]"], 2, ["resume_check.compare: a holds no metrics.jsonl"]),
    "both": (["resume_check.compare=[a,b]", "seed=3"], 2, ["resume_check.compare trains nothing: leave out seed=3"]),
    "no store": ([], 2, ["data.train is required"]),
    "store elsewhere": (["data.train=nowhere"], 3, ["data.train: nowhere is not a token store"]),
    "training's key": (["trainer.stpes=3"], 2, ["unknown key trainer.stpes"]),
    "training's value": (["data.train=store", "optimizer.lr=0"], 2, ["optimizer.lr: found 0"]),
}


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory):
    """Every bad command in one fresh process, since it must not have imported torch."""
    folder = tmp_path_factory.mktemp("bad")
    commands = {name: ["resume-check", *arguments] for name, (arguments, _, _) in BAD.items()}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        cwd=folder,
        env={**os.environ, "TMPDIR": str(folder)},
        input=json.dumps(commands),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert list(folder.iterdir()) == [], "nothing is left behind"
    return json.loads(done.stdout)


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_message_before_torch_is_imported(outcomes, name):
    _, expected, words = BAD[name]
    code, out, err, imported = outcomes[name]
    assert (code, out, imported) == (expected, "", [])
    assert err.startswith({2: "ConfigError: ", 3: "DataError: "}[expected])
    assert err.count("\n") == 1
    for word in words:
        assert word in err


def test_another_launcher_is_refused_with_the_way_out(monkeypatch, store):
    for name, value in {
        "RANK": "0",
        "LOCAL_RANK": "0",
        "WORLD_SIZE": "2",
        "MASTER_ADDR": "a",
        "MASTER_PORT": "1",
    }.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match=r"starts its own ranks.*resume_check\.compare"):
        command.resume_check([f"data.train={store}"])


def test_help_lists_its_own_keys_before_those_of_training(capsys):
    assert main(["resume-check", "--help"]) == 0
    own, _, rest = capsys.readouterr().out.partition("keys (defaults; conf/train.yaml)")
    for line in (
        "resume_check.steps=2  (int)  # ",
        "resume_check.kill=true  (bool)  # ",
        "resume_check.directory=null  ",
        "resume_check.compare=[]  (list of text)",
        "Your run_dir is\nneither read nor written",
    ):
        assert line in own, line
    assert "trainer.steps=100" in rest
