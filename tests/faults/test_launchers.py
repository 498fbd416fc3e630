"""R7 and R5 under the launchers that people use: nobody outlives them, and their signals and restarts lose nothing."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from megalite.checkpoint_folder import newest_checkpoint
from megalite.checkpoint_format import read_manifest
from megalite.launch.spawn import spawn_ranks
from megalite.metrics.jsonl import read_metrics
from megalite.process import start_process_group
from tests.faults.supervisor import outcome, run_once
from tests.runs import tiny_config, write_store

BIN = Path(sys.executable).parent
SMALL = {"num_layers": 2, "hidden_size": 32, "num_attention_heads": 4, "vocab_size": 300, "max_sequence_length": 64}
STEPS = 200
TORCHRUN = [str(BIN / "torchrun"), "--standalone", "--nproc-per-node=2"]
DEEPSPEED = [str(BIN / "deepspeed"), "--num_gpus=2", f"--master_port={29700 + os.getpid() % 200}"]
GONE_SECONDS = 10.0


def settings(run_dir: Path, store: Path, steps: int) -> dict[str, dict[str, object]]:
    return {
        "model": SMALL,
        "parallel": {"tensor": 2},
        "engine": {"precision": "fp32"},
        "trainer": {"steps": steps, "global_batch_size": 4, "micro_batch_size": 2, "log_every": 1},
        "data": {"train": str(store), "sequence_length": 32},
        "checkpoint": {"save_every": 50},
    }


class Run:
    """Training under a launcher; its processes are those that name its run directory on their command line."""

    def __init__(self, launcher: list[str], folder: Path, store: Path, steps: int = STEPS):
        self.run_dir = folder / "run"
        groups = settings(self.run_dir, store, steps)
        keys = [f"{group}.{key}={value}" for group, values in groups.items() for key, value in values.items()]
        module = ["--module", "megalite.train"] if launcher is DEEPSPEED else ["-m", "megalite.train"]
        self._command = [
            *launcher,
            *module,
            "run_name=tiny",
            f"run_dir={self.run_dir}",
            "seed=7",
            "optimizer.lr=3e-4",
            *keys,
        ]
        self._folder = folder
        self.started = len(self.losses())

    def start(self) -> "subprocess.Popen[bytes]":
        """The command, with its output in a file."""
        left_out = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
        environment = {key: value for key, value in os.environ.items() if key not in left_out}
        environment |= {
            "OMP_NUM_THREADS": "1",
            "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}",
            "DS_ACCELERATOR": "cpu",
        }
        self.started = len(self.losses())
        with open(self._folder / "output.txt", "ab") as output:
            return subprocess.Popen(
                self._command, env=environment, cwd=self._folder, stdout=output, stderr=output, start_new_session=True
            )

    def losses(self) -> list[float]:
        """Of the steps so far."""
        return [row["loss"] for row in read_metrics(self.run_dir / "metrics.jsonl")]

    def output(self) -> str:
        """What all starts have printed."""
        return (self._folder / "output.txt").read_text(errors="replace")

    def processes(self, part: str = "") -> list[int]:
        """Those that live, and have `part` on their command line too."""
        found = []
        for path in Path("/proc").glob("[0-9]*"):
            try:
                line = (path / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
                state = (path / "stat").read_text().rpartition(")")[2].split()[0]
            except OSError:
                continue
            if str(self.run_dir) in line and part in line and state not in "ZX":
                found.append(int(path.name))
        return found

    def ranks(self) -> list[int]:
        """Their pids, which they tell in their heartbeats' file names and records."""
        records = (self.run_dir / "logs/heartbeats").glob("rank_*.json")
        return [int(json.loads(path.read_text())["pid"]) for path in sorted(records)]

    def await_steps(self, more: int) -> None:
        """Until this start has taken some steps."""
        self.wait_for(lambda: len(self.losses()) >= self.started + more, 120, "it takes no steps")

    def await_end(self) -> None:
        """Until nobody is left."""
        self.wait_for(lambda: not self.processes(), GONE_SECONDS, "it lives on")

    def wait_for(self, condition: Callable[[], bool], seconds: float, otherwise: str) -> None:
        deadline = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < deadline, f"{otherwise}: {self.processes()}\n{self.output()[-4000:]}"
            time.sleep(0.02)


@contextmanager
def watched(run: Run) -> Iterator["subprocess.Popen[bytes]"]:
    """A started run, of which nothing is left behind whatever the test finds."""
    process = run.start()
    try:
        yield process
    finally:
        for pid in run.processes():
            os.kill(pid, signal.SIGKILL)
        process.wait()


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> Path:
    return write_store(tmp_path_factory.mktemp("stores") / "words")


@pytest.fixture(scope="module")
def straight(store, tmp_path_factory):
    """What an uninterrupted run comes to."""
    folder = tmp_path_factory.mktemp("straight")
    config = tiny_config(folder / "run", **settings(folder / "run", store, STEPS))
    assert run_once(config, 2) == 0, (folder / "stderr.txt").read_text()
    return outcome(folder / "run")


