"""`launch=deepspeed` over two hosts, by pdsh and a real sshd: the numbers of one machine, stops, kills, nobody left."""

import contextlib
import json
import os
import signal
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from megalite.guard.run_state import read_state
from tests.cluster.lab import Hosts, Unfit, serve_ssh, wait_until
from tests.cluster.runs import STEPS, files, losses, train_command

NEAR, FAR = "hosta", "hostb"
GRACE = 30
ODD = 'a "b" $HOME `c` \\d 100% %h'  # a variable's value that shells and pdsh would change


@dataclass(frozen=True)
class Lab:
    """Two hosts that reach each other by ssh; people sit at the first."""

    hosts: Hosts
    environment: dict[str, str]
    hostfile: Path

    def command(self, run_dir: Path, store: Path, *overrides: str, **options) -> list[str]:
        launch = (
            "launch=deepspeed", "launch.nodes=2", "launch.nproc_per_node=2", f"launch.hostfile={self.hostfile}",
            f"launch.grace={GRACE}", "launch.start_timeout=120",
        )  # fmt: skip
        return train_command(run_dir, store, *launch, *overrides, **options)

    def start(self, command: list[str], run_dir: Path, steps: int) -> "subprocess.Popen[bytes]":
        """The command, once it has taken some steps."""
        rows = len(losses(run_dir)) if run_dir.exists() else 0
        started = self.hosts.start(NEAR, *command, log=self._log(run_dir), environment=self.environment)
        wait_until(
            lambda: len(losses(run_dir)) >= rows + steps, 240, lambda: f"takes no steps: {self.log(run_dir)[-5000:]}"
        )
        return started

    def pid(self, part: str) -> int:
        """Of the one process on the first host, as this machine counts, that has `part` in its command line."""
        found = self.hosts.processes(NEAR, part)
        assert len(found) == 1, f"{part}: {found}"
        return found[0]

    def rank(self, run_dir: Path, number: int) -> tuple[str, str]:
        """Host of a rank and its pid there."""
        record = json.loads((run_dir / f"logs/heartbeats/rank_{number:05d}.json").read_text())
        return record["host"], str(record["pid"])

    def log(self, run_dir: Path) -> str:
        """What the commands of a run have said."""
        return self._log(run_dir).read_text(errors="replace")

    def left(self) -> list[int]:
        """What is there of any run, or of the way to its ranks."""
        parts = ("megalite", "deepspeed", "pdsh")
        return [pid for name in self.hosts.names for part in parts for pid in self.hosts.processes(name, part)]

    @staticmethod
    def _log(run_dir: Path) -> Path:
        return run_dir.parent / "said.txt"


@pytest.fixture(scope="module")
def lab(tmp_path_factory) -> Iterator[Lab]:
    folder = tmp_path_factory.mktemp("lab")
    try:
        with contextlib.closing(Hosts(folder, [NEAR, FAR])) as hosts:
            environment = serve_ssh(hosts)
            hostfile = folder / "hostfile"
            hostfile.write_text(f"# two of each\n{NEAR} slots=2\n{FAR} slots=2\n")
            (folder / "variables").write_text("KEPT=by hand\n")
            environment |= {"OMP_NUM_THREADS": "1", "DS_ENV_FILE": str(folder / "variables")}
            yield Lab(hosts, environment, hostfile)
    except Unfit as reason:
        pytest.skip(f"hosts with ssh: {reason}")


@pytest.fixture
def nobody_left(lab) -> Iterator[None]:
    """At the end of a test no process of it is left on either host."""
    yield
    assert not lab.left()


@pytest.fixture(scope="module")
def straight(store, tmp_path_factory):
    """Four ranks on one machine, with no launcher but ours."""
    run_dir = tmp_path_factory.mktemp("straight") / "run"
    subprocess.run(
        train_command(run_dir, store, "launch.nproc_per_node=4", steps=STEPS), check=True, capture_output=True
    )
    return run_dir


@pytest.mark.cluster
@pytest.mark.usefixtures("nobody_left")
def test_two_hosts_learn_what_one_machine_learns(lab, store, straight, tmp_path):
    run_dir = tmp_path / "run"
    odd = f"launch.environment.ODD='{ODD}'"
    process = lab.start(lab.command(run_dir, store, odd, steps=STEPS), run_dir, 1)
    for number, host in enumerate((NEAR, NEAR, FAR, FAR)):
        where, pid = lab.rank(run_dir, number)
        assert where == host
        variables = lab.hosts.run(where, "cat", f"/proc/{pid}/environ").split("\0")
        assert [line for line in variables if line.startswith(("ODD=", "KEPT="))] == ["KEPT=by hand", f"ODD={ODD}"]
    assert process.wait(300) == 0, lab.log(run_dir)[-5000:]
    assert "has no effect here" not in lab.log(run_dir)
    assert losses(run_dir) == pytest.approx(losses(straight), abs=1e-6)
    assert files(run_dir) == files(straight)


