"""One process among the ranks: its device, its share of the cores, its process group."""

import json
import os
from datetime import timedelta

import torch
import torch.distributed as dist

from megalite.config.place import Place, count_cores
from megalite.errors import ResourceError
from megalite.network import interface_of, is_loopback, own_address
from megalite.rendezvous import meet_ranks

_SHOWN_COLLECTIVES = 16
_TIMEOUT = timedelta(minutes=30)
# The flight recorder keeps so many of all groups; read by torch at the first one.
os.environ.setdefault("TORCH_FR_BUFFER_SIZE", "200")


def pick_device(place: Place) -> torch.device:
    """This rank's GPU where there are any, else the CPU with its share of the cores. `ResourceError`: too few GPUs."""
    if not torch.cuda.is_available():
        if place.local_world_size > 1:
            # Ranks that fight for cores are slower than ranks that share them.
            torch.set_num_threads(max(1, count_cores() // place.local_world_size))
        return torch.device("cpu")
    if place.local_rank >= torch.cuda.device_count():
        raise ResourceError(
            f"local rank {place.local_rank} has no GPU: {torch.cuda.device_count()} are visible; start fewer processes "
            "(launch.nproc_per_node, or your launcher's option) or check CUDA_VISIBLE_DEVICES"
        )
    torch.cuda.set_device(place.local_rank)
    return torch.device("cuda", place.local_rank)


def last_collectives() -> dict[str, list[tuple[int, str]]]:
    """Process group -> its last collectives, oldest first, as (number, operation): from torch's flight recorder.

    On a GPU only those that have started. Point-to-point operations are left out: their two sides differ.
    """
    trace = json.loads(torch._C._distributed_c10d._dump_fr_trace_json(True, False))  # type: ignore[attr-defined]
    found: dict[str, list[tuple[int, str]]] = {name: [] for name in trace.get("pg_config", {})}
    for entry in trace.get("entries", []):  # there are none before the first collective
        waits = entry["state"] == "scheduled" and entry["profiling_name"].startswith("nccl")
        if not entry["is_p2p"] and not waits:
            group = " ".join(reversed(entry["process_group"]))
            found.setdefault(group, []).append((entry["collective_seq_id"], entry["profiling_name"]))
    return {group: collectives[-_SHOWN_COLLECTIVES:] for group, collectives in found.items()}


def start_process_group(
    place: Place, device: torch.device, interface: str | None = None, patience: float = 300.0
) -> None:
    """Join the other ranks: NCCL on GPUs, gloo on CPUs; a world of one needs no rendezvous.

    `interface` is that of the network between hosts; None: the one that leads to where ranks meet. What gloo and NCCL
    find in the environment stands above it. Raises `ResourceError` when it is not there, or when some ranks have not
    come within `patience` seconds.
    """
    backend = "nccl" if device.type == "cuda" else "gloo"
    if interface or place.address:
        # Left alone, gloo listens on whatever address the host's own name has: on Debian that is the loopback.
        name = interface or interface_of(own_address(str(place.address)))
        os.environ.setdefault("GLOO_SOCKET_IFNAME", name)
    if interface or is_loopback(str(place.address)):
        os.environ.setdefault("NCCL_SOCKET_IFNAME", interface or "lo")
    store: dist.Store | None = None  # forked ranks meet in a file, and who forked them sees one that dies
    if place.init_method is None:
        store = dist.HashStore()
    elif place.address:
        store = meet_ranks(place, patience)
        store.set_timeout(_TIMEOUT)
    dist.init_process_group(
        backend,
        init_method=None if store else place.init_method,
        store=store,
        rank=place.rank,
        world_size=place.world_size,
        timeout=_TIMEOUT,
        device_id=device if backend == "nccl" else None,
    )
