"""The image of docker/Dockerfile, built from nothing for a CPU, and what the README has people do in it.

Containers run as an engine's do, with what is asked of them by careful clusters: any user id, without a name in the
image; nothing writable but /tmp and the volume; no network.
"""

import os
import re
import subprocess
from pathlib import Path

import psutil
import pytest

import megalite
from megalite.errors import EXIT_REQUEUE
from tests.cluster.images import DEBIAN, Images
from tests.cluster.lab import Unfit, wait_until

pytestmark = pytest.mark.cluster
ROOT = Path(__file__).parent.parent.parent
IMAGE = "megalite:cpu"
SOMEONE = 4242
COMPILERS = ("cc", "gcc", "g++", "c++", "clang", "make", "ld", "as", "nvcc")
LARGEST = 2.3e9  # bytes, unpacked; torch is 0.8e9 of them


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    folder = tmp_path_factory.mktemp("images")
    try:
        images = Images(folder)
    except Unfit as reason:
        pytest.skip(f"a container {reason}")
    try:
        base = f"debian:{DEBIAN}-slim"
        images.bootstrap(f"docker.io/library/{base}")
        images.build(IMAGE, ROOT / "docker/Dockerfile", ROOT, BASE=base, TORCH="cpu")
        yield images
    finally:
        images.close()


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """A volume that the container's user may write to."""
    folder = tmp_path_factory.mktemp("work")
    os.chown(folder, SOMEONE, SOMEONE)
    return folder


@pytest.fixture(scope="module")
def options(work):
    return (
        f"--user={SOMEONE}:{SOMEONE}", "--passwd=false", "--read-only", "--tmpfs=/tmp", "--env=OMP_NUM_THREADS=1",
        f"--volume={work}:/work", f"--volume={ROOT / 'data_tools/sample_corpus'}:/corpus:ro",
    )  # fmt: skip


def test_the_image_is_lean_and_says_what_it_is(images, capsys):
    described = images.inspect(IMAGE)
    assert described["Size"] < LARGEST
    with capsys.disabled():
        base = images.inspect(f"debian:{DEBIAN}-slim")["Size"]
        print(f"\n{IMAGE}: {described['Size'] / 1e9:.2f} GB unpacked, {base / 1e9:.2f} GB of them the base")
    assert described["Labels"]["org.opencontainers.image.licenses"] == "Apache-2.0"
    assert int(described["Config"]["User"]) > 0
    left = images.run(IMAGE, "find", "/usr", "/opt", "/bin", "(", "-name", "cc1*", "-o", "-name", "*.whl", ")")
    assert left == "", "compilers, or packages that were not unpacked"
    found = images.run(IMAGE, "sh", "-c", f"for name in {' '.join(COMPILERS)}; do command -v $name; done; true")
    assert found == ""


def test_nothing_of_the_machine_that_built_it_stays_in_it(images):
    """No configuration of pip, no mount point, no sources."""
    script = "find / -xdev -name 'pip*.conf'; ls -A /root /src"
    found = images.run(IMAGE, "sh", "-c", f"{script}; true", options=("--user=0",))
    assert found.split() == ["/root:", ".bashrc", ".profile"], "what Debian puts there"


def test_the_packages_are_those_of_the_locks(images):
    locked = {}
    for name in ("build", "torch-cpu"):
        locked |= pins(ROOT / f"docker/requirements-{name}.txt")
    locked |= pins(ROOT / "docker/requirements.txt")
    installed = dict(line.split("==") for line in images.run(IMAGE, "pip", "list", "--format=freeze").splitlines())
    assert installed.pop("megalite") == megalite.__version__
    assert {name.lower().replace("_", "-"): version for name, version in installed.items()}.items() <= locked.items()


def pins(path: Path) -> dict[str, str]:
    return dict(re.findall(r"^([\w-]+)==([\w.+]+)", path.read_text(), flags=re.MULTILINE))


def test_it_runs_as_anyone(images, options):
    assert images.run(IMAGE, "megalite", "--version", options=options) == f"megalite {megalite.__version__}\n"
    assert images.run(IMAGE, "id", "-u").strip() == images.inspect(IMAGE)["Config"]["User"]
    checks = images.run(IMAGE, "megalite", "doctor", options=options)
    assert re.search(r"checks: 0 failed", checks), checks
    assert "usage" in images.run(IMAGE, options=options).lower(), "help without a command"


