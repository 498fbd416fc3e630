"""The same training under every launcher: our own four, and torchrun and deepspeed as people call them.

srun and Slurm are in tests/cluster.
"""

import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from megalite.metrics.jsonl import read_metrics
from tests.runs import write_store

BIN = Path(sys.executable).parent
MEGALITE = [str(BIN / "megalite"), "train", "launch.nproc_per_node=2"]
DEEPSPEED = [str(BIN / "deepspeed"), "--num_gpus=2"]
LAUNCHERS = {
    "local": MEGALITE,
    "torchrun": [*MEGALITE, "launch=torchrun"],
    "deepspeed": [*MEGALITE, "launch=deepspeed"],
    "torchrun itself": [str(BIN / "torchrun"), "--standalone", "--nproc-per-node=2", "-m", "megalite.train"],
    "deepspeed itself": [*DEEPSPEED, "--master_port=29600", "--module", "megalite.train"],
    "deepspeed itself, no local rank": [
        *DEEPSPEED, "--master_port=29601", "--no_local_rank", "--module", "megalite.train",
    ],
}  # fmt: skip
QUICK = ("torchrun", "deepspeed itself")  # the others are slow for want of cores, and take the same ways
OTHERS = [
    name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in LAUNCHERS if name != "local"
]


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Callable[[str], Path]:
    """Ten steps at tensor 2 under a launcher; gives the run directory."""
    folder = tmp_path_factory.mktemp("launchers")
    store = write_store(folder / "words")
    left_out = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
    environment = {key: value for key, value in os.environ.items() if key not in left_out}
    environment |= {"OMP_NUM_THREADS": "1", "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}", "DS_ACCELERATOR": "cpu"}

    def run_once(name: str) -> Path:
        run_dir = folder / "runs" / name.replace(" ", "_")
        if not run_dir.exists():
            keys = [
                "run_name=same", f"run_dir={run_dir}", f"data.train={store}", "data.sequence_length=32",
                "model.num_layers=2", "model.hidden_size=32", "parallel.tensor=2", "engine.precision=fp32",
                "trainer.steps=10", "trainer.log_every=1", "trainer.global_batch_size=4", "trainer.micro_batch_size=2",
            ]  # fmt: skip
            done = subprocess.run(
                [*LAUNCHERS[name], *keys], env=environment, cwd=folder, capture_output=True, text=True, timeout=300,
                check=False,
            )  # fmt: skip
            assert done.returncode == 0, f"{name}: {done.stdout[-2000:]}\n{done.stderr[:4000]}"
        return run_dir

    return run_once


@pytest.mark.parametrize("launcher", ["torchrun", "deepspeed"])
def test_ranks_of_one_host_listen_on_the_loopback_alone(launcher, tmp_path):
    """torchrun's own stores, and torch's, listen on all addresses."""
    run_dir = tmp_path / "run"
    keys = [
        f"run_dir={run_dir}", f"data.train={write_store(tmp_path / 'words')}", "data.sequence_length=32",
        "model.num_layers=1", "model.hidden_size=32", "trainer.steps=1000000", "trainer.log_every=1",
    ]  # fmt: skip
    with open(tmp_path / "said.txt", "wb") as said:
        process = subprocess.Popen([*LAUNCHERS[launcher], *keys], cwd=tmp_path, stdout=said, stderr=said)
    try:
        deadline = time.monotonic() + 120
        while not (run_dir / "metrics.jsonl").exists():
            assert process.poll() is None, (tmp_path / "said.txt").read_text()
            assert time.monotonic() < deadline
            time.sleep(0.2)
        children = psutil.Process(process.pid).children(recursive=True)
        sockets = [socket for child in children for socket in child.net_connections(kind="inet")]
        listening = {socket.laddr.ip for socket in sockets if socket.status == psutil.CONN_LISTEN}
        assert listening == {"127.0.0.1"}
    finally:
        process.terminate()
        assert process.wait(60) == 75


def losses(run_dir: Path) -> list[float]:
    return [row["loss"] for row in read_metrics(run_dir / "metrics.jsonl")]


def files(run_dir: Path) -> set[str]:
    return {str(path.relative_to(run_dir)) for path in run_dir.rglob("*") if path.is_file()}


@pytest.mark.parametrize("launcher", OTHERS)
def test_losses_and_files_are_those_of_local_ranks(launcher, run):
    local, other = run("local"), run(launcher)
    assert losses(other) == losses(local)
    assert len(losses(local)) == 10
    assert files(other) == files(local)
    assert "checkpoints/step_00000010/manifest.json" in files(local)
    beside = {path.name for path in local.parent.parent.iterdir()}
    assert beside == {"words", "runs"}, "no launcher leaves anything beside the run directories"
