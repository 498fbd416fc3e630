"""Each check sees the fault that is planted for it, and stays quiet without it."""

import importlib.metadata
import os
import socket
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from megalite.bandwidth import Bandwidth
from megalite.config.schema import DoctorConfig
from megalite.errors import EXIT_RESOURCE, ConfigError
from megalite.launch.doctor import machine_checks as checks
from megalite.launch.doctor import node_checks as nodes
from megalite.launch.doctor.command import doctor


def only(found, name=None):
    (check,) = [check for check in found if name is None or check.name == name]
    return check


@pytest.fixture
def config(tmp_path):
    return DoctorConfig(run_dir=str(tmp_path / "not" / "yet"), min_free_gib=0)


@pytest.fixture
def versions(monkeypatch):
    """Pretend that other versions are installed."""
    pretended = {}
    real = importlib.metadata.version

    def version(name):
        if pretended.get(name, "") is None:
            raise importlib.metadata.PackageNotFoundError(name)
        return pretended.get(name) or real(name)

    monkeypatch.setattr(importlib.metadata, "version", version)
    return pretended


@pytest.mark.parametrize(
    ("name", "version", "advisory"),
    [
        ("torch", "2.9.1", "CVE-2026-24747"),
        ("pyarrow", "23.0.0", "CVE-2026-25087"),
        ("sentencepiece", "0.2.1", "CVE-2026-1260"),
        ("wandb", "0.28.1", "API key"),
        ("transformers", "5.9.0", "CVE-2026-9856"),
        ("hydra-core", "1.3.2", "_target_"),
        ("deepspeed", "0.18.4", "needed ==0.19.*"),
    ],
)
def test_a_version_below_the_safe_one_fails_and_says_why(versions, config, name, version, advisory):
    versions[name] = version
    check = only(checks.check_packages(config), name)
    assert check.status == "fail"
    assert check.found.startswith(version)
    assert advisory in check.found
    assert check.fix.startswith(f"pip install '{name}")


def test_a_version_beyond_the_tested_range_is_a_warning(versions, config):
    versions["deepspeed"] = "0.20.1"
    assert only(checks.check_packages(config), "deepspeed").status == "warn"


def test_a_missing_package_fails_unless_an_extra_brings_it(versions, config):
    versions["xxhash"] = versions["transformers"] = None
    found = list(checks.check_packages(config))
    assert only(found, "xxhash").status == "fail"
    assert not [check for check in found if check.name == "transformers"]


def test_local_builds_count_as_their_release(versions, config):
    versions["torch"] = "2.11.0+cu130"
    assert "torch 2.11.0+cu130" in only(checks.check_packages(config), "packages").found


@pytest.fixture
def extensions(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "extensions"))
    folder = tmp_path / "extensions" / "py311_cpu" / "cpu adam"
    folder.mkdir(parents=True)
    return folder


def test_a_lock_of_a_dead_build_fails_and_one_of_a_live_build_does_not(extensions, config):
    assert only(checks.check_stale_locks(config)).status == "ok"
    lock = extensions / "lock"
    # As torch does it (torch/utils/file_baton.py): the builder creates the file and keeps it open.
    hold = f"os.open({str(lock)!r}, os.O_CREAT | os.O_EXCL); print('held', flush=True); time.sleep(60)"
    with subprocess.Popen([sys.executable, "-c", f"import os, time; {hold}"], stdout=subprocess.PIPE) as process:
        process.stdout.readline()
        live = only(checks.check_stale_locks(config))
        process.kill()
    assert (live.status, live.fix) == ("ok", "")
    assert f"held by process {process.pid}" in live.found
    check = only(checks.check_stale_locks(config))
    assert check.status == "fail"
    assert "DeepSpeed would hang" in check.found
    subprocess.run(check.fix, shell=True, check=True)  # noqa: S602 - the fix is what a user types
    assert not lock.exists()
    assert only(checks.check_stale_locks(config)).status == "ok"