def test_orphans_are_reaped(images, options):
    """A process whose parent has ended is the first process's child; when it ends, someone must take note."""
    script = (
        "import os, time, pathlib\n"
        "if not os.fork():\n"
        "    if not os.fork(): time.sleep(0.5)\n"
        "    os._exit(0)\n"
        "os.wait(); time.sleep(1.5)\n"
        "print([p.read_text().split()[2] for p in pathlib.Path('/proc').glob('[0-9]*/stat')].count('Z'))\n"
    )
    assert images.run(IMAGE, "python", "-c", script, options=options).strip() == "0"


@pytest.fixture(scope="module")
def built(images, options, work):
    """What `make quickstart` builds before it trains."""
    corpus, sample = "input=/corpus/corpus.parquet", "outputs/sample"
    columns = ("reader.language_column=language", "reader.split_column=split")
    images.run(
        IMAGE, "megalite", "tokenizer", "train", corpus, f"output={sample}/tokenizer", "tokenizer.vocab_size=4096",
        "tokenizer.character_coverage=0.95", "tokenizer.language_balance=0.5", *columns, "split=train", options=options,
    )  # fmt: skip
    images.run(
        IMAGE, "megalite", "data", "build", corpus, f"output={sample}/store", f"tokenizer.path={sample}/tokenizer",
        "reader.source_column=source", *columns, options=options,
    )  # fmt: skip
    return work / "outputs"


def test_the_quickstart(images, options, built):
    """Its steps and texts are cut short; the rest is what `make quickstart` does."""
    keys = ("trainer.stop_after=10", "data.validation=[{path:outputs/sample/store/validation/shakespeare}]")
    images.run(IMAGE, "megalite", "train", "experiment=quickstart", *keys, options=options)
    run = built / "quickstart"
    assert (run / "checkpoints/step_00000010").is_dir()
    assert {path.stat().st_uid for path in run.rglob("*")} == {SOMEONE}
    words = ("run_dir=outputs/quickstart", "prompt=ROMEO:", "max_new_tokens=8")
    assert "ROMEO:" in images.run(IMAGE, "megalite", "generate", *words, options=options)
    images.run(IMAGE, "megalite", "report", "run_dir=outputs/quickstart", options=options)
    assert "<html" in (run / "report.html").read_text()


def test_a_container_that_is_told_to_stop_saves_and_asks_to_be_started_again(images, options, built, tmp_path):
    """As an engine, Slurm or Kubernetes tells it: SIGTERM to the container's first process."""
    command = (
        "megalite",
        "train",
        "experiment=quickstart",
        "run_name=stopped",
        "launch.nproc_per_node=2",
        "trainer.log_every=1",
    )
    log = tmp_path / "log"
    training = images.start(IMAGE, *command, options=(*options, "--name=training"), log=log)
    metrics = built / "stopped/metrics.jsonl"
    wait_until(
        lambda: (metrics.exists() and metrics.read_text().count("\n") > 3) or training.poll() is not None,
        300,
        lambda: log.read_text(),
    )
    assert len(processes()) >= 4, "tini, the launcher and two ranks"
    images.podman("kill", "--signal=TERM", "training")
    try:
        assert training.wait(120) == EXIT_REQUEUE, log.read_text()
    except subprocess.TimeoutExpired:
        pytest.fail(f"does not end: {log.read_text()}")
    (checkpoint,) = (built / "stopped/checkpoints").glob("step_*")
    assert processes() == []
    step = int(checkpoint.name.removeprefix("step_"))
    assert 3 <= step < 400
    images.run(IMAGE, *command, f"trainer.stop_after={step + 2}", options=options)
    steps = re.findall(r'"step": ?(\d+)', metrics.read_text())
    assert [int(number) for number in steps] == sorted({int(number) for number in steps}), "every step stands once"
    assert int(steps[-1]) == step + 2


def processes() -> list[int]:
    """Those that run as the container's user."""
    return [process.pid for process in psutil.process_iter(["uids"]) if process.info["uids"].real == SOMEONE]
