"""docker/: the linter's opinion, the locks against setup.py and the versions that are tested, the Kubernetes example.

That the image can be built, and what runs in it, is in tests/cluster/test_container.py.
"""

import ast
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

from megalite.errors import EXIT_CONFIG, EXIT_DATA, EXIT_REQUEUE

ROOT = Path(__file__).parent.parent.parent
DOCKER = ROOT / "docker"
LOCKS = {path.stem: path for path in DOCKER.glob("requirements*.txt")}
# What comes with torch's CUDA build alone; constraints.txt is tested with the CPU's.
CUDA = re.compile(r"nvidia-|cuda-|triton$")
# What installs the rest, and no version of which our own code depends on.
INSTALLERS = {"pip", "setuptools", "wheel"}


def test_the_linter_finds_nothing():
    hadolint = shutil.which("hadolint", path=str(Path(sys.executable).parent))
    assert hadolint, "hadolint comes with the extra dev"
    done = subprocess.run([hadolint, "--no-color", str(DOCKER / "Dockerfile")], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def read_lock(path: Path) -> dict[str, tuple[Version, str, list[str]]]:
    """Name -> version, marker, hashes."""
    lines = [line for line in path.read_text().splitlines() if not line.startswith("#")]
    entries = {}
    for entry in "\n".join(lines).replace("\\\n", " ").splitlines():
        requirement, *hashes = re.split(r"\s+--hash=", entry)
        parsed = Requirement(requirement)
        (exact,) = parsed.specifier
        assert exact.operator == "=="
        assert parsed.name not in entries
        entries[canonicalize_name(parsed.name)] = Version(exact.version), str(parsed.marker or ""), hashes
    return entries


def pins() -> dict[str, Version]:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pairs = [line.split("==") for line in lines if line and not line.startswith("#")]
    return {canonicalize_name(name): Version(version) for name, version in pairs}


def test_there_is_a_lock_for_every_step_of_the_build():
    named = set(re.findall(r"docker/(requirements[\w-]*)(?:\.txt|\$)", (DOCKER / "Dockerfile").read_text()))
    assert named == {"requirements", "requirements-build", "requirements-torch-"}
    assert set(LOCKS) == {"requirements", "requirements-build", "requirements-torch-cpu", "requirements-torch-cuda"}


@pytest.mark.parametrize("name", LOCKS)
def test_a_lock_holds_what_is_tested_and_a_hash_of_all_of_it(name):
    tested = pins()
    for package, (version, marker, hashes) in read_lock(LOCKS[name]).items():
        assert hashes, package
        assert all(re.fullmatch(r"sha256:[0-9a-f]{64}", digest) for digest in hashes), package
        if package in tested:
            assert Version(version.public) == tested[package], f"{package}: run docker/lock.sh"
        else:
            elsewhere = "win32" in marker or "emscripten" in marker
            assert elsewhere or CUDA.match(package) or package in INSTALLERS, f"{package} is not in constraints.txt"


def test_locks_agree_with_each_other():
    versions = {}
    for path in LOCKS.values():
        for package, (version, _, _) in read_lock(path).items():
            assert versions.setdefault(package, version.public) == version.public, package


@pytest.mark.parametrize("torch", ["cpu", "cuda"])
def test_locks_hold_every_dependency_but_those_of_development(torch):
    locked = read_lock(LOCKS["requirements"]) | read_lock(LOCKS[f"requirements-torch-{torch}"])
    for requirement in declared():
        name = canonicalize_name(requirement.name)
        assert name in locked, f"{requirement}: run docker/lock.sh"
        assert locked[name][0] in requirement.specifier, f"{requirement}: run docker/lock.sh"


def declared() -> list[Requirement]:
    """What setup.py asks for, with all extras but `dev`."""
    assigned = {
        node.targets[0].id: ast.literal_eval(node.value)
        for node in ast.parse((ROOT / "setup.py").read_text()).body
        if isinstance(node, ast.Assign) and node.targets[0].id in ("CORE", "EXTRAS")
    }
    extras = [line for name, lines in assigned["EXTRAS"].items() if name != "dev" for line in lines]
    return [Requirement(line) for line in assigned["CORE"] + extras]


def test_every_extra_is_in_the_recipe_of_the_locks():
    source = (ROOT / "setup.py").read_text()
    extras = set(ast.literal_eval(re.search(r"^EXTRAS = (\{.*?^\})", source, re.DOTALL | re.MULTILINE)[1]))
    assert set(re.findall(r"--extra (\w+)", (DOCKER / "lock.sh").read_text())) == extras - {"dev"}


def test_only_torchs_lock_tells_the_builds_apart():
    cpu, cuda = read_lock(LOCKS["requirements-torch-cpu"]), read_lock(LOCKS["requirements-torch-cuda"])
    assert cpu["torch"][0].local == "cpu"
    assert cuda["torch"][0].local is None
    assert not [name for name in cpu if CUDA.match(name)]
    assert not [name for name in read_lock(LOCKS["requirements"]) if CUDA.match(name) or name == "torch"]
    assert {name for name in cuda if not CUDA.match(name)} == set(cpu)


def test_the_context_has_what_the_installation_reads_and_no_more():
    lines = [line for line in (DOCKER / "Dockerfile.dockerignore").read_text().splitlines() if not line.startswith("#")]
    assert lines[0] == "*"
    admitted = {line[1:] for line in lines if line.startswith("!")}
    packages = {"megalite", "launch", "data_tools", "conf"}
    read = {"setup.py", "pyproject.toml", "README.md", "LICENSE", "docker/requirements*.txt"}
    assert admitted == packages | read


def test_the_kubernetes_example_goes_on_after_an_interruption():
    """The exit codes it names are ours: on 75 the pod starts again, on a bad configuration or bad data it does not."""
    (text,) = re.findall(r"```yaml\n(.*?)```", (DOCKER / "README.md").read_text(), flags=re.DOTALL)
    claim, job = yaml.safe_load_all(text)
    assert (claim["kind"], job["kind"], job["apiVersion"]) == ("PersistentVolumeClaim", "Job", "batch/v1")
    pod = job["spec"]["template"]["spec"]
    assert pod["restartPolicy"] == "Never", "what podFailurePolicy needs"
    assert pod["terminationGracePeriodSeconds"] > 60
    (container,) = pod["containers"]
    assert container["args"][:2] == ["megalite", "train"]
    assert "command" not in container, "it would replace the entry point"
    actions = {
        code: rule["action"]
        for rule in job["spec"]["podFailurePolicy"]["rules"]
        if "onExitCodes" in rule
        for code in rule["onExitCodes"]["values"]
    }
    assert actions == {EXIT_REQUEUE: "Ignore", EXIT_CONFIG: "FailJob", EXIT_DATA: "FailJob"}
    volumes = {volume["name"]: volume for volume in pod["volumes"]}
    mounts = {mount["mountPath"]: volumes[mount["name"]] for mount in container["volumeMounts"]}
    assert mounts["/dev/shm"]["emptyDir"]["medium"] == "Memory"
    assert mounts["/work"]["persistentVolumeClaim"]["claimName"] == claim["metadata"]["name"]
    assert "emptyDir" in mounts["/tmp"]