def test_the_extensions_folder_is_the_one_that_torch_uses(monkeypatch, tmp_path):
    from torch.utils.cpp_extension import get_default_build_root

    for cache in (None, str(tmp_path)):
        monkeypatch.delenv("TORCH_EXTENSIONS_DIR", raising=False)
        monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
        if cache:
            monkeypatch.setenv("XDG_CACHE_HOME", cache)
        assert os.path.realpath(checks._extensions_folder()) == get_default_build_root()


def test_an_occupied_port_is_a_warning():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        port = listener.getsockname()[1]
        taken = only(checks.check_ports(DoctorConfig(port=port)), f"port {port}")
        assert (taken.status, taken.found) == ("warn", "Address already in use")
        assert "--master_port" in taken.fix
    assert only(checks.check_ports(DoctorConfig(port=port)), f"port {port}").status == "ok"


def test_a_closed_loopback_fails(monkeypatch, config):
    monkeypatch.setattr(checks, "_bind_error", lambda port: "Operation not permitted")
    assert only(checks.check_ports(config)).status == "fail"


@pytest.mark.parametrize(("free", "status"), [(0.5, "fail"), (5, "warn"), (50, "ok")])
def test_a_full_disk(monkeypatch, tmp_path, free, status):
    asked = []

    def disk_usage(folder):
        asked.append(folder)
        return SimpleNamespace(free=free * 2**30)

    monkeypatch.setattr(checks.shutil, "disk_usage", disk_usage)
    assert only(checks.check_disk(DoctorConfig(run_dir=str(tmp_path / "not" / "yet")))).status == status
    assert asked == [tmp_path]


def test_a_disk_that_cannot_be_written(monkeypatch, config):
    monkeypatch.setattr(checks.os, "access", lambda path, mode: False)
    check = only(checks.check_disk(config))
    assert (check.status, "not writable" in check.found) == ("fail", True)


@pytest.mark.parametrize(("mib", "status"), [(64, "warn"), (8192, "ok")])
def test_shared_memory_of_a_container(monkeypatch, config, mib, status):
    monkeypatch.setattr(checks.shutil, "disk_usage", lambda folder: SimpleNamespace(total=mib * 2**20))
    assert only(checks.check_shared_memory(config)).status == status


@pytest.mark.parametrize(("threads", "status"), [("64000", "warn"), ("many", "warn"), ("1", "ok"), ("", "ok")])
def test_thread_count(monkeypatch, config, threads, status):
    monkeypatch.setenv("OMP_NUM_THREADS", threads)
    assert only(checks.check_processor(config), "processor").status == status


@pytest.mark.parametrize(("soft", "status"), [(256, "warn"), (65536, "ok"), (-1, "ok")])
def test_open_files(monkeypatch, config, soft, status):
    monkeypatch.setattr(checks.resource, "getrlimit", lambda kind: (soft, 4096))
    check = only(checks.check_open_files(config))
    assert check.status == status
    assert check.fix == ("ulimit -n 4096" if status == "warn" else "")


def test_a_missing_compiler_is_a_warning(monkeypatch, config):
    monkeypatch.setattr(checks.shutil, "which", lambda name: None)
    assert only(checks.check_compiler(config)).status == "warn"


def test_a_gpu_is_described(monkeypatch, config):
    properties = SimpleNamespace(name="NVIDIA H200", total_memory=141 * 2**30)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: properties)
    monkeypatch.setattr(torch.cuda.nccl, "version", lambda: (2, 27, 3))
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: True)
    check = only(checks.check_device(config))
    assert check.status == "ok"
    assert check.found.startswith("8 × NVIDIA H200, 141 GiB")
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: False)
    check = only(checks.check_device(config))
    assert (check.status, check.fix) == ("warn", "train with engine.precision=fp16")


def test_a_torch_that_cannot_use_the_gpu_fails(monkeypatch, config):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert only(checks.check_device(config)).status == ("fail" if os.path.exists("/dev/nvidiactl") else "ok")
    monkeypatch.setattr(checks, "Path", lambda path: SimpleNamespace(exists=lambda: path == "/dev/nvidiactl"))
    assert only(checks.check_device(config)).status == "fail"


