"""The checks of `megalite doctor`: each looks at one thing and says what it found and, where needed, what to do."""

import importlib.metadata
import os
import platform
import resource
import shlex
import shutil
import socket
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import psutil
from packaging.requirements import Requirement
from packaging.version import Version

from megalite.config.place import count_cores
from megalite.config.schema import DoctorConfig

Status = Literal["ok", "warn", "fail"]
_GIB = 2**30

# Why an older version is not only old. The ranges themselves stand in setup.py.
_ADVISORIES = {
    "torch": "before 2.10, loading a crafted checkpoint corrupts memory (CVE-2026-24747)",
    "sentencepiece": "before 0.2.3, a crafted model crashes the process (CVE-2026-1260 and its successors)",
    "pyarrow": "before 23.0.1, a crafted file is read after free (CVE-2026-25087)",
    "wandb": "before 0.28.2, the API key stood on a command line that every user can list",
    "transformers": "before 5.10, a model's config file can run code and write files (CVE-2026-4372, CVE-2026-9856)",
    "hydra-core": "before 1.3.8, `_target_` in a config starts more programs than later versions allow",
}


@dataclass(frozen=True)
class Check:
    """One line of the table: `fix` says what to do, and is empty when there is nothing to do."""

    name: str
    status: Status
    found: str
    fix: str = ""


def check_python(config: DoctorConfig) -> Iterator[Check]:
    """The interpreter, for the reader: an older one than megalite needs could not have installed it."""
    yield Check("Python", "ok", f"{platform.python_version()} ({sys.executable})")


def check_packages(config: DoctorConfig) -> Iterator[Check]:
    """Installed versions against the ranges in this package's own metadata; extras only where they are installed."""
    fine = []
    for requirement in _requirements():
        name, needed = requirement.name, str(requirement.specifier)
        is_extra = requirement.marker is not None
        try:
            version = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            if not is_extra:
                yield Check(name, "fail", "not installed", f"pip install '{name}{needed}'")
            continue
        if requirement.specifier.contains(version, prereleases=True):
            fine.append(f"{name} {version}")
        elif any(Version(version) < Version(part.version.removesuffix(".*")) for part in requirement.specifier):
            why = f" ({_ADVISORIES[name]})" if name in _ADVISORIES else ""
            yield Check(name, "fail", f"{version}, needed {needed}{why}", f"pip install '{name}{needed}'")
        else:
            yield Check(
                name, "warn", f"{version}, tested {needed}", f"pip install '{name}{needed}' if something breaks"
            )
    if fine:
        yield Check("packages", "ok", ", ".join(fine))


def check_device(config: DoctorConfig) -> Iterator[Check]:
    """What torch computes on, and in which precisions."""
    try:
        import torch
    except ImportError as error:
        yield Check("device", "fail", f"torch cannot be imported: {error}", "install torch again")
        return
    if not torch.cuda.is_available():
        if Path("/dev/nvidiactl").exists():
            build = f"torch {torch.__version__} is built for CUDA {torch.version.cuda}"
            fix = "install a torch build for this driver (pytorch.org/get-started), or a newer driver"
            yield Check("device", "fail", f"an NVIDIA device is here, but {build} and cannot use it", fix)
        else:
            yield Check("device", "ok", "CPU, no GPU (engine.precision=auto is fp32 here)")
        return
    count, properties = torch.cuda.device_count(), torch.cuda.get_device_properties(0)
    nccl = ".".join(map(str, torch.cuda.nccl.version()))
    found = (
        f"{count} × {properties.name}, {properties.total_memory / _GIB:.0f} GiB, CUDA {torch.version.cuda}, NCCL {nccl}"
    )
    if torch.cuda.is_bf16_supported(including_emulation=False):
        yield Check("device", "ok", f"{found}, bf16")
    else:
        yield Check("device", "warn", f"{found}, no bf16", "train with engine.precision=fp16")


def check_stale_locks(config: DoctorConfig) -> Iterator[Check]:
    """Locks that a killed build of a torch extension left behind: every later start would wait for them for ever."""
    root = _extensions_folder()
    locks = sorted(root.rglob("lock")) if root.is_dir() else []
    if not locks:
        yield Check("build locks", "ok", f"none in {root}")
        return
    holders = _open_files()
    for lock in locks:
        age = _age(lock)
        if str(lock.resolve()) in holders:
            yield Check("build lock", "ok", f"{lock}, {age} old, held by process {holders[str(lock.resolve())]}")
        else:
            found = f"{lock}, {age} old, and no process here holds it: DeepSpeed would hang at its start"
            yield Check("build lock", "fail", found, f"rm {shlex.quote(str(lock))}")


def check_ports(config: DoctorConfig) -> Iterator[Check]:
    """Ranks meet on the loopback; torchrun and deepspeed use a fixed port."""
    if _bind_error(0):
        yield Check(
            "loopback", "fail", f"cannot listen on 127.0.0.1: {_bind_error(0)}", "allow processes to listen there"
        )
        return
    yield Check("loopback", "ok", "can listen on 127.0.0.1")
    if error := _bind_error(config.port):
        fix = f"give torchrun or deepspeed another --master_port; `ss -ltnp 'sport = :{config.port}'` tells who has it"
        yield Check(f"port {config.port}", "warn", error, fix)
    else:
        yield Check(f"port {config.port}", "ok", "free")


