"""What machine and which versions the sweep ran on."""

import importlib.metadata
import os
import platform

import torch
import torch.distributed as dist

from benchmarks.gpu.isolate import Emit
from megalite import __version__
from megalite.metrics.hardware import peak_flops

PACKAGES = ("torch", "triton", "deepspeed", "transformers", "numpy", "hydra-core", "nvidia-nccl-cu13")
VARIABLES = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF", "NVIDIA_TF32_OVERRIDE", "CUDA_LAUNCH_BLOCKING")


def pick_device(name: str) -> torch.device:
    """`cpu`, `cuda` or `cuda:N`, made current. RuntimeError where there is no such device."""
    device = torch.device(name)
    if device.type == "cuda":
        if not torch.cuda.is_available():
            raise RuntimeError(
                "torch finds no CUDA device; to try the sweep itself without one: --device cpu --tiny "
                f"(torch {torch.__version__} was built for CUDA {torch.version.cuda})"
            )
        device = torch.device("cuda", device.index or 0)
        torch.cuda.set_device(device)
    return device


def facts(emit: Emit, device_name: str) -> None:
    """One row: device, driver-side limits, versions, peak, and the settings that change speed or rounding."""
    device = pick_device(device_name)
    emit(
        {
            "case": "facts",
            "status": "ok",
            "megalite": __version__,
            "python": platform.python_version(),
            "packages": {name: _version(name) for name in PACKAGES},
            "cuda": torch.version.cuda,
            "variables": {name: os.environ[name] for name in VARIABLES if name in os.environ},
            "matmul_fp32_precision": torch.get_float32_matmul_precision(),
            **(_gpu(device) if device.type == "cuda" else _cpu()),
        }
    )


def _gpu(device: torch.device) -> dict[str, object]:
    properties = torch.cuda.get_device_properties(device)
    return {
        "device": torch.cuda.get_device_name(device),
        "peak_flops": peak_flops(torch.cuda.get_device_name(device)),
        "capability": f"{properties.major}.{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
        "memory_gib": properties.total_memory / 2**30,
        "cudnn": torch.backends.cudnn.version(),
        "nccl": ".".join(str(part) for part in torch.cuda.nccl.version()) if dist.is_nccl_available() else None,
        "num_visible": torch.cuda.device_count(),
    }


def _cpu() -> dict[str, object]:
    return {"device": "cpu", "peak_flops": None, "num_threads": torch.get_num_threads()}


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
