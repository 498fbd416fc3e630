"""The same training under every launcher: `megalite train`, torchrun, and deepspeed with and without its local rank."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from megalite.metrics.jsonl import read_metrics
from tests.runs import write_store

BIN = Path(sys.executable).parent
LAUNCHERS = {
    "megalite": [str(BIN / "megalite"), "train", "launch.nproc_per_node=2"],
    "torchrun": [str(BIN / "torchrun"), "--standalone", "--nproc-per-node=2", "-m", "megalite.train"],
    "deepspeed": [str(BIN / "deepspeed"), "--num_gpus=2", "--module", "megalite.train"],
    "deepspeed_no_local_rank": [
        str(BIN / "deepspeed"), "--num_gpus=2", "--no_local_rank", "--module", "megalite.train",
    ],
}  # fmt: skip


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> dict[str, Path]:
    """Ten steps at tensor 2 under each launcher; returns the run directories."""
    folder = tmp_path_factory.mktemp("launchers")
    store = write_store(folder / "words")
    environment = {key: value for key, value in os.environ.items() if key not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    environment |= {"OMP_NUM_THREADS": "1", "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}", "DS_ACCELERATOR": "cpu"}
    run_dirs = {}
    for number, (name, command) in enumerate(LAUNCHERS.items()):
        run_dirs[name] = folder / f"under_{name}"  # "megalite" here would shadow the package for `python -m`
        if "deepspeed" in name:
            command = [command[0], f"--master_port={29600 + number}", *command[1:]]
        keys = [
            "run_name=same", f"run_dir={run_dirs[name]}", f"data.train={store}", "data.sequence_length=32",
            "model.num_layers=2", "model.hidden_size=32", "parallel.tensor=2", "engine.precision=fp32",
            "trainer.steps=10", "trainer.log_every=1", "trainer.global_batch_size=4", "trainer.micro_batch_size=2",
        ]  # fmt: skip
        done = subprocess.run(
            [*command, *keys], env=environment, cwd=folder, capture_output=True, text=True, timeout=300, check=False
        )
        assert done.returncode == 0, f"{name}: {done.stdout[-2000:]}\n{done.stderr[:4000]}"
    return run_dirs


def test_losses_are_identical(runs):
    losses = {name: [row["loss"] for row in read_metrics(run_dir / "metrics.jsonl")] for name, run_dir in runs.items()}
    assert len(losses["megalite"]) == 10
    assert all(values == losses["megalite"] for values in losses.values()), losses


def test_run_directories_hold_the_same_files(runs):
    files = {
        name: {str(path.relative_to(run_dir)) for path in run_dir.rglob("*") if path.is_file()}
        for name, run_dir in runs.items()
    }
    assert "checkpoints/step_00000010/manifest.json" in files["megalite"]
    assert all(names == files["megalite"] for names in files.values()), files


def test_no_launcher_leaves_anything_beside_the_run_directories(runs):
    folder = next(iter(runs.values())).parent
    assert {path.name for path in folder.iterdir()} == {"words"} | {path.name for path in runs.values()}
