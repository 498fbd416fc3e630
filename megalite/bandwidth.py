"""How fast ranks add up a tensor together."""

import json
import statistics
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.distributed as dist

from megalite.config.place import Place
from megalite.process import pick_device, start_process_group

_REPEATS = 10
_WARM_UPS = 2


@dataclass(frozen=True)
class Bandwidth:
    """How fast all ranks added up a tensor: the median of a few times, of the slowest rank."""

    num_ranks: int
    backend: str
    num_bytes: int
    seconds: float

    @property
    def algorithm(self) -> float:
        """Bytes of the tensor a second."""
        return self.num_bytes / self.seconds

    @property
    def bus(self) -> float:
        """Bytes a second through each rank's link: 2 (n - 1) / n of the tensor (NVIDIA's nccl-tests, PERFORMANCE.md).

        Comparable between numbers of ranks, and with what the hardware promises.
        """
        return self.algorithm * 2 * (self.num_ranks - 1) / self.num_ranks

    def __str__(self) -> str:
        """For people, in the units of nccl-tests: 1 GB is 10^9 bytes."""
        return (
            f"{self.num_ranks} ranks over {self.backend}, {self.num_bytes / 2**20:.0f} MiB in "
            f"{1000 * self.seconds:.3g} ms: {self.algorithm / 1e9:.3g} GB/s, bus {self.bus / 1e9:.3g} GB/s"
        )


def measure(place: Place, num_bytes: int, result: Path) -> None:
    """The rank of `megalite doctor nproc_per_node=N`: rank 0 writes the seconds and the backend to `result`."""
    device = pick_device(place)
    start_process_group(place, device)
    try:
        bandwidth = measure_all_reduce(num_bytes, device)
    finally:
        dist.destroy_process_group()
    if place.rank == 0:
        result.write_text(json.dumps(asdict(bandwidth)), encoding="utf-8")


def measure_all_reduce(num_bytes: int, device: torch.device) -> Bandwidth:
    """Time all-reduces of a float32 tensor over all ranks."""
    tensor = torch.ones(num_bytes // 4, device=device)
    times = torch.zeros(_WARM_UPS + _REPEATS, dtype=torch.float64, device=device)
    for number in range(len(times)):
        dist.barrier()
        started = time.perf_counter()
        dist.all_reduce(tensor)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times[number] = time.perf_counter() - started
        tensor.fill_(1.0)
    dist.all_reduce(times, dist.ReduceOp.MAX)
    seconds = statistics.median(times[_WARM_UPS:].tolist())
    return Bandwidth(dist.get_world_size(), dist.get_backend(), tensor.numel() * 4, seconds)