def check_disk(config: DoctorConfig) -> Iterator[Check]:
    """Room for checkpoints on the disk that holds, or will hold, run_dir."""
    folder = existing_folder(config.run_dir)
    free = shutil.disk_usage(folder).free / _GIB
    found = f"{free:.1f} GiB free at {folder}"
    if not os.access(folder, os.W_OK):
        yield Check("disk", "fail", f"{folder} is not writable", "choose another run_dir, or change its permissions")
    elif free < min(1.0, config.min_free_gib):
        yield Check("disk", "fail", found, "free some space, or choose a run_dir on another disk")
    elif free < config.min_free_gib:
        yield Check(
            "disk",
            "warn",
            found,
            "free some space: a checkpoint takes 12 bytes for each parameter, and checkpoint.keep of them stay",
        )
    else:
        yield Check("disk", "ok", found)


def check_shared_memory(config: DoctorConfig) -> Iterator[Check]:
    """NCCL passes data between the GPUs of a host through /dev/shm, which containers keep at 64 MiB."""
    folder = Path("/dev/shm")
    if not folder.is_dir():
        yield Check(
            "shared memory", "warn", "there is no /dev/shm", "mount one where several GPUs of a host train together"
        )
        return
    size = shutil.disk_usage(folder).total / _GIB
    if size < 1:
        yield Check("shared memory", "warn", f"{size:.2f} GiB", "docker run --shm-size=8g, or --ipc=host")
    else:
        yield Check("shared memory", "ok", f"{size:.1f} GiB")


def check_processor(config: DoctorConfig) -> Iterator[Check]:
    """Cores that this process may use, and whether the thread count fits."""
    cores = count_cores()
    threads = os.environ.get("OMP_NUM_THREADS", "")
    found = f"{cores} cores, OMP_NUM_THREADS {threads or 'not set'}"
    if threads and not threads.isdecimal():
        yield Check("processor", "warn", found, "set OMP_NUM_THREADS to a whole number, or unset it")
    elif threads and int(threads) > cores:
        yield Check("processor", "warn", found, f"export OMP_NUM_THREADS={cores}")
    else:
        yield Check("processor", "ok", found)
    memory = psutil.virtual_memory()
    yield Check("memory", "ok", f"{memory.available / _GIB:.1f} of {memory.total / _GIB:.1f} GiB available")


def check_secrets(config: DoctorConfig) -> Iterator[Check]:
    """Whether keys are there; their values are looked at by nobody."""
    for name, purpose in (
        ("WANDB_API_KEY", "logging.wandb.mode=online, unless `wandb login` was run"),
        ("HF_TOKEN", "gated weights of Hugging Face"),
    ):
        is_set = bool(os.environ.get(name))
        yield Check(name, "ok", "set" if is_set else f"not set; needed only for {purpose}")


def check_compiler(config: DoctorConfig) -> Iterator[Check]:
    """torch.compile builds its kernels with a C++ compiler."""
    names = [os.environ.get("CXX", ""), "g++", "clang++", "c++"]
    found = next((path for name in names if name and (path := shutil.which(name))), None)
    if found:
        yield Check("C++ compiler", "ok", found)
    else:
        fix = "apt-get install g++; needed only for engine.compile=true"
        yield Check("C++ compiler", "warn", "not found", fix)


def check_open_files(config: DoctorConfig) -> Iterator[Check]:
    """Shards, sockets and logs of a rank are open at once."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if 0 <= soft < 1024:
        yield Check("open files", "warn", f"limit {soft}", f"ulimit -n {min(hard, 65536) if hard > 0 else 65536}")
    else:
        yield Check("open files", "ok", f"limit {'none' if soft < 0 else soft}")


def existing_folder(path: str) -> Path:
    """The folder `path`, or the nearest above it that exists."""
    folder = Path(path).absolute()
    while not folder.exists():
        folder = folder.parent
    return folder


def _requirements() -> list[Requirement]:
    """What megalite's own metadata asks for, each package once, the core before the extras."""
    requirements: dict[str, Requirement] = {}
    for text in importlib.metadata.requires("megalite") or []:
        requirement = Requirement(text)
        requirements.setdefault(requirement.name, requirement)
    return list(requirements.values())


def _extensions_folder() -> Path:
    """Where torch builds extensions: torch.utils.cpp_extension.get_default_build_root, without importing torch."""
    if folder := os.environ.get("TORCH_EXTENSIONS_DIR"):
        return Path(folder)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "torch_extensions"


def _open_files() -> dict[str, int]:
    """Path -> process id of every file that a process visible to us holds open."""
    return {
        file.path: process.info["pid"]
        for process in psutil.process_iter(["pid", "open_files"])
        for file in process.info["open_files"] or []
    }


def _age(path: Path) -> str:
    minutes = (time.time() - path.stat().st_mtime) / 60
    return f"{minutes:.0f} min" if minutes < 120 else f"{minutes / 60:.0f} h"


def _bind_error(port: int) -> str:
    """Why nothing can listen on this port of the loopback; empty when something can."""
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind(("127.0.0.1", port))
        except OSError as error:
            return error.strerror or str(error)
    return ""
