"""Each check sees the fault that is planted for it, and stays quiet without it."""

import importlib.metadata
import os
import socket
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from megalite.config.schema import DoctorConfig
from megalite.errors import EXIT_RESOURCE, ConfigError
from megalite.launch import doctor_checks as checks
from megalite.launch.doctor import doctor


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
