"""The floors of the house: import-linter over the assembled package, and what importing really loads."""

import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
CONTRACTS = {
    contract["id"]: contract
    for contract in tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
}


@pytest.fixture(scope="module")
def assembled(tmp_path_factory):
    """The package as it is installed: launch, data_tools and conf below megalite."""
    package = tmp_path_factory.mktemp("assembled") / "megalite"
    ignore = shutil.ignore_patterns("__pycache__", "*.parquet")
    shutil.copytree(ROOT / "megalite", package, ignore=ignore)
    for folder in ("launch", "data_tools", "conf"):
        shutil.copytree(ROOT / folder, package / folder, ignore=ignore)
    return package


def broken_contracts(package):
    """Ids of the contracts that the package breaks."""
    done = subprocess.run(
        [Path(sys.executable).with_name("lint-imports"), "--config", ROOT / "pyproject.toml", "--no-cache"],
        cwd=package.parent,
        env={**os.environ, "PYTHONPATH": str(package.parent)},
        capture_output=True,
        text=True,
    )
    verdicts = {
        key: re.search(rf"{re.escape(value['name'])} (KEPT|BROKEN)", done.stdout) for key, value in CONTRACTS.items()
    }
    assert all(verdicts.values()), done.stdout + done.stderr
    broken = {key for key, verdict in verdicts.items() if verdict[1] == "BROKEN"}
    assert (done.returncode == 0) == (not broken), done.stdout
    return broken


def test_every_room_keeps_to_its_floor(assembled):
    assert broken_contracts(assembled) == set()


@pytest.mark.parametrize(
    ("file", "planted", "broken"),
    [
        ("mesh.py", "def late():\n    from megalite.layers import linear\n", {"floors"}),
        ("layers/norm.py", "import megalite.models.counts", {"floors"}),
        ("comm.py", "import megalite.rng", {"floors"}),
        ("trainer.py", "from megalite.launch import spawn", {"floors"}),
        ("data_tools/readers.py", "from ..mesh import Mesh", {"data-tools", "torch"}),
        ("data_tools/builder/building.py", "from ...launch import spawn", {"floors"}),
        ("errors.py", "def late():\n    import torch\n", {"torch"}),
        ("config/place.py", "from megalite import mesh", {"floors", "data-tools", "torch"}),
        ("optim.py", "def late():\n    import deepspeed\n", {"deepspeed"}),
        ("launch/doctor/command.py", "import deepspeed.comm", {"deepspeed"}),
    ],
)
def test_a_planted_import_is_seen(assembled, file, planted, broken):
    path = assembled / file
    before = path.read_text()
    path.write_text(f"{before}\n{planted}\n")
    try:
        assert broken_contracts(assembled) == broken
    finally:
        path.write_text(before)


def test_every_room_has_a_floor():
    rooms = {path.stem for path in (ROOT / "megalite").glob("*.py")} - {"__init__"}
    rooms |= {path.parent.name for path in (ROOT / "megalite").glob("*/__init__.py")} - {"data"}
    rooms |= {f"data.{path.stem}" for path in (ROOT / "megalite/data").glob("*.py")} - {"data.__init__"}
    rooms |= {"launch", "data_tools"}
    placed = [room.strip() for layer in CONTRACTS["floors"]["layers"] for room in layer.split("|")]
    assert sorted(placed) == sorted(f"megalite.{room}" for room in rooms)
    # Only the engine is missing from the rooms that must not import DeepSpeed.
    without = {re.sub(r"^(megalite\.data)\..*", r"\1", room) for room in placed} - {"megalite.engine"}
    assert set(CONTRACTS["deepspeed"]["source_modules"]) == without | {"megalite.conf"}


IMPORTS = """
import importlib, json, pkgutil, sys, time
import megalite
started = time.process_time()
for name in json.loads(sys.argv[1]):
    module = importlib.import_module(name)
    for found in pkgutil.walk_packages(getattr(module, "__path__", []), name + "."):
        if not found.name.endswith("sample_corpus.make"):  # a script that reads parquet files
            importlib.import_module(found.name)
print(json.dumps([time.process_time() - started, sorted(sys.modules)]))
"""


def loaded(*names):
    """Processor seconds of importing the modules with all below them, and what that loaded."""
    done = subprocess.run(
        [sys.executable, "-c", IMPORTS, json.dumps(names)], capture_output=True, text=True, check=True
    )
    return json.loads(done.stdout)


@pytest.mark.parametrize(
    "names",
    [
        ["megalite.launch"],
        ["megalite.config"],
        ["megalite.preflight", "megalite.tokenizer", "megalite.checkpoint_format", "megalite.errors", "megalite.log"],
        ["megalite.data.format", "megalite.data.order", "megalite.data.manifest", "megalite.data.files"],
        ["megalite.data_tools", "megalite.conf"],
    ],
)
def test_importing_loads_neither_torch_nor_deepspeed(names):
    seconds, modules = loaded(*names)
    assert set(names) <= set(modules)
    assert not {"torch", "deepspeed", "transformers", "wandb"} & set(modules)
    if names == ["megalite.launch"]:
        assert {"megalite.launch.commands", "megalite.launch.spawn", "megalite.launch.report.page"} <= set(modules)
    if "megalite.data_tools" in names:
        assert seconds < 1