def test_the_command_shows_presence_but_no_value_of_secrets_and_fails_with_its_own_code(
    extensions, monkeypatch, capsys, tmp_path
):
    monkeypatch.setenv("WANDB_API_KEY", "CANARYwandb")
    monkeypatch.setenv("HF_TOKEN", "CANARYhf")
    monkeypatch.setenv("WANDB_BASE_URL", "https://user:CANARYurl@host")
    arguments = [f"run_dir={tmp_path}", "min_free_gib=0"]
    assert doctor(arguments) == 0
    shown = capsys.readouterr().out
    assert "CANARY" not in shown
    for name in ("WANDB_API_KEY", "HF_TOKEN"):
        (line,) = [line for line in shown.splitlines() if name in line]
        assert line.split() == ["ok", name, "set"]
    (extensions / "lock").touch()
    assert doctor(arguments) == EXIT_RESOURCE
    shown = capsys.readouterr().out
    assert "1 failed" in shown
    assert f"fix: rm '{extensions / 'lock'}'\n" in shown  # whole, to be copied


def test_an_unknown_key_is_a_config_error():
    with pytest.raises(ConfigError, match="Did you mean port"):
        doctor(["prot=1"])


def test_interfaces(monkeypatch, config):
    addresses = {"lo": ["127.0.0.1", "::1"], "eth0": ["10.0.0.5", "fe80::1%eth0"], "down0": ["10.0.0.6"]}
    entries = {
        name: [SimpleNamespace(address=a, family=socket.AF_INET6 if ":" in a else socket.AF_INET) for a in found]
        for name, found in addresses.items()
    }
    stats = {name: SimpleNamespace(isup=name != "down0", speed=25000) for name in addresses}
    monkeypatch.setattr(nodes.psutil, "net_if_addrs", lambda: entries)
    monkeypatch.setattr(nodes.psutil, "net_if_stats", lambda: stats)
    check = only(nodes.check_interfaces(config))
    assert (check.status, check.found) == ("ok", "eth0 10.0.0.5 (25 Gbit/s)")
    stats["eth0"].isup = False
    assert only(nodes.check_interfaces(config)).status == "warn"


@pytest.mark.parametrize(
    ("resolves", "own", "status", "told"),
    [
        (["10.0.0.5"], ["10.0.0.5"], "ok", "10.0.0.5"),
        (["127.0.1.1"], ["10.0.0.5"], "warn", "the loopback, where no other host comes"),
        (["127.0.1.1"], [], "ok", "127.0.1.1"),  # there is nothing else
        (["10.9.9.9"], ["10.0.0.5"], "warn", "no address of this host"),
        (None, ["10.0.0.5"], "warn", "does not resolve: Name or service not known"),
    ],
)
def test_what_the_hosts_name_stands_for(monkeypatch, config, resolves, own, status, told):
    def getaddrinfo(name, port):
        if resolves is None:
            raise socket.gaierror(-2, "Name or service not known")
        return [(0, 0, 0, "", (address, 0)) for address in resolves]

    monkeypatch.setattr(nodes.socket, "getaddrinfo", getaddrinfo)
    monkeypatch.setattr(nodes, "interface_addresses", lambda: {"eth0": own} if own else {})
    check = only(nodes.check_host_name(config))
    assert (check.status, told in check.found) == (status, True), check
    if status == "warn" and resolves == ["127.0.1.1"]:
        assert check.fix.startswith("put 10.0.0.5 beside")


@pytest.mark.parametrize(("state", "status"), [(0, "ok"), (5, "warn"), (-1, "ok")])
def test_clock(monkeypatch, config, state, status):
    assert nodes._clock_state() in range(-1, 6), "the kernel's own answer"
    monkeypatch.setattr(nodes, "_clock_state", lambda: state)
    assert only(nodes.check_clock(config)).status == status