@pytest.mark.cluster
@pytest.mark.usefixtures("nobody_left")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_stop_reaches_the_ranks_of_both_hosts(number, lab, store, straight, tmp_path):
    """SIGINT as a terminal sends it: to the command and all it has started in its group."""
    run_dir = tmp_path / "run"
    command = lab.command(run_dir, store, steps=STEPS)
    process = lab.start(command, run_dir, 10)
    began = time.monotonic()
    pid = lab.pid("megalite train")
    group = [other for other in lab.hosts.processes(NEAR, "") if os.getpgid(other) == os.getpgid(pid)]
    for receiver in group if number == signal.SIGINT else [pid]:
        os.kill(receiver, number)
    assert process.wait(GRACE) == 75, lab.log(run_dir)[-5000:]
    print(f"{number.name}: {time.monotonic() - began:.1f} s")
    state = read_state(run_dir)
    assert state is not None
    assert (state.state, state.exit_code, state.step) == ("preempted", 75, len(losses(run_dir)))
    assert state.step < STEPS
    assert not lab.left()
    assert lab.start(command, run_dir, 1).wait(300) == 0, lab.log(run_dir)[-5000:]
    assert losses(run_dir) == pytest.approx(losses(straight), abs=1e-6)


@pytest.mark.cluster
@pytest.mark.usefixtures("nobody_left")
def test_a_second_signal_ends_the_ranks_of_both_hosts_and_of_no_other_run(lab, store, tmp_path):
    """Ranks that cannot save: they are stopped. Beside them is what the launcher's own way to end them would hit."""
    run_dir = tmp_path / "run"
    process = lab.start(lab.command(run_dir, store, steps=1_000_000), run_dir, 1)
    launcher = next(pid for pid in lab.hosts.processes(FAR, "-u -m deepspeed.launcher.launch") if not _is_shell(pid))
    words = Path(f"/proc/{launcher}/cmdline").read_text().split("\0")
    name = " ".join(words[:4])
    other = lab.hosts.start(
        FAR, "bash", "-c", f"exec -a '{name}' sleep 300", log=tmp_path / "other.txt", environment=lab.environment
    )
    for number in range(4):
        lab.hosts.run(lab.rank(run_dir, number)[0], "kill", "-STOP", lab.rank(run_dir, number)[1])
    pid = lab.pid("megalite train")
    os.kill(pid, signal.SIGTERM)
    time.sleep(3)
    assert process.poll() is None, "they have their time"
    os.kill(pid, signal.SIGTERM)
    assert process.wait(20) == 128 + signal.SIGTERM, lab.log(run_dir)[-5000:]
    assert other.poll() is None
    for pid in lab.hosts.processes(FAR, name):
        os.kill(pid, signal.SIGKILL)
    other.wait()


@pytest.mark.cluster
@pytest.mark.usefixtures("nobody_left")
def test_a_killed_rank_ends_the_run_or_starts_it_again(lab, store, straight, tmp_path):
    run_dir = tmp_path / "run"
    process = lab.start(lab.command(run_dir, store, "checkpoint.save_every=10", steps=STEPS), run_dir, 15)
    _kill(lab, run_dir, 3)
    assert process.wait(GRACE) not in (0, 75), lab.log(run_dir)[-5000:]
    assert not lab.left()
    again = lab.command(run_dir, store, "checkpoint.save_every=10", "launch.restarts=1", steps=STEPS)
    process = lab.start(again, run_dir, 10)
    _kill(lab, run_dir, 3)
    assert process.wait(300) == 0, lab.log(run_dir)[-5000:]
    assert "starting them again from step" in lab.log(run_dir)
    assert losses(run_dir) == pytest.approx(losses(straight), abs=1e-6)


@pytest.mark.cluster
@pytest.mark.usefixtures("nobody_left")
def test_ranks_that_would_wait_for_a_host_without_ranks_are_ended(lab, store, tmp_path):
    """Those of the first host do not notice: they are stopped."""
    run_dir = tmp_path / "run"
    process = lab.start(lab.command(run_dir, store, "launch.grace=5", steps=1_000_000), run_dir, 1)
    for number in (0, 1):
        lab.hosts.run(NEAR, "kill", "-STOP", lab.rank(run_dir, number)[1])
    _kill(lab, run_dir, 3)
    assert process.wait(60) not in (0, 75), lab.log(run_dir)[-5000:]
    assert f"all ranks on {FAR} are gone" in lab.log(run_dir)


def _kill(lab: Lab, run_dir: Path, number: int) -> None:
    host, pid = lab.rank(run_dir, number)
    lab.hosts.run(host, "kill", "-KILL", pid)


def _is_shell(pid: int) -> bool:
    return "bash" in os.readlink(f"/proc/{pid}/exe") or "dash" in os.readlink(f"/proc/{pid}/exe")
