"""What Linux tells of processes under /proc: whether one still is the one we knew, its state, who started it."""

import contextlib
import ctypes
import os
from pathlib import Path
from typing import NamedTuple

GONE = "gone"


class Stat(NamedTuple):
    """The part of /proc/<pid>/stat that we read (proc_pid_stat(5))."""

    state: str  # R running, S sleeping, D uninterruptible, T stopped, t stopped by a debugger, Z zombie
    parent: int
    start: int  # clock ticks after boot: with the pid it names a process for good, although pids are used again


def read_stat(pid: int) -> Stat | None:
    """None when there is no such process."""
    fields = _read(pid, "stat").rpartition(b")")[2].split()  # the name before ")" may hold anything
    return Stat(fields[0].decode(), int(fields[1]), int(fields[19])) if fields else None


def read_state(pid: int, start: int) -> str:
    """The state's letter; `GONE` for a zombie, for no process, and for another one that got the same pid."""
    stat = read_stat(pid)
    return GONE if stat is None or stat.start != start or stat.state in "ZX" else stat.state


def kill(pid: int, start: int, number: int) -> None:
    """Send signal `number`, unless the process is gone."""
    if read_state(pid, start) != GONE:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)


def kill_main_thread(pid: int, start: int, number: int) -> None:
    """Send signal `number` so that its handler finds the main thread where it stood, also if the process was stopped.

    A signal to a process may be taken by any thread, when others have gone on already. Where the main thread waits in
    the kernel, uninterruptible, another one gets it: one that does not block it, as allocators' own threads do.
    """
    state = read_state(pid, start)
    if state == GONE:
        return
    others = (int(task.name) for task in Path(f"/proc/{pid}/task").iterdir() if task.name != str(pid))
    thread = next((task for task in others if not _blocks(pid, task, number)), pid) if state == "D" else pid
    try:
        ctypes.CDLL(None).tgkill(pid, thread, number)
    except AttributeError:  # glibc before 2.30
        kill(pid, start, number)


def _blocks(pid: int, thread: int, number: int) -> bool:
    """Whether the thread's mask keeps the signal from it; so does one that has ended."""
    mask = _read(pid, f"task/{thread}/status").partition(b"SigBlk:")[2].split()
    return not mask or bool(int(mask[0], 16) >> (number - 1) & 1)


def find_launchers() -> list[tuple[int, int]]:
    """(pid, start) of the processes without which this rank is an orphan.

    The launcher is the first ancestor that was not itself started as a rank (a wrapper script was: it has LOCAL_RANK in
    its environment). DeepSpeed's launcher on each machine has one of its own, and does not notice its death.
    """
    found, pid = [], os.getppid()
    while pid > 1 and (stat := read_stat(pid)):
        found.append((pid, stat.start))
        is_wrapper = b"\0LOCAL_RANK=" in b"\0" + _read(pid, "environ")
        if not is_wrapper and b"deepspeed.launcher.launch" not in _read(pid, "cmdline"):
            break
        pid = stat.parent
    return found


def name_machine() -> str:
    """Equal for two processes exactly if they see each other under /proc: containers may share a host and its name."""
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return f"{os.uname().nodename}/{boot}/{os.stat('/proc/self/ns/pid').st_ino}"


def _read(pid: int, name: str) -> bytes:
    try:
        return Path(f"/proc/{pid}/{name}").read_bytes()
    except OSError:
        return b""
