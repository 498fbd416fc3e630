"""Where the ranks of this start meet, when a launcher keeps one store for several starts."""

import os
import secrets
import time
from datetime import timedelta

import torch.distributed as dist

from megalite.config.place import Place
from megalite.errors import ResourceError

_POLL_SECONDS = 0.02


def store_of_this_start(place: Place, timeout: timedelta) -> dist.Store | None:
    """A part of torchrun's store that no earlier start has written to; None where the launcher makes a store each time.

    The agents of torch 2.13 keep one store for all restarts, in which the addresses of dead ranks still stand, and
    count restarts each for itself. So rank 0 draws a name, and tells it to every rank that asks with a number of its
    own, until all have come. Raises `ResourceError` when some have not within `timeout`.
    """
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True" or os.environ.get("TORCHELASTIC_MAX_RESTARTS") == "0":
        return None
    store, _, _ = next(dist.rendezvous("env://", place.rank, place.world_size, timeout=timeout))
    shared = dist.PrefixStore("megalite", store)
    own = secrets.token_hex(8)
    if place.rank:
        shared.set(f"asks/{place.rank}", own)
        name = shared.get(f"told/{place.rank}/{own}").decode()
        shared.set(f"came/{name}/{place.rank}", "")
        return dist.PrefixStore(name, shared)
    told: dict[int, bytes] = {}
    missing = set(range(1, place.world_size))
    deadline = time.monotonic() + timeout.total_seconds()
    while missing:
        if time.monotonic() > deadline:
            raise ResourceError(f"of {place.world_size} ranks these have not come within {timeout}: {sorted(missing)}")
        for rank in sorted(missing):
            if shared.check([f"asks/{rank}"]) and (asked := shared.get(f"asks/{rank}")) != told.get(rank):
                told[rank] = asked
                shared.set(f"told/{rank}/{asked.decode()}", own)
            if shared.check([f"came/{own}/{rank}"]):
                missing.discard(rank)
        time.sleep(_POLL_SECONDS)
    return dist.PrefixStore(own, shared)
