"""Arrays of jobs on a real Slurm: a sweep of which two fail, a search, and a data build in parts."""

import csv
import json
import re
import shlex

import pytest

from tests.cluster.lab import BIN, wait_until
from tests.cluster.runs import losses, read_outputs, train_command
from tests.data_tools.corpora import make_tokenizer

ONE = ("launch=slurm", "parallel.tensor=1", "launch.slurm.requeue=false")
pytestmark = pytest.mark.cluster


def rows(directory) -> list[dict[str, str]]:
    """The table of a sweep."""
    with open(directory / "sweep.csv", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def sweep_command(store, *more: str) -> list[str]:
    keys = train_command("", store, *ONE)[2:]
    kept = [key for key in keys if not key.startswith(("run_name=", "run_dir=", "optimizer.lr="))]
    return [str(BIN / "megalite"), "train", "-m", *kept, "launch.wait=true", "sweep.name=s", *more]


def test_a_sweep_of_six_of_which_two_fail_and_again(cluster, store, tmp_path):
    """A learning rate of 1e30 makes inf of the weights, and the run says so and ends."""
    command = sweep_command(store, "optimizer.lr=1e-3,1e-4,1e30", "seed=1,2", "sweep.parallel=3")
    first = cluster.user(*command, cwd=tmp_path, seconds=500)
    directory = tmp_path / "outputs/sweeps/s"
    assert first.returncode != 0, first.stdout
    found = rows(directory)
    assert [row["state"] for row in found] == ["finished"] * 4 + ["failed"] * 2, first.stdout + first.stderr
    finished = {path: path.stat().st_mtime_ns for path in directory.glob("*/metrics.jsonl")}
    states = {path.parent.name: json.loads(path.read_text()) for path in directory.glob("*/state.json")}
    again = cluster.user(*command, cwd=tmp_path, seconds=500)
    assert again.returncode != 0
    assert [row["state"] for row in rows(directory)] == ["finished"] * 4 + ["failed"] * 2
    later = {path.parent.name: json.loads(path.read_text()) for path in directory.glob("*/state.json")}
    assert [later[row["job"]]["started"] == states[row["job"]]["started"] for row in found] == [True] * 4 + [False] * 2
    assert {path: path.stat().st_mtime_ns for path in finished if "1e+30" not in str(path)}.items() <= finished.items()
    best = min(found[:4], key=lambda row: float(row["loss"]))
    assert best["best"] == "best"
    job = later[found[0]["job"]]["job"]
    assert "_" in job, "a task of an array"


def test_a_search_of_twelve_by_three_workers_of_which_one_is_killed(cluster, store, tmp_path):
    """Three tasks of an array share a study on the disk; one is cancelled, and the same command goes on to twelve."""
    more = ("sweep.trials=12", "sweep.parallel=3", "optimizer.lr=tag(log,interval(1e-5,1e-2))")
    command = sweep_command(store, *more)
    command.remove("launch.wait=true")
    directory = tmp_path / "outputs/sweeps/s"
    started = cluster.user(*command, cwd=tmp_path)
    assert started.returncode == 0, started.stderr
    wait_until(lambda: len(list(directory.glob("*/state.json"))) >= 3, 200, lambda: read_outputs(directory))
    running = cluster.ask("squeue", "--noheader", "--array", "--states=RUNNING", "--format=%i").split()
    cluster.ask("scancel", "--signal=KILL", "--full", running[0])
    wait_until(lambda: not cluster.ask("squeue", "--noheader").split(), 600, lambda: read_outputs(directory))
    done = cluster.user(*command, "launch.wait=true", cwd=tmp_path, seconds=600)
    assert done.returncode == 0, done.stdout + done.stderr + read_outputs(directory)
    found = rows(directory)
    assert [row["state"] for row in found] == ["finished"] * 12
    assert len({row["optimizer.lr"] for row in found}) == 12, "none twice"
    best = next(row for row in found if row["best"])
    assert f"the same training again:\n{best['command']}" in done.stdout
    again = cluster.user(*shlex.split(best["command"]), "launch.wait=true", cwd=tmp_path)
    assert again.returncode == 0, again.stdout + again.stderr
    repeated = losses(directory / "repeated" / best["job"])
    assert repeated == losses(directory / best["job"])
    assert float(best["loss"]) == repeated[-1] == min(float(row["loss"]) for row in found)


def test_a_build_in_parts_makes_the_bytes_of_one(cluster, tmp_path):
    """An array of three and the job that waits for it, and a training that waits for both."""
    tokenizer = make_tokenizer(tmp_path)
    (tmp_path / "in").mkdir()
    for number in range(6):
        lines = [json.dumps({"text": f"document {number} {line} " * 200}) for line in range(3000)]
        (tmp_path / f"in/{number}.jsonl").write_text("\n".join(lines))
    command = [str(BIN / "megalite"), "data", "build", "input=in", f"tokenizer.path={tokenizer}", "dedup.exact=true"]
    alone = cluster.user(*command, "output=alone", cwd=tmp_path)
    assert alone.returncode == 0, alone.stderr
    done = cluster.user(*command, "output=out", "launch=slurm", "parts=3", cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert not (tmp_path / "out").exists()
    after = re.search(r"launch\.slurm\.after=\[\d+\]", done.stdout)
    assert after, done.stdout
    waits = ("launch=slurm", "parallel.tensor=1", "launch.wait=true", after[0])
    trained = cluster.user(*train_command("run", "out/train/in", *waits), cwd=tmp_path, seconds=400)
    assert trained.returncode == 0, trained.stdout + trained.stderr + read_outputs(tmp_path)
    assert len(losses(tmp_path / "run")) == 10
    assert "units are done" in read_outputs(tmp_path / "out.slurm")
    names = [path.relative_to(tmp_path / "alone") for path in sorted((tmp_path / "alone").rglob("*")) if path.is_file()]
    assert any(name.name == "manifest.json" for name in names)
    for name in names:
        if not name.name.startswith("build_report"):
            assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "alone" / name).read_bytes(), name
