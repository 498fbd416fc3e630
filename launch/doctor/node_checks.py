"""What `megalite doctor` looks at that matters once a host trains with others: network, clock, disk, variables."""

import ctypes
import fcntl
import json
import os
import resource
import secrets
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import psutil

from megalite.config.schema import DoctorConfig

from .machine_checks import Check, existing_folder

_IN_SEVERAL_HOSTS = "matters where several hosts train together"
_TIME_ERROR = 5  # adjtimex(2): the clock is not synchronised
_INFINIBAND = Path("/sys/class/infiniband")
# A lock is tried by another process: over NFS, locks of one process never exclude each other.
_TRY_LOCK = """
import fcntl, sys
try:
    fcntl.flock(open(sys.argv[1]), fcntl.LOCK_EX | fcntl.LOCK_NB)
except BlockingIOError:
    sys.exit(7)
"""
_KEPT_OUT = 7

# What the variables mean that change how ranks talk (NCCL's and gloo's documentation), and which of them slow it down.
_VARIABLES = {
    "NCCL_DEBUG": "how much NCCL prints",
    "NCCL_SOCKET_IFNAME": "interfaces that NCCL uses",
    "NCCL_IB_HCA": "InfiniBand devices that NCCL uses",
    "NCCL_IB_DISABLE": "InfiniBand off: NCCL goes through sockets",
    "NCCL_P2P_DISABLE": "no direct copies between GPUs of a host",
    "NCCL_SHM_DISABLE": "no shared memory between ranks of a host",
    "NCCL_NET_GDR_LEVEL": "how far apart GPU and network card may be for direct copies",
    "NCCL_ALGO": "algorithms that NCCL may choose from",
    "NCCL_PROTO": "protocols that NCCL may choose from",
    "GLOO_SOCKET_IFNAME": "the interface that gloo listens on",
    "TP_SOCKET_IFNAME": "the interface that TensorPipe listens on",
    "TORCH_EXTENSIONS_DIR": "where DeepSpeed's operations are built",
    "TORCH_NCCL_BLOCKING_WAIT": "waits for NCCL block the host",
    "TORCH_DISTRIBUTED_DEBUG": "checks of every collective",
    "CUDA_LAUNCH_BLOCKING": "every kernel is waited for",
}
_SLOW = {  # the values that switch something off
    "NCCL_IB_DISABLE": "1",
    "NCCL_P2P_DISABLE": "1",
    "NCCL_SHM_DISABLE": "1",
    "CUDA_LAUNCH_BLOCKING": "1",
    "TORCH_DISTRIBUTED_DEBUG": "DETAIL",
}
_PREFIXES = ("NCCL_", "GLOO_", "TORCH_NCCL_")


def check_interfaces(config: DoctorConfig) -> Iterator[Check]:
    """The ways that lead to other hosts."""
    found = []
    for name, addresses in interface_addresses().items():
        speed = psutil.net_if_stats()[name].speed if name in psutil.net_if_stats() else 0
        rate = f" ({speed / 1000:g} Gbit/s)" if speed else ""
        found.append(f"{name} {', '.join(addresses)}{rate}")
    if found:
        yield Check("interfaces", "ok", "; ".join(found))
    else:
        fix = f"attach a network; {_IN_SEVERAL_HOSTS}, one host trains without"
        yield Check("interfaces", "warn", "none but the loopback is up and has an address", fix)


def check_host_name(config: DoctorConfig) -> Iterator[Check]:
    """What this host's own name stands for: programs that do not choose an interface listen there."""
    name = socket.gethostname()
    own = {address for addresses in interface_addresses().values() for address in addresses}
    try:
        found = sorted({str(info[4][0]) for info in socket.getaddrinfo(name, None)})
    except OSError as error:
        fix = f"name {name} in /etc/hosts or in DNS; give launch.address as an IP address meanwhile"
        yield Check("host name", "warn", f"{name} does not resolve: {error.strerror or error}", fix)
        return
    told = f"{name} is {', '.join(found)}"
    if own & set(found) or not own:
        yield Check("host name", "ok", told)
    elif all(address.startswith("127.") or address == "::1" for address in found):
        # Debian writes 127.0.1.1 into /etc/hosts, and gloo left alone would listen there, where no other host comes.
        fix = (
            f"put {min(own)} beside {name} in /etc/hosts; MegaLite takes the way that leads to the first host: only "
            "a launch.address or MASTER_ADDR given by this name goes wrong"
        )
        yield Check("host name", "warn", f"{told}: the loopback, where no other host comes", fix)
    else:
        yield Check("host name", "warn", f"{told}: no address of this host", f"mend {name} in /etc/hosts or in DNS")


def check_clock(config: DoctorConfig) -> Iterator[Check]:
    """Whether something sets the clock; how far hosts are apart only hosts together can tell."""
    state = _clock_state()
    if state == _TIME_ERROR:
        fix = f"timedatectl set-ntp true, or install chrony; {_IN_SEVERAL_HOSTS}"
        yield Check("clock", "warn", "nothing synchronises it", fix)
    elif state >= 0:
        yield Check("clock", "ok", "synchronised")
    else:
        yield Check("clock", "ok", "the kernel does not tell whether it is synchronised")


def check_variables(config: DoctorConfig) -> Iterator[Check]:
    """Variables of NCCL, gloo and torch that are set here, what they mean, and what does not fit this host."""
    names = [name for name in sorted(os.environ) if name in _VARIABLES or name.startswith(_PREFIXES)]
    if not names:
        yield Check("variables", "ok", "none of NCCL, gloo or torch is set")
    for name in names:
        value = os.environ[name]
        found = f"{value}: {_VARIABLES[name]}" if name in _VARIABLES else value
        unset = f"unset {name}"
        if name.endswith("_SOCKET_IFNAME") and (missing := _missing_interfaces(value)):
            have = ", ".join(sorted(psutil.net_if_addrs()))
            yield Check(name, "warn", f"{found}; there is no {missing} here, there are {have}", unset)
        elif _SLOW.get(name) == value:
            yield Check(name, "warn", f"{found}: slower", f"{unset}, if it was set for one search for an error")
        else:
            yield Check(name, "ok", found)


