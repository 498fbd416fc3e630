"""R15: of twenty minutes with a fault every three, how much is training."""

import os
import random
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest

from megalite.checkpoint_folder import list_checkpoints, newest_checkpoint
from megalite.errors import EXIT_REQUEUE
from megalite.guard.goodput import GOODPUT, format_goodput, goodput_table, read_lives
from megalite.metrics.jsonl import read_metrics
from tests.faults.supervisor import end_run, rank_pids, run_once, start_run
from tests.runs import tiny_config, write_store

WORLD, SECONDS, BETWEEN, SAVE_SECONDS = 2, 1200.0, 180.0, 30.0
MODEL = {"num_layers": 4, "hidden_size": 256, "num_attention_heads": 4, "vocab_size": 300, "max_sequence_length": 128}
FAULTS = ("kill a rank", "kill the launcher", "SIGTERM", "stop a rank", "damage and kill", "full disk")
SEED = int(os.environ.get("MEGALITE_TEST_SEED", 20260101))


class Patient:
    """A run that is hurt, and started again at once with the same command whenever it ends."""

    def __init__(self, config, is_mounted: bool, source: random.Random):
        """`is_mounted`: the run directory is a file system of its own, which may be filled."""
        self.config, self.is_mounted, self.source = config, is_mounted, source
        self.run_dir = Path(config.run_dir)
        self.began = time.time()
        self.until_first_step: list[float] = []
        self.codes: list[int] = []
        self.pid = self._start(0.0)

    def live(self, until: float) -> None:
        """Let it train until some seconds after its begin."""
        while time.time() - self.began < until:
            self._restart_if_ended()
            time.sleep(0.05)

    def hurt(self, fault: str) -> None:
        """Do what `fault` says; damage when there is an older checkpoint to fall back on."""
        while len(list_checkpoints(self.run_dir / "checkpoints")) < 2:
            self.live(time.time() - self.began + 0.1)
        print(f"{time.time() - self.began:6.1f} s: {fault}, {self._place()}", flush=True)
        ranks = rank_pids(self.pid)
        rank = self.source.choice(ranks) if ranks else self.pid
        if fault == "kill a rank":
            os.kill(rank, signal.SIGKILL)
        elif fault == "kill the launcher":
            os.kill(self.pid, signal.SIGKILL)
        elif fault == "SIGTERM":
            os.kill(self.pid, signal.SIGTERM)
        elif fault == "stop a rank":
            os.kill(rank, signal.SIGSTOP)
        elif fault == "damage and kill":
            self._flip_a_bit()
            os.kill(rank, signal.SIGKILL)
        elif fault == "full disk":
            self._fill(SAVE_SECONDS * 1.2)

    def end(self) -> float:
        """Stop it for good; returns the seconds that it all took."""
        os.kill(self.pid, signal.SIGTERM)
        self.codes.append(end_run(self.pid))
        return time.time() - self.began

    def _start(self, ended: float) -> int:
        started = time.time()
        pid = start_run(self.config, WORLD)
        if ended:
            lives = len(read_lives(self.run_dir / GOODPUT))
            while not (
                (found := read_lives(self.run_dir / GOODPUT))[lives:] and found[-1].last_step > found[-1].first_step
            ):
                if has_ended(pid) or time.time() - started > 120:
                    raise AssertionError(f"it takes no steps: {self._errors()}")
                time.sleep(0.02)
            self.until_first_step.append(time.time() - ended)
        return pid

    def _restart_if_ended(self) -> None:
        if has_ended(self.pid):
            self.codes.append(end_run(self.pid))
            self.pid = self._start(time.time())
            print(f"  ended with {self.codes[-1]}, first step after {self.until_first_step[-1]:.1f} s", flush=True)

    def _errors(self) -> str:
        return (self.run_dir.parent / "stderr.txt").read_text()[-3000:]

    def _place(self) -> str:
        rows = read_metrics(self.run_dir / "metrics.jsonl")
        saved = [path.name for path in list_checkpoints(self.run_dir / "checkpoints")]
        return f"step {rows[-1]['step'] if rows else 0}, saved {saved}"

    def _flip_a_bit(self) -> None:
        newest = list_checkpoints(self.run_dir / "checkpoints")[-1]
        path = self.source.choice(sorted(newest.iterdir()))
        content = bytearray(path.read_bytes())
        content[self.source.randrange(len(content))] ^= 1 << self.source.randrange(8)
        path.write_bytes(content)

    def _fill(self, seconds: float) -> None:
        if not self.is_mounted:
            print("  no file system of its own to fill", flush=True)
            return
        filler = self.run_dir / "filler"
        try:
            with open(filler, "wb", buffering=0) as file:
                while file.write(bytes(1 << 20)):
                    pass
        except OSError:
            pass
        deadline = time.time() + seconds
        while time.time() < deadline:
            self._restart_if_ended()
            time.sleep(0.05)
        filler.unlink()


