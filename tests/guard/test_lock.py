"""A second training in one run directory is refused, whether the first ended well or was killed."""

import os
import signal
import time

import pytest

from megalite.errors import ResourceError
from megalite.guard.lock import RunLock


def test_a_second_lock_is_refused_until_the_first_is_closed(tmp_path):
    first = RunLock(tmp_path / "run")
    with pytest.raises(ResourceError, match=rf"in use by another training \(process {os.getpid()} on "):
        RunLock(tmp_path / "run")
    first.close()
    RunLock(tmp_path / "run").close()


def test_the_lock_of_a_killed_process_is_free(tmp_path):
    pid = os.fork()
    if pid == 0:
        lock = RunLock(tmp_path)
        (tmp_path / "held").touch()
        time.sleep(60)
        lock.close()
        os._exit(0)
    while not (tmp_path / "held").exists():
        time.sleep(0.01)
    with pytest.raises(ResourceError):
        RunLock(tmp_path)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    RunLock(tmp_path).close()


def test_a_lock_on_a_full_disk_is_one_error(tmp_path):
    (tmp_path / "run.lock").symlink_to("/dev/full")
    with pytest.raises(ResourceError, match=r"nothing can be written in .*Is the disk full"):
        RunLock(tmp_path)


def test_a_file_in_the_place_of_the_directory_is_one_error(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ResourceError, match="cannot be used as a directory"):
        RunLock(tmp_path / "file")
