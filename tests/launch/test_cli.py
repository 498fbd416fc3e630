import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

import megalite
from megalite.config.compose import compose_train, config_values
from megalite.data_tools.cleaning import STEPS
from megalite.launch.cli import COMMANDS, main
from tests.stores import make_store

# What a person may get wrong: arguments after `megalite train`, exit code, and words that the message must have.
BAD = {
    "no store": ([], 2, ["data.train is required", "data.train=..."]),
    "unknown key": (
        ["trainer.stpes=3"],
        2,
        ["unknown key trainer.stpes", "Did you mean trainer.steps?", "global_batch"],
    ),
    "unknown group": (["modle=tiny"], 2, ["unknown key modle", "Did you mean model?"]),
    "unknown option": (["model=gpt2_125m"], 2, ["model: found 'gpt2_125m'", "gpt2_124m", "llama_8b"]),
    "added key": (["+trainer.stpes=3"], 2, ["+trainer.stpes=3", "neither added"]),
    "deleted key": (["~trainer"], 2, ["~trainer", "deleted"]),
    "sweep": (["seed=1,2"], 2, ["seed=1,2", "sweeps"]),
    "wrong type": (["trainer.steps=many"], 2, ["trainer.steps: expected a whole number, found 'many'"]),
    "wrong choice": (["engine.zero_stage=4"], 2, ["engine.zero_stage: found 4, allowed: 0, 1, 2, 3"]),
    "bad syntax": (["trainer.steps=[1"], 2, ["trainer.steps=[1 cannot be read"]),
    "heads and width": (["model.num_attention_heads=3"], 2, ["model.num_attention_heads: found 3", "1, 2, 4, 8"]),
    "heads and tensor": (
        ["parallel.tensor=8", "launch.nproc_per_node=8", "trainer.micro_batch_size=4"],
        2,
        ["parallel.tensor: found 8, must divide model.num_attention_heads=4; allowed: 1, 2, 4"],
    ),
    "processes and tensor": (
        ["parallel=tp4", "launch.nproc_per_node=2"],
        2,
        ["parallel.tensor: found 4", "number of processes, which is 2", "allowed: 1, 2"],
    ),
    "vocabulary and tensor": (  # known only once the store has been opened
        [
            "parallel.tensor=3",
            "launch.nproc_per_node=3",
            "model.hidden_size=96",
            "model.num_attention_heads=3",
            "trainer.global_batch_size=33",
            "trainer.micro_batch_size=33",
            "data.sequence_length=8",
        ],
        2,
        ["parallel.tensor: found 3, must divide the padded vocabulary of 256 rows"],
    ),
    "batch": (
        ["trainer.global_batch_size=33", "launch.nproc_per_node=2", "trainer.micro_batch_size=8"],
        2,
        ["trainer.global_batch_size: found 33", "8 x 2 = 16", "nearest: 32 or 48"],
    ),
    "sequence and positions": (
        ["data.sequence_length=512"],
        2,
        ["data.sequence_length: found 512, must be at most model.max_sequence_length=256"],
    ),
    "vocabulary and store": (["model.vocab_size=100"], 2, ["model.vocab_size: found 100", "vocabulary of 200"]),
    "half precision": (
        ["engine=zero0", "engine.precision=bf16"],
        2,
        ["engine.precision: found bf16", "engine.zero_stage"],
    ),
    "compile": (["engine=zero3", "engine.compile=true"], 2, ["engine.compile", "engine.zero_stage=3", "0, 1, 2"]),
    "DeepSpeed's own key": (
        ["engine.ds_overrides.optimizer={type: Adam}"],
        2,
        ["engine.ds_overrides.optimizer", "allowed"],
    ),
    "run name": (["run_name=a/b"], 2, ["run_name: found 'a/b', allowed: letters"]),
    "a circle": (["run_dir=${run_dir}"], 2, ["run_dir: Recursive interpolation"]),
    "two at once": (["seed=-1", "optimizer.lr=0"], 2, ["seed: found -1", "optimizer.lr: found 0"]),
    "store elsewhere": (["data.train=nowhere"], 3, ["data.train: nowhere is not a token store", "megalite data build"]),
    "damaged store": (
        ["data.train=cut"],
        3,
        ["data.train", "tokens_00000.bin", "bytes, its manifest says", "build it again"],
    ),
    "short store": (["data.train=short"], 2, ["data.sequence_length: found 256", "holds only 10 tokens", "at most 9"]),
    "checkpoint elsewhere": (["checkpoint.resume=nowhere"], 4, ["nowhere is not a checkpoint"]),
}

