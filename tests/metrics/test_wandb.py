"""A wandb offline run read back, resumed, killed, and searched for secrets (bar 13 of issue 2)."""

import json
import logging
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from megalite.config.schema import LoggingConfig, WandbConfig
from megalite.errors import ConfigError
from megalite.metrics.jsonl import read_metrics
from megalite.metrics.sinks import build_sinks
from megalite.metrics.wandb import _run_id, build_wandb_sink
from megalite.metrics.wandb_file import read_wandb_file

CANARIES = {
    "WANDB_API_KEY": "CANARYwandb0123456789012345678901234567890123456789",
    "HF_TOKEN": "hf_CANARYhf",
    "AWS_SECRET_ACCESS_KEY": "CANARYaws",
    "WANDB_BASE_URL": "http://user:CANARYurl@127.0.0.1:9",  # port 9: nothing listens
}

SESSION = """
import os, signal, sys
from pathlib import Path
from megalite.config.schema import LoggingConfig, WandbConfig
from megalite.log import setup_logging
from megalite.metrics import wandb
from megalite.metrics.sinks import build_sinks

run_dir, mode, resume, stop, end = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), int(sys.argv[4]), sys.argv[5]
setup_logging(0, run_dir / "rank_0.log")
config = {"trainer": {"steps": 40}, "password": "CANARYconfig", "data": {"train": "https://me:CANARYdata@host/store"}}
build_wandb_sink = wandb.build_wandb_sink
wandb.build_wandb_sink = lambda *arguments: build_wandb_sink(*arguments, init_seconds=2.0)
sinks = build_sinks(LoggingConfig(wandb=WandbConfig(mode=mode)), run_dir, "a run", resume, config)
for step in range(resume + 1, stop + 1):
    row = {"loss": 1 / step, "learning_rate": 1e-3, "grad_norm": float("nan") if step == 2 else 1.0, "mfu": None}
    row |= {"eval/tang/bits_per_byte": 3 / step} if step % 10 == 0 else {}
    for sink in sinks:
        sink.log(step, row)
if end == "kill":
    os.kill(os.getpid(), signal.SIGKILL)
for sink in sinks:
    sink.close()
"""


def session(run_dir: Path, mode: str, resume: int, stop: int, end: str = "finish") -> str:
    """One session of a run in a process of its own, in an empty working directory; returns what it printed."""
    folder = run_dir.parent / "cwd"
    folder.mkdir(exist_ok=True)
    run_dir.mkdir(exist_ok=True)
    environment = {key: value for key, value in os.environ.items() if not key.startswith("WANDB")}
    environment |= CANARIES | {"HOME": str(run_dir.parent / "home")}
    # The command line holds a canary too: wandb would put it into its metadata.
    arguments = [sys.executable, "-c", SESSION, str(run_dir), mode, str(resume), str(stop), end, "--key=CANARYarg"]
    done = subprocess.run(arguments, env=environment, cwd=folder, capture_output=True, text=True, timeout=120)
    assert done.returncode == (-signal.SIGKILL if end == "kill" else 0), done.stderr
    assert not list(folder.iterdir()), "something was written beside the run directory"
    return done.stdout + done.stderr


def history(run_dir: Path) -> list[dict]:
    """All rows of all sessions, in the order in which `wandb sync` uploads them."""
    files = sorted((run_dir / "wandb").glob("offline-run-*/*.wandb"))
    assert len({file.name for file in files}) <= 1, "one run directory is one wandb run"
    return [row for file in files for row in read_wandb_file(file)]


def assert_rows_equal(run_dir: Path, steps: int) -> None:
    """wandb holds each step of metrics.jsonl once, with the same figures."""
    rows = read_metrics(run_dir / "metrics.jsonl")
    logged = history(run_dir)
    assert [row["step"] for row in rows] == [row["_step"] for row in logged] == list(range(1, steps + 1))
    for row, wandb_row in zip(rows, logged, strict=True):
        assert wandb_row["train/loss"] == row["loss"] == 1 / row["step"]
        assert wandb_row["optim/lr"] == row["learning_rate"]
        assert str(wandb_row["optim/grad_norm"]).lower() == str(row["grad_norm"]) or row["grad_norm"] == 1.0
        assert wandb_row.get("eval/tang/bits_per_byte") == row.get("eval/tang/bits_per_byte")