def finish(run: Run, store: Path, straight, code: int | None = None) -> None:
    """The same run to its end, by the project's own launcher, and what it came to."""
    config = tiny_config(run.run_dir, **settings(run.run_dir, store, STEPS))
    assert run_once(config, 2) == 0, (run.run_dir.parent / "stderr.txt").read_text()
    assert outcome(run.run_dir) == straight


@pytest.mark.slow
def test_torchrun_stopped_then_killed_loses_nothing_and_leaves_nobody(store, straight, tmp_path):
    """SIGTERM, the same command, SIGKILL, and to the end."""
    run = Run(TORCHRUN, tmp_path, store)
    with watched(run) as process:
        run.await_steps(20)
        process.terminate()
        began = time.monotonic()
        process.wait(30)
        run.await_end()
        assert time.monotonic() - began < 20
    saved = newest_checkpoint(run.run_dir)
    assert saved is not None
    step = read_manifest(saved).step
    assert 20 <= step < STEPS
    assert step == len(run.losses())
    assert f"stopped by a signal at step {step} of {STEPS}" in run.output()
    with watched(run) as process:
        run.await_steps(10)
        assert f"continuing from {saved}" in run.output()
        assert len(run.processes()) >= 4, "torchrun, two ranks and their monitor"
        process.kill()
        process.wait()
        run.await_end()
    finish(run, store, straight)


@pytest.mark.parametrize("late", [0, 1])
def test_ranks_that_torchrun_starts_again_find_each_other_on_the_store_of_the_dead(late, monkeypatch):
    """The store of an agent of torch 2.13 outlives its ranks: who comes first finds the other one's old address."""
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    elastic = {"TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_MAX_RESTARTS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    for name, value in elastic.items():
        monkeypatch.setenv(name, value)

    def rank_main(place):
        time.sleep(0.5 * (place.rank == late))
        met = {"init_method": "env://", "address": "127.0.0.1", "port": store.port}
        start_process_group(dataclasses.replace(place, **met), torch.device("cpu"))
        ones = torch.ones(1)
        dist.all_reduce(ones)
        assert ones.item() == 2
        if place.rank == late:
            os.kill(os.getpid(), signal.SIGKILL)
        dist.barrier()

    for _ in range(2):
        assert spawn_ranks(rank_main, 2) in (1, 128 + signal.SIGKILL)
    assert spawn_ranks(lambda place: late_end(rank_main, place), 2) == 0


def late_end(rank_main, place) -> None:
    """As `rank_main` does, but nobody is killed."""
    os.kill = lambda *_: None
    rank_main(place)


# The launcher, and what names the process of it that is killed.
KILLED = {
    "torchrun": (TORCHRUN, "bin/torchrun"),
    "deepspeed's runner": (DEEPSPEED, "bin/deepspeed"),
    "deepspeed's launch.py": (DEEPSPEED, "deepspeed.launcher.launch"),
}


@pytest.mark.slow
@pytest.mark.parametrize("which", KILLED)
def test_nobody_outlives_a_launcher_that_is_killed(which, store, tmp_path):
    launcher, part = KILLED[which]
    run = Run(launcher, tmp_path, store, steps=1_000_000)
    with watched(run) as process:
        run.await_steps(10)
        [victim] = run.processes(part)
        os.kill(victim, signal.SIGKILL)
        run.wait_for(lambda: process.poll() is not None, GONE_SECONDS, "the launcher lives on")
        run.await_end()


@pytest.mark.slow
@pytest.mark.parametrize("launcher", [TORCHRUN, DEEPSPEED], ids=["torchrun", "deepspeed"])
@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGTERM])
@pytest.mark.parametrize("rank", [0, 1])
def test_a_signal_to_one_rank_saves_and_ends_all(rank, number, launcher, store, straight, tmp_path):
    run = Run(launcher, tmp_path, store)
    with watched(run) as process:
        run.await_steps(20)
        os.kill(run.ranks()[rank], number)
        process.wait(30)
        run.await_end()
    saved = newest_checkpoint(run.run_dir)
    assert saved is not None
    assert 20 <= read_manifest(saved).step < STEPS, run.output()[-4000:]
    with watched(run) as process:
        assert process.wait(300) == 0, run.output()[-4000:]
    assert outcome(run.run_dir) == straight


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_torchrun_restarts_ranks_that_die_and_they_go_on(rank, store, straight, tmp_path):
    run = Run([*TORCHRUN, "--max-restarts=1"], tmp_path, store)
    with watched(run) as process:
        run.await_steps(60)
        os.kill(run.ranks()[rank], signal.SIGKILL)
        assert process.wait(300) == 0, run.output()[-4000:]
        run.await_end()
    assert "continuing from" in run.output()
    assert outcome(run.run_dir) == straight


@pytest.mark.slow
def test_torchrun_passes_on_sigusr1_when_it_is_told_to(store, tmp_path):
    """Else SIGUSR1 ends torchrun itself, and the ranks with it."""
    run = Run([*TORCHRUN, "--signals-to-handle=SIGTERM,SIGINT,SIGUSR1"], tmp_path, store)
    with watched(run) as process:
        run.await_steps(20)
        process.send_signal(signal.SIGUSR1)
        process.wait(30)
        run.await_end()
    saved = newest_checkpoint(run.run_dir)
    assert saved is not None
    assert read_manifest(saved).step == len(run.losses()) < STEPS
