"""What hostile files are made of, and a child in which they are read."""

import io
import os
import pickle
import resource
import zipfile
from collections.abc import Callable
from pathlib import Path

from megalite.errors import MegaliteError

MEMORY = 512 << 20  # what reading a hostile file may take, beside what the process has
SECONDS = 5  # of CPU time


class Payload:
    """Unpickled, it makes the folder `canary`."""

    def __init__(self, canary):
        self.canary = canary

    def __reduce__(self):
        return os.mkdir, (str(self.canary),)


def foreign_files(canary: Path) -> dict[str, bytes]:
    """Name -> content, which no reader of ours should know."""
    bomb = io.BytesIO()
    with zipfile.ZipFile(bomb, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", b"\0" * (64 << 20))
    return {
        "a pickle": pickle.dumps(Payload(canary)),
        "a pickle of the newest protocol": pickle.dumps(Payload(canary), protocol=5),
        "a zip bomb": bomb.getvalue(),
        "nothing": b"",
        "seven bytes": b"\1" * 7,
        "a script": b"#!/bin/sh\nmkdir " + os.fsencode(str(canary)) + b"\n",
        "an hdf5 file": b"\x89HDF\r\n\x1a\n" + bytes(600),
    }


def refused(work: Callable[[], object]) -> int:
    """Run `work` in a child with little memory: 0 when it ends with a `MegaliteError`, 7 without, else how it died."""
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
            resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, used + MEMORY))
            resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, SECONDS))
            try:
                work()
                code = 7
            except MegaliteError:
                code = 0
        except BaseException as error:
            os.write(2, repr(error).encode())
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