def assert_no_canary(run_dir: Path, output: str) -> None:
    assert "CANARY" not in output
    files = [path for path in run_dir.parent.rglob("*") if path.is_file()]
    assert any(path.suffix == ".wandb" for path in files)
    for path in files:
        assert b"CANARY" not in path.read_bytes(), path


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    run_dir = tmp_path_factory.mktemp("finished") / "run"
    return run_dir, session(run_dir, "offline", 0, 30)


def test_every_logged_row_is_in_the_offline_file(finished):
    assert_rows_equal(finished[0], 30)


def test_no_secret_is_in_any_file_or_output(finished):
    assert_no_canary(*finished)


def test_the_config_is_logged_redacted(finished):
    (file,) = (finished[0] / "wandb").glob("offline-run-*/*.wandb")
    content = file.read_bytes()
    assert b"https://***@host/store" in content
    assert b'"steps":40' in content.replace(b" ", b"")


def test_a_killed_and_resumed_run_has_every_step_once(tmp_path):
    run_dir = tmp_path / "run"
    session(run_dir, "offline", 0, 25, "kill")  # the checkpoint is at 20
    session(run_dir, "offline", 20, 32, "finish")
    session(run_dir, "offline", 30, 40, "finish")
    logged = [row["_step"] for row in history(run_dir)]
    assert sorted(logged) == list(range(1, 41))
    assert_rows_equal(run_dir, 40)


def test_without_a_network_an_online_run_is_logged_offline(tmp_path):
    run_dir = tmp_path / "run"
    output = session(run_dir, "online", 0, 12)
    assert "logging offline" in output
    assert_rows_equal(run_dir, 12)
    assert_no_canary(run_dir, output)


def test_a_new_run_gets_a_new_id_and_a_resumed_one_keeps_it(tmp_path):
    path = tmp_path / "id"
    first = _run_id(path, new=True)
    assert _run_id(path, new=False) == first
    assert _run_id(path, new=True) != first
    path.write_text("../../etc\n")
    assert len(_run_id(path, new=False)) == 8


def test_disabled_means_no_sink_and_no_import(tmp_path):
    code = f"""
import sys
from pathlib import Path
from megalite.config.schema import LoggingConfig
from megalite.metrics.sinks import build_sinks
sinks = build_sinks(LoggingConfig(), Path({str(tmp_path)!r}), "run", 0, {{}})
print(len(sinks), "wandb" in sys.modules, "torch.utils.tensorboard" in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.split() == ["1", "False", "False"]


def test_a_missing_library_is_a_config_error(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ConfigError, match=r"logging\.wandb\.mode=offline needs wandb"):
        build_sinks(LoggingConfig(wandb=WandbConfig(mode="offline")), tmp_path, "run", 0, {})
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(ConfigError, match=r"pip install megalite\[tensorboard\]"):
        build_sinks(LoggingConfig(tensorboard=True), tmp_path, "run", 0, {})


def test_a_wandb_that_cannot_start_is_a_warning(tmp_path, monkeypatch, caplog):
    import wandb

    def fail(**arguments):
        raise RuntimeError("https://user:canary@host refuses")

    monkeypatch.setattr(wandb, "init", fail)
    with caplog.at_level(logging.WARNING):
        assert build_wandb_sink(WandbConfig(mode="online"), tmp_path, "run", 0, {}) is None
    assert [record.getMessage().rsplit(": ", 1)[1] for record in caplog.records] == [
        "logging offline; `wandb sync` uploads it later",
        "going on without wandb",
    ]
    assert "canary" not in caplog.text


def test_the_reader_survives_a_file_cut_anywhere(finished, tmp_path):
    (file,) = (finished[0] / "wandb").glob("offline-run-*/*.wandb")
    content = file.read_bytes()
    whole = json.dumps(read_wandb_file(file))
    for cut in range(0, len(content), 97):
        (tmp_path / "cut.wandb").write_bytes(content[:cut])
        assert whole.startswith(json.dumps(read_wandb_file(tmp_path / "cut.wandb"))[:-1].rstrip("["))
    damaged = bytearray(content)
    damaged[len(content) // 2] ^= 1
    (tmp_path / "damaged.wandb").write_bytes(damaged)
    assert len(read_wandb_file(tmp_path / "damaged.wandb")) < 30