def has_ended(pid: int) -> bool:
    """Without waiting for it."""
    return os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None


@pytest.fixture
def disk(tmp_path):
    """A file system of its own, where one may be mounted, for a run to fill; and whether it is."""
    folder = tmp_path / "faulty/run"
    folder.mkdir(parents=True)
    command = ["mount", "-t", "tmpfs", "-o", "size=300m", "faults", folder]
    is_mounted = os.geteuid() == 0 and subprocess.run(command, capture_output=True, check=False).returncode == 0
    yield folder, is_mounted
    if is_mounted:
        subprocess.run(["umount", "-l", folder], check=True)


def config_of(run_dir: Path, store: Path, steps: int, save_every: int):
    return tiny_config(
        run_dir,
        store,
        model=MODEL,
        trainer={"steps": steps, "global_batch_size": 8, "micro_batch_size": 4},
        data={"train": str(store), "sequence_length": 128},
        checkpoint={"save_every": save_every, "asynchronous": True},
        guard={"timeout": 8.0},
    )


@pytest.mark.soak
def test_nine_tenths_of_the_time_is_training(disk, tmp_path):
    """All faults of the catalogue, in a drawn order at drawn moments.

    A start is forked from a process that holds the imports, as `megalite train` forks its ranks.
    """
    folder, is_mounted = disk
    source = random.Random(SEED)
    faults = source.sample(FAULTS, len(FAULTS))
    store = write_store(tmp_path / "words", num_documents=400)
    (tmp_path / "pace").mkdir()
    assert run_once(config_of(tmp_path / "pace/run", store, 12, 0), WORLD) == 0
    pace = sorted(row["step_seconds"] for row in read_metrics(tmp_path / "pace/run/metrics.jsonl"))[6]
    save_every = max(1, round(SAVE_SECONDS / pace))
    print(f"\nseed {SEED}: {pace:.2f} s a step, saved every {save_every} steps: {faults}", flush=True)
    patient = Patient(config_of(folder, store, 1_000_000, save_every), is_mounted, source)
    try:
        for number, fault in enumerate(faults):
            patient.live(BETWEEN * number + source.uniform(60.0, BETWEEN))
            patient.hurt(fault)
        patient.live(SECONDS)
        wall = patient.end()
    except BaseException:
        os.killpg(patient.pid, signal.SIGKILL)
        raise
    lives = read_lives(folder / GOODPUT)
    table = goodput_table(lives)
    ratio = (table["step"] + table["evaluate"]) / wall
    print(format_goodput(table), flush=True)
    print(f"effective {ratio:.1%} of {wall:.0f} s; exit codes {patient.codes}", flush=True)
    assert sum(table.values()) == pytest.approx(wall, rel=0.01)
    assert patient.codes[-1] == EXIT_REQUEUE
    assert max(patient.until_first_step, default=0.0) <= 30
    newest = newest_checkpoint(folder)
    assert newest is not None
    assert int(newest.name.removeprefix("step_")) == lives[-1].last_step
    steps = [row["step"] for row in read_metrics(folder / "metrics.jsonl")]
    assert steps == sorted(set(steps)), "a full disk loses rows, and none stands twice"
    shutil.copy(folder / GOODPUT, tmp_path / "goodput.jsonl")
    assert ratio >= 0.90
