"""Stalls made on purpose, in real processes: the right rank is named, and no process is left.

All jobs of this room start at once and are looked at one after another: most of a stall is waiting.
"""

import ctypes
import json
import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from megalite.errors import EXIT_RESOURCE, ResourceError
from megalite.guard import heartbeat as heartbeat_room
from megalite.guard.heartbeat import Heartbeat
from megalite.guard.observer import FOLDER, MonitorSettings
from megalite.guard.proc import GONE, find_launchers, kill_main_thread, name_machine, read_stat, read_state
from megalite.guard.stall import Limits, parse_record
from tests.guard.test_stall import ANYONE

STEPS = 12
LONG = 500  # steps: more than a stopped rank takes while it writes its stack
LIMITS = Limits(timeout=1.0, start=20.0, floor=0.5, interval=0.1)
PATIENT = Limits(timeout=5.0, start=20.0, interval=0.1)
START = Limits(timeout=20.0, start=1.5, floor=0.5, interval=0.1)
SLEEP = 60.0


def hold_the_lock():
    mutex = ctypes.create_string_buffer(64)  # zeros are a free one
    library = ctypes.PyDLL(None)  # which does not let go of the GIL
    library.pthread_mutex_lock(mutex)
    library.pthread_mutex_lock(mutex)


def stop():
    os.kill(os.getpid(), signal.SIGSTOP)


def die():
    os.kill(os.getpid(), signal.SIGKILL)


def fall_asleep():
    time.sleep(SLEEP)


def rank_main(job, rank):
    """A rank of `job`: steps with a collective that waits for all, as files on the disk."""
    machine = job["machines"][rank] if "machines" in job else None
    first_of_machine = rank == 0 or (machine is not None and job["machines"][rank - 1] != machine)
    logs = job["logs"] / str(machine) if job.get("apart") else job["logs"]
    heartbeat = Heartbeat(
        logs, rank, 0 if first_of_machine else 1, job["world_size"], limits=job["limits"], machine=machine
    )
    calls: list[tuple[int, str]] = []
    heartbeat.watch_collectives(lambda: {"world": calls[-4:]})
    if job.get("start"):
        heartbeat.enter(job["start"])
        time.sleep(SLEEP)
    for step in range(1, job.get("steps", STEPS)):
        heartbeat.enter("data", step)
        if step == 6 and rank == job.get("rank"):
            time.sleep(4 * job["limits"].interval)  # published, and seen
            job["fault"]()
        heartbeat.enter("step")
        operation = "broadcast" if step == 6 and rank == job.get("mismatched") else "all_reduce"
        calls.append((step, operation))
        meet(job, step, operation)
    heartbeat.close()


def meet(job, step, operation):
    """Returns when all ranks call the same `operation`."""
    folder = job.get("meeting", job["logs"])
    (folder / f"{operation}_{step}_{os.getpid()}").touch()
    while len(list(folder.glob(f"{operation}_{step}_*"))) < job["world_size"]:
        time.sleep(0.01)


