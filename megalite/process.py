"""One process among the ranks: its device, its share of the cores, its process group."""

import json
import os
import secrets
import time
from datetime import timedelta

import torch
import torch.distributed as dist

from megalite.config.place import Place
from megalite.errors import ResourceError

_SHOWN_COLLECTIVES = 16
_TIMEOUT = timedelta(minutes=30)
_POLL_SECONDS = 0.02
# The flight recorder keeps so many of all groups; read by torch at the first one.
os.environ.setdefault("TORCH_FR_BUFFER_SIZE", "200")


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


def start_process_group(place: Place, device: torch.device) -> None:
    """Join the other ranks: NCCL on GPUs, gloo on CPUs; a world of one needs no rendezvous."""
    backend = "nccl" if device.type == "cuda" else "gloo"
    store = dist.HashStore() if place.init_method is None else _store_of_this_start(place)
    dist.init_process_group(
        backend,
        init_method=None if store else place.init_method,
        store=store,
        rank=place.rank,
        world_size=place.world_size,
        timeout=_TIMEOUT,
        device_id=device if backend == "nccl" else None,
    )


def _store_of_this_start(place: Place) -> dist.Store | None:
    """A part of torchrun's store that no earlier start has written to; None where the launcher makes a store each time.

    The agents of torch 2.13 keep one store for all restarts, in which the addresses of dead ranks still stand, and
    count restarts each for itself. So rank 0 draws a name, and tells it to every rank that asks with a number of its
    own, until all have come.
    """
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True" or os.environ.get("TORCHELASTIC_MAX_RESTARTS") == "0":
        return None
    store, _, _ = next(dist.rendezvous("env://", place.rank, place.world_size, timeout=_TIMEOUT))
    shared = dist.PrefixStore("megalite", store)
    own = secrets.token_hex(8)
    if place.rank:
        shared.set(f"asks/{place.rank}", own)
        name = shared.get(f"told/{place.rank}/{own}").decode()
        shared.set(f"came/{name}/{place.rank}", "")
        return dist.PrefixStore(name, shared)
    told: dict[int, bytes] = {}
    missing = set(range(1, place.world_size))
    deadline = time.monotonic() + _TIMEOUT.total_seconds()
    while missing:
        if time.monotonic() > deadline:
            raise ResourceError(f"of {place.world_size} ranks these have not come within {_TIMEOUT}: {sorted(missing)}")
        for rank in sorted(missing):
            if shared.check([f"asks/{rank}"]) and (asked := shared.get(f"asks/{rank}")) != told.get(rank):
                told[rank] = asked
                shared.set(f"told/{rank}/{asked.decode()}", own)
            if shared.check([f"came/{own}/{rank}"]):
                missing.discard(rank)
        time.sleep(_POLL_SECONDS)
    return dist.PrefixStore(own, shared)
