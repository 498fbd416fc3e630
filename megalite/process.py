"""One process among the ranks: its device, its share of the cores, its process group."""

import os
from datetime import timedelta

import torch
import torch.distributed as dist

from megalite.config.place import Place
from megalite.errors import ResourceError


def pick_device(place: Place) -> torch.device:
    """This rank's GPU where there are any, else the CPU with its share of the cores. `ResourceError`: too few GPUs."""
    if not torch.cuda.is_available():
        if place.local_world_size > 1:
            # Ranks that fight for cores are slower than ranks that share them.
            torch.set_num_threads(max(1, (os.cpu_count() or 1) // place.local_world_size))
        return torch.device("cpu")
    if place.local_rank >= torch.cuda.device_count():
        raise ResourceError(
            f"local rank {place.local_rank} has no GPU: {torch.cuda.device_count()} are visible; start fewer processes "
            "(launch.nproc_per_node, or your launcher's option) or check CUDA_VISIBLE_DEVICES"
        )
    torch.cuda.set_device(place.local_rank)
    return torch.device("cuda", place.local_rank)


def start_process_group(place: Place, device: torch.device) -> None:
    """Join the other ranks: NCCL on GPUs, gloo on CPUs; a world of one needs no rendezvous."""
    backend = "nccl" if device.type == "cuda" else "gloo"
    alone = place.init_method is None
    dist.init_process_group(
        backend,
        init_method=place.init_method,
        store=dist.HashStore() if alone else None,
        rank=place.rank,
        world_size=place.world_size,
        timeout=timedelta(minutes=30),
        device_id=device if backend == "nccl" else None,
    )