def start_job(folder, **job):
    """Fork a launcher, in whose `stderr` and `codes` files what it saw is found; it waits for all ranks."""
    job = {"world_size": 3, "limits": LIMITS, "logs": folder / "logs", **job}
    (job["logs"] / FOLDER).mkdir(parents=True, exist_ok=True)
    if "left" in job:
        (job["logs"] / FOLDER / f"rank_{job['left'].rank:05d}.json").write_text(json.dumps(asdict(job["left"])))
    job["launcher"] = os.fork()
    if job["launcher"]:
        return job
    try:
        file = os.open(folder / "stderr", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(file, 2)
        sys.stderr = os.fdopen(2, "w", closefd=False)
        os.environ.update(job.get("environment", {}))
        pids = {}
        for rank in job.get("started", range(job["world_size"])):
            if (pid := os.fork()) == 0:
                try:
                    rank_main(job, rank)
                    os._exit(0)
                finally:
                    os._exit(1)
            pids[rank] = pid
        codes = {rank: os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for rank, pid in pids.items()}
        (folder / "codes").write_text(json.dumps(codes))
    finally:
        os._exit(0)


def finish(job):
    """Wait for the launcher; returns the exit code of each rank, what was printed, and the report."""
    if not job.get("finished"):
        os.waitpid(job["launcher"], 0)
        job["finished"] = True
    folder = job["logs"].parent
    codes = {int(rank): code for rank, code in json.loads((folder / "codes").read_text()).items()}
    assert not left_of(job["logs"]), "a process is left"
    reports = sorted(job["logs"].glob("stall_*.txt"))
    return codes, (folder / "stderr").read_text(), [report.read_text() for report in reports]


def left_of(logs, seconds=5.0):
    """Ranks and monitors that still live after `seconds` in which to go."""
    deadline = time.monotonic() + seconds
    while True:
        records = [parse_record(file.read_text()) for file in (logs / FOLDER).glob("rank_*.json")]
        left = [r.pid for r in records if r and read_state(r.pid, r.start) != GONE]
        left += monitors_of(logs)
        if not left or time.monotonic() > deadline:
            return left
        time.sleep(0.05)


def monitors_of(logs):
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            command = (process / "cmdline").read_bytes()
        except OSError:
            continue
        if b"megalite.guard.monitor" in command and str(logs).encode() in command:
            found.append(int(process.name))
    return found


JOBS = {
    "healthy": {"limits": PATIENT},
    "asleep": {"rank": 1, "fault": fall_asleep},
    "first rank asleep": {"rank": 0, "fault": fall_asleep},
    "stopped": {"rank": 2, "fault": stop, "steps": LONG},
    "first rank stopped": {"rank": 0, "fault": stop, "steps": LONG},
    "lock held": {"rank": 1, "fault": hold_the_lock},
    "killed": {"rank": 1, "fault": die},
    "first rank killed": {"rank": 0, "fault": die},
    "mismatched": {"mismatched": 2},
    "all quiet": {"world_size": 2, "start": "start: weights", "limits": START},
    "not started": {
        "world_size": 2,
        "started": [0],
        "start": "start: process group",
        "limits": START,
        "left": replace(ANYONE, rank=1, machine=name_machine(), pid=2**22 + 1),
    },
    "apart": {
        "machines": ["a", "a", "b", "b"],
        "world_size": 4,
        "rank": 3,
        "fault": fall_asleep,
        "apart": True,
    },
    "two machines": {"machines": ["a", "a", "b", "b"], "world_size": 4, "rank": 3, "fault": stop, "steps": LONG},
}


@pytest.fixture(scope="module")
def jobs(tmp_path_factory):
    started = {name: start_job(tmp_path_factory.mktemp("job"), **job) for name, job in JOBS.items()}
    extensions = tmp_path_factory.mktemp("extensions")
    (extensions / "cpu_adam").mkdir()
    (extensions / "cpu_adam" / "lock").touch()
    environment = {"TORCH_EXTENSIONS_DIR": str(extensions)}
    started["stale lock"] = start_job(
        tmp_path_factory.mktemp("job"), start="start: engine", limits=START, environment=environment
    )
    started["stale lock"]["lock"] = extensions / "cpu_adam" / "lock"
    yield started
    for job in started.values():  # what a failed test left
        for pid in [*left_of(job["logs"], 0.0)]:
            os.kill(pid, signal.SIGKILL)


def test_a_healthy_job_is_not_reported(jobs):
    assert finish(jobs["healthy"]) == ({0: 0, 1: 0, 2: 0}, "", [])


@pytest.mark.parametrize(
    ("name", "blamed", "reason", "code"),
    [
        (
            "asleep",
            1,
            "is not yet in collective 6 (all_reduce) of group world, in which ranks 0, 2 wait",
            EXIT_RESOURCE,
        ),
        ("first rank asleep", 0, "is not yet in collective 6 (all_reduce) of group world", EXIT_RESOURCE),
        ("stopped", 2, "is stopped (SIGSTOP", -signal.SIGKILL),
        ("first rank stopped", 0, "is stopped (SIGSTOP", -signal.SIGKILL),
        ("lock held", 1, "something holds the interpreter's lock (GIL)", -signal.SIGKILL),
        ("killed", 1, "is gone", -signal.SIGKILL),
        ("first rank killed", 0, "is gone", -signal.SIGKILL),
        ("mismatched", 2, "in collective 6 of group world: ranks 0, 1 called all_reduce; rank 2 called broadcast", 5),
    ],
)
def test_the_rank_that_holds_the_others_up_is_named(jobs, name, blamed, reason, code):
    job = jobs[name]
    codes, printed, reports = finish(job)
    assert len(reports) == 1
    assert printed.startswith(f"stall: rank {blamed} ")
    head, lines, *stacks = reports[0].split("\n\n")[:3] + reports[0].split("Python stacks of ")[1:]
    assert reason in head
    assert "limit of section 'step': " in head
    record = parse_record((job["logs"] / FOLDER / f"rank_{blamed:05d}.json").read_text())
    first = lines.splitlines()[0]
    assert first.startswith(f"> rank {blamed}, host {record.host}, pid {record.pid}, ")
    assert f": step 6, {'step' if name == 'mismatched' else 'data'} since " in first
    for rank in {0, 1, 2} - {blamed}:
        assert codes[rank] == EXIT_RESOURCE
        assert f"  rank {rank}, " in lines
    # One that was stopped may read the verdict while it writes its stacks.
    assert codes[blamed] == code or ("stopped" in name and codes[blamed] == EXIT_RESOURCE)
    blocks = {int(block.split(":")[0].removeprefix("rank ")): block for block in stacks if block.startswith("rank ")}
    assert next(iter(blocks)) == blamed
    if "gone" in reason:
        assert "(it wrote none)" in blocks[blamed]
    elif "fault" in job:
        assert f"in {job['fault'].__name__}" in blocks[blamed]
        assert f"in {job['fault'].__name__}" in printed
    for rank in {0, 1, 2} - {blamed}:
        assert "in meet" in blocks[rank]
        assert "heartbeat.py" not in blocks[rank]


def test_when_all_wait_in_one_place_nobody_is_picked(jobs):
    codes, printed, _ = finish(jobs["all quiet"])
    assert codes == {0: EXIT_RESOURCE, 1: EXIT_RESOURCE}
    assert printed.startswith("stall: ranks 0, 1 are not moving on from: start: weights (no rank is behind another)")


def test_a_rank_that_never_started_is_named(jobs):
    """An earlier job left a record of that rank; its process is gone."""
    codes, printed, _ = finish(jobs["not started"])
    assert codes == {0: EXIT_RESOURCE}
    assert printed.startswith("stall: rank 1 is missing: not started")


def test_a_stale_build_lock_is_named_early_and_in_the_report(jobs):
    job = jobs["stale lock"]
    _, printed, reports = finish(job)
    advice = f"rm -f {job['lock']}"
    early, late = printed.split("stall: ", 1)
    assert advice in early
    assert advice in late
    assert advice in reports[0]


def test_on_two_machines_one_reports_what_the_other_sees(jobs):
    codes, printed, reports = finish(jobs["two machines"])
    assert printed.count("stall: rank 3 is stopped") == 1
    assert len(reports) == 1
    assert "in stop" in reports[0]
    assert [codes[rank] for rank in range(3)] == [EXIT_RESOURCE] * 3
    assert codes[3] in (EXIT_RESOURCE, -signal.SIGKILL)


def test_machines_without_a_common_directory_judge_each_for_its_own_ranks(jobs):
    """The one with the late rank names it; the other one sees a job that stands, and knows whom it does not see."""
    codes, printed, _ = finish(jobs["apart"])
    assert codes == dict.fromkeys(range(4), EXIT_RESOURCE)
    assert "stall: rank 3 is not yet in collective 6 (all_reduce) of group world, in which rank 2 wait" in printed
    assert "stall: ranks 0, 1 are not moving on from: step 6, step (no rank is behind another)" in printed
    for machine, unseen in (("a", "2, 3"), ("b", "0, 1")):
        assert not left_of(jobs["apart"]["logs"] / machine)
        (report,) = (jobs["apart"]["logs"] / machine).glob("stall_*.txt")
        assert f"of ranks {unseen} nothing was ever seen here: " in report.read_text()


def test_what_an_earlier_job_left_is_not_believed(jobs, tmp_path):
    job = jobs["killed"]
    _, printed, reports = finish(job)
    again = start_job(job["logs"].parent, limits=PATIENT, logs=job["logs"], meeting=tmp_path)
    codes, printed_again, reports_again = finish(again)
    assert codes == {0: 0, 1: 0, 2: 0}
    assert (printed_again, reports_again) == (printed, reports)


def test_the_ranks_of_a_dead_launcher_are_ended(tmp_path):
    """Also one that sleeps in C with the interpreter's lock; the limit of the stall would be much later."""
    job = start_job(tmp_path, limits=Limits(start=100.0, interval=0.1), rank=1, fault=hold_the_lock)
    wait_for(lambda: len(list((job["logs"] / FOLDER).glob("rank_*.json"))) == 3 and monitors_of(job["logs"]))
    os.kill(job["launcher"], signal.SIGKILL)
    os.waitpid(job["launcher"], 0)
    assert not left_of(job["logs"])
    assert "the launcher is gone: ranks 0, 1, 2 on this machine end" in (tmp_path / "stderr").read_text()


RANK = """
import sys, time, pathlib
from megalite.guard.heartbeat import Heartbeat
from megalite.guard.stall import Limits
Heartbeat(pathlib.Path(sys.argv[1]), 0, 0, 1, limits=Limits(interval=0.1))
time.sleep(60)
"""
LAUNCHER = "import subprocess, sys; subprocess.run([sys.executable, *sys.argv[2:]])"


def test_the_runner_above_deepspeeds_launcher_counts_too(tmp_path):
    launcher = [LAUNCHER, "deepspeed.launcher.launch", "-c", RANK, str(tmp_path)]
    runner = subprocess.Popen([sys.executable, "-c", LAUNCHER, "runner", "-c", *launcher], stderr=subprocess.DEVNULL)
    wait_for(lambda: monitors_of(tmp_path))
    runner.kill()
    runner.wait()
    assert not left_of(tmp_path)


def test_a_wrapper_script_is_no_launcher():
    code = "from megalite.guard.proc import find_launchers; print([pid for pid, _ in find_launchers()])"
    wrapped = ["/bin/sh", "-c", f'"{sys.executable}" -c "{code}"; true']
    environment = {**os.environ, "LOCAL_RANK": "0"}
    found = json.loads(subprocess.run(wrapped, env=environment, capture_output=True, check=True).stdout)
    assert len(found) == 2
    assert found[1] == os.getpid()
    del environment["LOCAL_RANK"]
    found = json.loads(subprocess.run(wrapped, env=environment, capture_output=True, check=True).stdout)
    assert len(found) == 1
    assert found[0] != os.getpid()


def test_the_monitors_exit_code_and_its_deaf_ear(tmp_path, monkeypatch):
    """It fails after a stall; SIGTERM, which a launcher sends to all its processes, is not for it."""
    monkeypatch.setattr(heartbeat_room, "_start_monitor", lambda settings: None)
    settings = MonitorSettings(str(tmp_path), 0, 1, name_machine(), Limits(start=1.0, floor=0.5, interval=0.1))
    if (pid := os.fork()) == 0:
        Heartbeat(tmp_path, 0, 0, 1, limits=settings.limits)
        time.sleep(SLEEP)
        os._exit(0)
    wait_for(lambda: (tmp_path / FOLDER / "rank_00000.json").exists())
    monkeypatch.undo()
    monitor = heartbeat_room._start_monitor(settings)
    assert monitor is not None
    wait_for(lambda: ignores(monitor.pid, signal.SIGTERM))
    monitor.terminate()
    assert monitor.wait(20) == EXIT_RESOURCE
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == EXIT_RESOURCE


def ignores(pid, number):
    status = Path(f"/proc/{pid}/status").read_text()
    return int(status.split("SigIgn:")[1].split()[0], 16) >> (number - 1) & 1


def wait_for(condition, seconds=60.0):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.fixture
def alone(tmp_path):
    """A heartbeat of this process, without a monitor, and its record as it stands."""
    heartbeat = Heartbeat(tmp_path, 3, 3, 4, limits=Limits(interval=0.05))
    yield heartbeat, lambda: parse_record((tmp_path / FOLDER / "rank_00003.json").read_text())
    if not heartbeat._stop.is_set():
        heartbeat.close()


def test_a_record_tells_where_the_rank_stands(alone):
    heartbeat, read = alone
    first = read()
    assert (first.rank, first.world_size, first.pid, first.place) == (3, 4, os.getpid(), "start")
    assert (first.num_steps, first.start) == (0, read_stat(os.getpid()).start)
    heartbeat.enter("start: engine")
    for step in (41, 42):
        heartbeat.enter("data", step)
        heartbeat.enter("step")
    wait_for(lambda: read() and read().progress == 5)
    assert (read().place, read().num_steps, read().num_phases) == ("step 42, step", 2, 1)
    heartbeat.close()
    assert (read().phase, read().step) == ("end", 42)


def test_collectives_are_asked_for_only_while_the_rank_does_not_move(alone):
    heartbeat, read = alone
    asked = []
    heartbeat.watch_collectives(lambda: asked.append(1) or {"world": [(1, "all_reduce " + "x" * 3000)]})
    wait_for(lambda: read() and read().collectives)
    assert read().last("world") == 1
    heartbeat.watch_collectives(lambda: {})
    wait_for(lambda: read() and not read().collectives)  # a short record covers a long one
    heartbeat.watch_collectives(lambda: asked.append(1) or {})
    for _ in range(50):
        count = len(asked)
        heartbeat.enter("step")
        heartbeat._publish()
        if len(asked) == count:
            return
    pytest.fail("asked for with every record of a rank that moves")


def test_a_watchdog_in_trouble_is_no_trouble_for_the_rank(alone, tmp_path, caplog):
    heartbeat, read = alone
    heartbeat.watch_collectives(lambda: 1 / 0)
    published = read().published
    wait_for(lambda: read() and read().published > published + 2)
    (tmp_path / FOLDER / "rank_00003.json").unlink()
    (tmp_path / FOLDER).rename(tmp_path / "away")
    heartbeat._publish()
    heartbeat.close()


def test_a_directory_that_takes_no_heartbeat_is_one_error(tmp_path):
    (tmp_path / FOLDER).touch()
    with pytest.raises(ResourceError, match="no heartbeat can be written"):
        Heartbeat(tmp_path, 0, 0, 1)


def test_a_main_thread_that_cannot_be_interrupted_is_seen_by_another(alone, tmp_path, monkeypatch):
    """By any other, a native one too, which Python does not call the current one."""
    _, read = alone
    stacks = tmp_path / FOLDER / "rank_00003.stacks"
    by_itself = f"Current thread 0x{threading.main_thread().ident:016x}"
    for state in ("S", "D"):
        monkeypatch.setattr("megalite.guard.proc.read_state", lambda pid, start, state=state: state)
        stacks.write_bytes(b"")
        kill_main_thread(os.getpid(), 0, read().signal)
        wait_for(lambda: "test_a_main_thread" in stacks.read_text())
        assert (by_itself in stacks.read_text()) == (state == "S")


def test_a_thread_that_blocks_the_signal_is_not_asked(alone, tmp_path, monkeypatch):
    """An allocator's background thread blocks all signals: it would be pending there for ever."""
    _, read = alone
    monkeypatch.setattr("megalite.guard.proc.read_state", lambda pid, start: "D")
    end, ready = threading.Event(), threading.Event()

    def block():
        signal.pthread_sigmask(signal.SIG_BLOCK, set(signal.valid_signals()))
        ready.set()
        end.wait()

    thread = threading.Thread(target=block)
    thread.start()
    ready.wait()
    blocking = thread.native_id

    def list_tasks(path):
        tasks = [path / str(blocking), *(p for p in sorted(paths(path)) if p.name != str(blocking))]
        return iter(tasks if path.name == "task" else paths(path))

    paths = Path.iterdir
    monkeypatch.setattr(Path, "iterdir", list_tasks)
    try:
        kill_main_thread(os.getpid(), 0, read().signal)
        wait_for(lambda: "test_a_thread_that_blocks" in (tmp_path / FOLDER / "rank_00003.stacks").read_text(), 10)
    finally:
        end.set()
        thread.join()


def test_launchers_of_this_process_are_alive():
    assert all(read_state(pid, start) != GONE for pid, start in find_launchers())
    assert read_state(os.getpid(), read_stat(os.getpid()).start + 1) == GONE, "another process with the same pid"