def check_infiniband(config: DoctorConfig) -> Iterator[Check]:
    """InfiniBand ports, and memory that may be locked for them; nothing is said where there are none."""
    ports = sorted(_INFINIBAND.glob("*/ports/*"))
    for port in ports:
        state = _read(port / "state").partition(":")[2].strip() or "state not known"
        name, rate = f"{port.parent.parent.name} port {port.name}", _read(port / "rate").strip()
        if state == "ACTIVE":
            yield Check("InfiniBand", "ok", f"{name}: {rate}")
        else:
            yield Check("InfiniBand", "warn", f"{name}: {state}", "check cable and subnet manager, or leave it unused")
    if ports:
        soft = resource.getrlimit(resource.RLIMIT_MEMLOCK)[0]
        if soft == resource.RLIM_INFINITY:
            yield Check("locked memory", "ok", "no limit")
        else:
            fix = "ulimit -l unlimited; under Slurm PropagateResourceLimitsExcept=MEMLOCK in slurm.conf"
            yield Check("locked memory", "warn", f"limit {soft >> 10} KiB: InfiniBand needs more", fix)


def check_run_dir(config: DoctorConfig) -> Iterator[Check]:
    """Whether the disk of run_dir does what runs live by: rename, so that files are whole; lock, so that one trains."""
    folder = existing_folder(config.run_dir)
    if not os.access(folder, os.W_OK):
        return  # the check of the disk has said so
    kind = _file_system(folder)
    path = folder / f".doctor-{secrets.token_hex(8)}"
    temporary = path.with_suffix(".tmp")
    other = "choose a run_dir on another file system"
    try:
        try:
            for text in (b"first", b"second"):
                _write(temporary, text)
                temporary.rename(path)
            is_new = path.read_bytes() == b"second"
            problem = _lock_problem(path)
        finally:
            temporary.unlink(missing_ok=True)
            path.unlink(missing_ok=True)
    except OSError as error:
        yield Check("rename", "fail", f"cannot write and rename in {folder} ({kind}): {error.strerror or error}", other)
        return
    if is_new:
        yield Check("rename", "ok", f"holds in {folder} ({kind})")
    else:
        yield Check("rename", "fail", f"{folder} ({kind}) shows old data after a rename", other)
    if problem:
        fix = f"mount it with locks (Lustre: -o flock; NFS: without nolock), or {other}"
        yield Check("lock", "fail", f"{folder} ({kind}): {problem}: nothing keeps two trainings apart", fix)
    else:
        yield Check("lock", "ok", f"holds in {folder}")


def check_all_reduce(config: DoctorConfig) -> Iterator[Check]:
    """How fast ranks on this host add up a tensor; only where asked for, for it starts them."""
    if config.nproc_per_node is None:
        return
    from megalite.bandwidth import Bandwidth, measure

    from ..spawn import spawn_ranks

    with tempfile.TemporaryDirectory(prefix="megalite-doctor-") as name:
        result = Path(name) / "result.json"
        code = spawn_ranks(lambda place: measure(place, config.size_mib << 20, result), config.nproc_per_node)
        if code:
            yield Check("all-reduce", "fail", f"the ranks ended with exit code {code}", "see what they said above")
        else:
            yield Check("all-reduce", "ok", str(Bandwidth(**json.loads(result.read_text(encoding="utf-8")))))


def interface_addresses() -> dict[str, list[str]]:
    """Interfaces that are up, without the loopback, and their IP addresses without those that hold on one link only."""
    stats = psutil.net_if_stats()
    found = {
        name: [a.address for a in addresses if a.family in (socket.AF_INET, socket.AF_INET6) and "%" not in a.address]
        for name, addresses in psutil.net_if_addrs().items()
        if name in stats and stats[name].isup
    }
    return {name: sorted(own) for name, own in found.items() if own and not {"127.0.0.1", "::1"} & set(own)}


def _missing_interfaces(value: str) -> str:
    """The first of NCCL's or gloo's interfaces that is not here: beginnings of names, after `^` those to leave out."""
    if value.startswith("^"):
        return ""
    names = psutil.net_if_addrs()
    parts = [part for part in value.removeprefix("=").split(",") if part]
    return next((part for part in parts if not any(name.startswith(part) for name in names)), "")


def _clock_state() -> int:
    """What adjtimex(2) returns when it is asked to change nothing; -1 where it is not allowed, or not there."""
    try:
        return int(ctypes.CDLL(None).adjtimex(ctypes.create_string_buffer(1024)))
    except AttributeError:
        return -1


def _file_system(folder: Path) -> str:
    """The type of the file system that `folder` lies on, such as ext4 or nfs4."""
    mounts = [part for part in psutil.disk_partitions(all=True) if folder.resolve().is_relative_to(part.mountpoint)]
    return max(mounts, key=lambda part: len(part.mountpoint)).fstype if mounts else "type not known"


def _lock_problem(path: Path) -> str:
    """What is wrong with locks on this file system; empty when they hold."""
    with open(path, encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            return f"it takes no lock ({error.strerror or error})"
        done = subprocess.run([sys.executable, "-S", "-c", _TRY_LOCK, str(path)], capture_output=True, check=False)
    return "" if done.returncode == _KEPT_OUT else "a second process gets a lock that is held"


def _write(path: Path, text: bytes) -> None:
    with open(path, "wb") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError:
        return ""