def test_variables_are_shown_with_what_they_mean(monkeypatch, config):
    for name in list(os.environ):
        if name.startswith(("NCCL_", "GLOO_", "TORCH_", "CUDA_LAUNCH")):
            monkeypatch.delenv(name)
    assert only(nodes.check_variables(config)).found.startswith("none of")
    monkeypatch.setenv("NCCL_DEBUG", "INFO")
    monkeypatch.setenv("NCCL_P2P_DISABLE", "1")
    monkeypatch.setenv("NCCL_OF_TOMORROW", "7")
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "ib7")
    found = {check.name: check for check in nodes.check_variables(config)}
    assert (found["NCCL_DEBUG"].status, found["NCCL_DEBUG"].found) == ("ok", "INFO: how much NCCL prints")
    assert (found["NCCL_OF_TOMORROW"].status, found["NCCL_OF_TOMORROW"].found) == ("ok", "7")
    assert (found["NCCL_P2P_DISABLE"].status, found["GLOO_SOCKET_IFNAME"].status) == ("warn", "warn")
    assert "there is no ib7 here" in found["GLOO_SOCKET_IFNAME"].found
    for value in ("lo", "=lo", "^ib7", "l,lo"):
        monkeypatch.setenv("GLOO_SOCKET_IFNAME", value)
        assert only(nodes.check_variables(config), "GLOO_SOCKET_IFNAME").status == "ok", value


def test_infiniband_and_its_locked_memory(monkeypatch, config, tmp_path):
    monkeypatch.setattr(nodes, "_INFINIBAND", tmp_path)
    assert not list(nodes.check_infiniband(config))
    for name, state in (("mlx5_0", "4: ACTIVE"), ("mlx5_1", "1: DOWN")):
        port = tmp_path / name / "ports" / "1"
        port.mkdir(parents=True)
        (port / "state").write_text(state + "\n")
        (port / "rate").write_text("400 Gb/sec (4X NDR)\n")
    limit = 64 << 10
    monkeypatch.setattr(nodes.resource, "getrlimit", lambda kind: (limit, limit))
    found = list(nodes.check_infiniband(config))
    assert [(check.name, check.status) for check in found] == [
        ("InfiniBand", "ok"),
        ("InfiniBand", "warn"),
        ("locked memory", "warn"),
    ]
    assert "mlx5_0 port 1: 400 Gb/sec" in found[0].found
    assert "64 KiB" in found[2].found
    limit = nodes.resource.RLIM_INFINITY
    assert only(nodes.check_infiniband(config), "locked memory").status == "ok"


def test_the_disk_of_run_dir_renames_and_locks(monkeypatch, tmp_path):
    config = DoctorConfig(run_dir=str(tmp_path / "not" / "yet"))
    assert [(check.name, check.status) for check in nodes.check_run_dir(config)] == [("rename", "ok"), ("lock", "ok")]
    assert not list(tmp_path.iterdir()), "nothing is left behind"

    with monkeypatch.context() as patch:
        patch.setattr(nodes.fcntl, "flock", lambda file, kind: None)  # as if: the other process gets it too
        check = only(nodes.check_run_dir(config), "lock")
        assert (check.status, "a second process gets a lock" in check.found) == ("fail", True)

    def refuse(*arguments):
        raise OSError(38, "Function not implemented")

    with monkeypatch.context() as patch:
        patch.setattr(nodes.fcntl, "flock", refuse)
        check = only(nodes.check_run_dir(config), "lock")
        assert (check.status, "Function not implemented" in check.found) == ("fail", True)
    with monkeypatch.context() as patch:
        patch.setattr(nodes.Path, "rename", refuse)
        assert only(nodes.check_run_dir(config)).status == "fail"
    assert not list(tmp_path.iterdir())


def test_an_all_reduce_is_measured_only_when_asked_for():
    assert not list(nodes.check_all_reduce(DoctorConfig()))
    check = only(nodes.check_all_reduce(DoctorConfig(nproc_per_node=2, size_mib=1)))
    assert check.status == "ok"
    assert check.found.startswith("2 ranks over gloo, 1 MiB in ")


def test_the_bandwidth_of_the_bus():
    bandwidth = Bandwidth(num_ranks=4, backend="nccl", num_bytes=8 * 10**9, seconds=2.0)
    assert (bandwidth.algorithm, bandwidth.bus) == (4e9, 6e9)  # 2 (4 - 1) / 4 of it
    assert str(bandwidth).endswith("4 GB/s, bus 6 GB/s")
