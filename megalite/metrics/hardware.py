"""What the device can do and what a run uses of it: peak FLOP/s, MFU, memory."""

import re
import resource
import sys

import torch

# Words of the device's name -> dense tensor-core peak in FLOP/s (bf16; fp16 where the device has no bf16), from the
# data sheets and architecture white papers of NVIDIA; sheets that list the figure with 2:4 sparsity are halved. GeForce
# products, limited to half the rate when accumulating in fp32, stand with that rate: training runs at it. The first
# entry whose words all occur wins.
_PEAKS: list[tuple[str, float]] = [
    ("gb200", 2500e12),
    ("b200", 2250e12),
    ("gh200", 989e12),
    ("h200 nvl", 835e12),
    ("h200", 989e12),
    ("h100 nvl", 835e12),
    ("h100 pcie", 756e12),
    ("h100", 989e12),
    ("a100", 312e12),
    ("a800", 312e12),
    ("a40", 149.7e12),
    ("a30", 165e12),
    ("a10", 125e12),
    ("l40s", 362e12),
    ("l40", 181e12),
    ("l4", 121e12),
    ("v100 pcie", 112e12),
    ("v100", 125e12),
    ("t4", 65e12),
    ("rtx a6000", 154.8e12),
    ("rtx 5090", 209.5e12),
    ("rtx 4090", 165.2e12),
    ("rtx 3090", 71e12),
]
# A part of a device, or one that runs at other clocks than its namesake.
_OTHER_DEVICE = frozenset(["mig", "laptop", "d"])


def peak_flops(device_name: str) -> float | None:
    """Dense bf16 peak in FLOP/s of a device by the name that `torch.cuda.get_device_name` gives; None if unknown."""
    words = set(re.split(r"[\s-]+", device_name.lower()))
    if words & _OTHER_DEVICE:
        return None
    return next((peak for needed, peak in _PEAKS if words.issuperset(needed.split())), None)


def mfu(tokens_per_second: float, flops_per_token: float, device: torch.device, num_devices: int) -> float | None:
    """Model FLOPs utilisation, 0..1 (Chowdhery et al. 2022, PaLM, appendix B).

    `tokens_per_second` is that of the whole run, over `num_devices` equal devices; the peak is the dense bf16 one
    whatever the precision of the run. None where the device's peak is not known, a CPU among them.
    """
    peak = peak_flops(torch.cuda.get_device_name(device)) if device.type == "cuda" else None
    return tokens_per_second * flops_per_token / (peak * num_devices) if peak else None


def memory_bytes(device: torch.device) -> int:
    """Most bytes in use so far: tensors on a GPU (`max_memory_allocated`), the process's resident set on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024  # getrusage(2): bytes on macOS, KiB on Linux
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
