"""The recipe of `make quickstart`, trained in full: minutes a seed, so for `make test-full` only."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from megalite.metrics.jsonl import read_metrics

ROOT = Path(__file__).parent.parent
MEGALITE = Path(sys.executable).with_name("megalite")


def recipe(*targets: str) -> list[str]:
    """The `megalite` commands that make would run for the targets."""
    dry = subprocess.run(["make", "--dry-run", "--always-make", *targets], cwd=ROOT, capture_output=True, text=True)
    lines = dry.stdout.replace("\\\n", " ").splitlines()
    return [line.split("bin/megalite ", 1)[1] for line in lines if re.match(r"\.venv/bin/megalite ", line)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("quickstart")
    (folder / "data_tools").symlink_to(ROOT / "data_tools")
    for command in recipe("quickstart")[:2]:
        subprocess.run(f"{MEGALITE} {command}", shell=True, cwd=folder, check=True, timeout=300)  # noqa: S602
    return folder


def test_the_quickstart_is_tokenizer_store_training_report():
    verbs = [" ".join(command.split()[:2]) for command in recipe("quickstart")]
    assert verbs[:4] == [
        "tokenizer train",
        "data build",
        "train experiment=quickstart",
        "report run_dir=outputs/quickstart",
    ]


@pytest.mark.slow
@pytest.mark.parametrize("seed", [1234, 1, 2])
def test_bits_per_byte_on_shakespeare(folder, seed):
    """Bar: at most 2.65 bits per byte, whatever the seed; no test sees validation text before."""
    train = next(command for command in recipe("quickstart") if command.startswith("train "))
    command = f"{MEGALITE} {train} run_name=seed{seed} run_dir=outputs/seed{seed} seed={seed}"
    subprocess.run(command, shell=True, cwd=folder, check=True, timeout=900)  # noqa: S602
    last = read_metrics(folder / f"outputs/seed{seed}/metrics.jsonl")[-1]
    assert last["eval/shakespeare/bits_per_byte"] <= 2.65
    assert last["eval/tang/bits_per_byte"] <= 3.1
