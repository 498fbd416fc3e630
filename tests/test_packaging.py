"""The wheel, built from a clean copy of the sources, and the versions that are tested."""

import ast
import configparser
import shutil
import subprocess
import sys
import zipfile
from email.parser import Parser
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

import megalite

ROOT = Path(__file__).parent.parent
FOLDERS = {
    "megalite": "megalite",
    "launch": "megalite/launch",
    "data_tools": "megalite/data_tools",
    "conf": "megalite/conf",
}
BUILD = "import sys; from setuptools import build_meta; build_meta.build_wheel(sys.argv[1])"


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    source, output = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for folder in FOLDERS:
        shutil.copytree(ROOT / folder, source / folder, ignore=shutil.ignore_patterns("__pycache__", "corpus.parquet"))
    (source / "data_tools/sample_corpus/corpus.parquet").write_bytes(b"large")
    for file in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / file, source / file)
    # The hook that pip and build call, without the seconds that they take around it.
    subprocess.run([sys.executable, "-c", BUILD, str(output)], cwd=source, check=True, capture_output=True)
    (file,) = output.glob("*.whl")
    return zipfile.ZipFile(file)


@pytest.fixture(scope="module")
def metadata(wheel):
    return Parser().parsestr(read(wheel, "METADATA"))


@pytest.fixture(scope="module")
def requirements(metadata):
    return [Requirement(line) for line in metadata.get_all("Requires-Dist")]


def read(wheel, name):
    (path,) = [path for path in wheel.namelist() if path.endswith(f".dist-info/{name}")]
    return wheel.read(path).decode()


def test_only_the_name_megalite_reaches_site_packages(wheel):
    tops = {path.split("/")[0] for path in wheel.namelist()}
    assert tops == {"megalite", f"megalite-{megalite.__version__}.dist-info"}
    assert read(wheel, "top_level.txt").split() == ["megalite"]


def test_it_holds_every_module_and_every_yaml_and_nothing_else(wheel):
    expected = {"megalite/py.typed"}
    for folder, name in FOLDERS.items():
        for path in (ROOT / folder).rglob("*"):
            if path.suffix in (".py", ".yaml") and "sample_corpus" not in path.parts:
                expected.add(f"{name}/{path.relative_to(ROOT / folder).as_posix()}")
    found = {path for path in wheel.namelist() if ".dist-info/" not in path}
    assert found == expected
    assert {"megalite/conf/train.yaml", "megalite/conf/model/tiny.yaml", "megalite/conf/__init__.py"} <= found


def test_metadata(wheel, metadata):
    entry_points = configparser.ConfigParser()
    entry_points.read_string(read(wheel, "entry_points.txt"))
    assert dict(entry_points["console_scripts"]) == {"megalite": "megalite.launch.cli:main"}
    assert metadata["Version"] == megalite.__version__
    assert metadata["License"] == "Apache-2.0"
    assert metadata["Requires-Python"] == ">=3.11"
    assert read(wheel, "licenses/LICENSE") == (ROOT / "LICENSE").read_text()


def pins():
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pairs = [line.split("==") for line in lines if line and not line.startswith("#")]
    return {canonicalize_name(name): Version(version) for name, version in pairs}


def test_every_dependency_is_pinned_to_a_version_in_its_range(requirements):
    pinned = pins()
    for requirement in requirements:
        version = pinned.get(canonicalize_name(requirement.name))
        assert version is not None, f"{requirement} is not in constraints.txt"
        assert version in requirement.specifier, f"{requirement}: constraints.txt has {version}"


# The minimum versions of the design that close known holes or bugs.
MINIMUM = {"torch": "2.10", "deepspeed": "0.19", "sentencepiece": "0.2.3", "pyarrow": "23.0.1", "hydra-core": "1.3.8",
           "wandb": "0.28.2", "transformers": "5.10"}  # fmt: skip


def test_ranges_admit_no_version_with_a_known_hole(requirements):
    ranges = {requirement.name: requirement.specifier for requirement in requirements}
    for name, version in MINIMUM.items():
        lowest = Version(version)
        before = (
            f"{lowest.major}.{lowest.minor}.{lowest.micro - 1}"
            if lowest.micro
            else f"{lowest.major}.{lowest.minor - 1}.99"
        )
        assert lowest in ranges[name]
        assert Version(before) not in ranges[name], name


def test_what_is_imported_is_declared(requirements):
    """Every third-party module that the package imports comes with a dependency of the core, or of the extra for it."""
    declared = {requirement.name.replace("-", "_") for requirement in requirements} | {"hydra"}
    declared |= {"omegaconf", "yaml", "tiktoken_ext"}  # hydra-core is built on the first two, the third is tiktoken's
    imported = {}
    for folder in FOLDERS:
        for path in (ROOT / folder).rglob("*.py"):
            for name in imported_names(path):
                imported.setdefault(name, path)
    own = {"megalite", *sys.stdlib_module_names}
    assert {name: path for name, path in imported.items() if name not in declared | own} == {}
    assert {"torch", "deepspeed", "sentencepiece"} <= set(imported), "the test sees imports"


def imported_names(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            yield node.module.split(".")[0]