PROGRAM = """
import contextlib, io, json, sys
from megalite.launch.cli import main
results = {}
for name, arguments in json.load(sys.stdin).items():
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main(arguments)
    results[name] = [code, out.getvalue(), err.getvalue(), [m for m in ("torch", "deepspeed") if m in sys.modules]]
json.dump(results, sys.stdout)
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cli")
    make_store(folder / "store")
    make_store(folder / "short", documents=1, length=9)
    cut = make_store(folder / "cut") / "tokens_00000.bin"
    cut.write_bytes(cut.read_bytes()[:-7])
    return folder


@pytest.fixture(scope="module")
def outcomes(folder):
    """Every bad command in one fresh process, since it must not have imported torch."""
    before = sorted(folder.rglob("*"))
    # The defaults first, so that a case may change them.
    commands = {
        name: ["train", *([] if name == "no store" else ["data.train=store"]), *arguments]
        for name, (arguments, _, _) in BAD.items()
    }
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], cwd=folder, input=json.dumps(commands), capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert sorted(folder.rglob("*")) == before, "no run directory is left behind"
    return json.loads(done.stdout)


@pytest.mark.parametrize("name", BAD)
def test_a_bad_configuration_is_one_message_and_its_exit_code(outcomes, name):
    _, expected, words = BAD[name]
    code, out, err, imported = outcomes[name]
    assert (code, out, imported) == (expected, "", [])
    assert err.startswith({2: "ConfigError: ", 3: "DataError: ", 4: "CheckpointError: "}[expected])
    assert "Traceback" not in err
    assert err.count("\n") == (2 if name == "two at once" else 1)
    for word in words:
        assert word in err


def test_the_real_command_says_it_within_three_seconds(folder):
    command = Path(sys.executable).with_name("megalite")
    started = time.perf_counter()
    process = subprocess.Popen(
        [command, "train", "data.train=store", "trainer.steps=0"],
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    out, err = process.stdout.read(), process.stderr.read()
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    # Processor time where other work keeps the machine busy: what the command itself takes.
    seconds = min(time.perf_counter() - started, usage.ru_utime + usage.ru_stime)
    process.stdout.close()
    process.stderr.close()
    assert (process.returncode, out, err) == (2, b"", b"ConfigError: trainer.steps: found 0, must be at least 1\n")
    assert seconds < 3


def test_configuration_is_printed_and_nothing_else_happens(folder, monkeypatch, capsys):
    monkeypatch.chdir(folder)
    arguments = ["data.train=nowhere", "model=gpt2_124m", "trainer.steps=7"]
    assert main(["train", "--cfg", *arguments]) == 0
    printed = yaml.safe_load(capsys.readouterr().out)
    assert printed == config_values(compose_train(arguments))
    assert not (folder / "outputs").exists()
    assert main(["train", "--cfg", *arguments, "seed=-1"]) == 2
    assert capsys.readouterr().err.startswith("ConfigError: seed: found -1")


@pytest.mark.parametrize("name", COMMANDS)
@pytest.mark.parametrize("flag", ["--help", "-h"])
def test_help_of_a_command(capsys, name, flag):
    assert main([*name.split(), "x=1", flag]) == 0
    shown = capsys.readouterr().out
    assert shown.startswith(f"megalite {name}: {COMMANDS[name].summary}\n")
    assert COMMANDS[name].example in shown
    assert re.search(r"^keys.*:\n  \w+", shown, re.MULTILINE)


def test_help_of_train_lists_the_groups(capsys):
    assert main(["train", "--help"]) == 0
    shown = capsys.readouterr().out
    for line in ("model=", "engine=zero0|zero1|", "parallel=", "experiment=", "schedule=constant|cosine|", "--cfg "):
        assert re.search(rf"^ *{re.escape(line)}", shown, re.MULTILINE), line


@pytest.mark.parametrize("name", [name for name in COMMANDS if COMMANDS[name].config])
def test_the_example_of_a_command_has_keys_that_exist(name):
    keys = [word.split("=")[0] for word in COMMANDS[name].example.split() if "=" in word]
    from megalite.config.compose import _key_hint

    for key in keys:
        _key_hint(COMMANDS[name].config[0], key)


@pytest.mark.parametrize("arguments", [[], ["--help"], ["-h"], ["help"], ["data"], ["data", "--help"]])
def test_overview(capsys, arguments):
    assert main(arguments) == (2 if arguments == ["data"] else 0)
    captured = capsys.readouterr()
    shown = captured.err if arguments == ["data"] else captured.out
    for name, command in COMMANDS.items():
        assert re.search(rf"^  {name} +{re.escape(command.summary)}$", shown, re.MULTILINE)


@pytest.mark.parametrize("arguments", [["trian"], ["data", "biuld", "input=x"], ["--trace"]])
def test_unknown_command(capsys, arguments):
    assert main(arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert f"there is no command {' '.join(arguments[:2])!r}" in captured.err
    assert "usage: megalite COMMAND" in captured.err


def test_version(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"megalite {megalite.__version__}\n"


@pytest.mark.parametrize(
    ("arguments", "reader", "shown"), [("train --help", "head -1", "megalite train: "), ("--help", "true", "")]
)
def test_a_reader_that_goes_away_is_no_error(folder, arguments, reader, shown):
    command = f"{sys.executable} -m megalite.launch.cli {arguments} | {reader}"
    env = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    done = subprocess.run(
        ["bash", "-o", "pipefail", "-c", command], cwd=folder, env=env, capture_output=True, text=True
    )
    assert done.returncode in ((141,) if reader == "true" else (0, 141))  # head may read everything at once
    assert (done.stderr, done.stdout[: len(shown)]) == ("", shown)


@pytest.mark.parametrize("command", ["generate", "eval", "report"])
def test_a_directory_that_is_no_run(capsys, tmp_path, command):
    assert main([command, f"run_dir={tmp_path}"]) == 2
    assert f"{tmp_path}/config.yaml does not exist: is run_dir" in capsys.readouterr().err


def test_a_bug_keeps_its_traceback(monkeypatch):
    monkeypatch.setattr("megalite.launch.training.compose_train", lambda arguments: 1 // 0)
    with pytest.raises(ZeroDivisionError):
        main(["train"])


def test_an_interrupt_has_the_code_that_shells_expect(monkeypatch):
    def interrupted(arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr("megalite.launch.training.compose_train", interrupted)
    assert main(["train"]) == 130


def test_help_lists_the_steps_of_cleaning(capsys):
    assert main(["data", "build", "--help"]) == 0
    out = capsys.readouterr().out
    assert "\n  code_quality: Drops files" in out
    assert "\n      max_mean_line_length=100.0, max_line_length=1000, min_alphanumeric=0.25\n" in out
    assert "keep=???" in out
    assert all(f"\n  {name}: " in out for name in STEPS)
