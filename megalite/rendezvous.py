"""Where the ranks of one start meet, and who of them has not come."""

import os
import secrets
import socket
import time
from collections import defaultdict
from datetime import timedelta

import torch.distributed as dist

from megalite.config.place import Place
from megalite.errors import ResourceError
from megalite.network import is_loopback, listen

_POLL_SECONDS = 0.02
_LAST_SECONDS = 5.0  # that rank 0 stays for the others to hear that somebody is missing
_SHOWN_RANKS = 16


def meet_ranks(place: Place, patience: float) -> dist.Store:
    """A store that all ranks of this start have come to, within `patience` seconds, and no earlier start has written.

    The agents of torch 2.13 keep one store for all restarts, in which the addresses of dead ranks still stand, and
    count restarts each for itself. So rank 0 draws a name, and tells it to every rank that asks with a number of its
    own, until all have come. Raises `ResourceError` on every rank, which names those that are missing.
    """
    store = dist.PrefixStore("megalite", _connect(place, patience))
    own = secrets.token_hex(8)
    try:
        if place.rank == 0:
            name, problem = own, _call_the_roll(store, place.world_size, own, patience)
        else:
            store.set(f"asks/{place.rank}", own)
            name = store.get(f"told/{place.rank}/{own}").decode()
            store.set(f"came/{name}/{place.rank}", socket.gethostname())
            problem = store.get(f"all/{name}").decode()
            store.set(f"heard/{name}/{place.rank}", "")
    except dist.DistError as error:
        own_name = f"rank {place.rank} on {socket.gethostname()}"
        raise ResourceError(f"{own_name} has come to {place.meeting}, and rank 0 has not: {_reason(error)}") from None
    if problem:
        raise ResourceError(problem)
    return dist.PrefixStore(name, store)


def _connect(place: Place, patience: float) -> dist.Store:
    has_agent = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    serves = place.rank == 0 and not has_agent
    # Rank 0 has the last word on who is missing, also to a rank that came at once.
    waits = timedelta(seconds=patience + (0 if serves else _LAST_SECONDS))
    try:
        # Left alone, a store listens on all addresses.
        fd = listen(str(place.address), place.port).detach() if serves and is_loopback(str(place.address)) else None
        return dist.TCPStore(
            str(place.address), place.port, place.world_size, serves, waits, wait_for_workers=False, master_listen_fd=fd
        )
    except dist.DistError as error:
        host = socket.gethostname()
        if serves:
            raise ResourceError(
                f"{host} cannot listen on port {place.port}: {_reason(error)}; see launch.port"
            ) from None
        raise ResourceError(
            f"rank {place.rank} on {host} cannot reach rank 0 at {place.meeting} within launch.start_timeout="
            f"{patience:.0f} s: {_reason(error)}. Was it started there? Does a firewall close the port?"
        ) from None


def _call_the_roll(store: dist.Store, world_size: int, name: str, patience: float) -> str:
    """Rank 0: tell every rank that asks, until all have come; returns who has not, in words, as all others are told."""
    told: dict[int, bytes] = {}
    missing = set(range(1, world_size))
    deadline = time.monotonic() + patience
    while missing and time.monotonic() < deadline:
        for rank in sorted(missing):
            if store.check([f"asks/{rank}"]) and (asked := store.get(f"asks/{rank}")) != told.get(rank):
                told[rank] = asked
                store.set(f"told/{rank}/{asked.decode()}", name)
            if store.check([f"came/{name}/{rank}"]):
                missing.discard(rank)
        time.sleep(_POLL_SECONDS)
    came = sorted(set(range(1, world_size)) - missing)
    hosts = defaultdict(list, {socket.gethostname(): [0]})
    for rank in came if missing else ():
        hosts[store.get(f"came/{name}/{rank}").decode()].append(rank)
    problem = ""
    if missing:
        here = ", ".join(f"{_shown(ranks)} from {host}" for host, ranks in hosts.items())
        problem = (
            f"of {world_size} ranks {len(missing)} have not come within launch.start_timeout={patience:.0f} s: "
            f"{_shown(sorted(missing))}; here are {here}"
        )
    store.set(f"all/{name}", problem)
    if problem:
        deadline = time.monotonic() + _LAST_SECONDS
        while time.monotonic() < deadline and not all(store.check([f"heard/{name}/{rank}"]) for rank in came):
            time.sleep(_POLL_SECONDS)
    return problem


def _reason(error: Exception) -> str:
    """Without torch's stack in C++."""
    return str(error).partition("\n")[0]


def _shown(ranks: list[int]) -> str:
    return " ".join(map(str, ranks[:_SHOWN_RANKS])) + (" ..." if len(ranks) > _SHOWN_RANKS else "")
