"""Ranks that meet, ranks that do not come, and a store that outlives a start."""

import multiprocessing
import socket
import time
from datetime import timedelta

import pytest
import torch.distributed as dist

from megalite import rendezvous
from megalite.config.place import Place
from megalite.errors import ResourceError
from megalite.network import free_port
from megalite.rendezvous import meet_ranks

FORK = multiprocessing.get_context("fork")


@pytest.fixture(autouse=True)
def _impatience(monkeypatch):
    monkeypatch.setattr(rendezvous, "_LAST_SECONDS", 1.0)


def _rank(place, patience, results, is_over):
    try:
        store = meet_ranks(place, patience)
        store.set(f"own/{place.rank}", str(place.rank))
        came = store.add("came", 1)  # counts on from an earlier start's where the store is not a new one
        results.put((place.rank, came, [store.get(f"own/{r}").decode() for r in range(place.world_size)]))
        is_over.wait()  # rank 0 may hold the store
    except ResourceError as error:
        results.put((place.rank, 0, str(error)))


def start(ranks, world_size, port, patience):
    """What `ranks` of `world_size` found, each in a process of its own: how many had come, and what the store held."""
    results, is_over = FORK.Queue(), FORK.Event()
    places = [Place(rank, 0, world_size, 1, "env://", "127.0.0.1", port) for rank in ranks]
    processes = [FORK.Process(target=_rank, args=(place, patience, results, is_over)) for place in places]
    for process in processes:
        process.start()
    found = {rank: (came, what) for rank, came, what in (results.get(timeout=60) for _ in places)}
    is_over.set()
    for process in processes:
        process.join()
        assert process.exitcode == 0
    return found


def test_all_who_come_share_one_store():
    found = start(range(3), 3, free_port(), 30.0)
    assert {came for came, _ in found.values()} == {1, 2, 3}
    assert [what for _, what in found.values()] == [["0", "1", "2"]] * 3


def test_ranks_that_do_not_come_are_named_to_all_the_others():
    began = time.monotonic()
    found = start([0, 2], 4, free_port(), 1.0)
    assert {what for _, what in found.values()} == {
        f"of 4 ranks 2 have not come within launch.start_timeout=1 s: 1 3; here are 0 2 from {socket.gethostname()}"
    }
    assert found.keys() == {0, 2}
    assert time.monotonic() - began < 5, "rank 0 waits no longer than until the others have heard"


def test_without_rank_0_there_is_no_meeting():
    port = free_port()
    (_, message) = start([1], 2, port, 0.5)[1]
    assert message.startswith(
        f"rank 1 on {socket.gethostname()} cannot reach rank 0 at 127.0.0.1:{port} within launch."
    )


def test_a_taken_port_is_named():
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        with pytest.raises(ResourceError, match=rf"cannot listen on 127.0.0.1:{port}: .*; choose another launch.port"):
            meet_ranks(Place(0, 0, 2, 1, "env://", "127.0.0.1", port), 5.0)


def test_a_store_of_torchruns_agent_serves_one_start_after_another(monkeypatch):
    """It holds what the ranks of earlier starts wrote, and no rank is its server."""
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
    agent = dist.TCPStore("127.0.0.1", 0, None, True, timedelta(seconds=30), wait_for_workers=False)
    for _ in range(2):
        found = start(range(2), 2, agent.port, 30.0)
        assert [what for _, what in found.values()] == [["0", "1"]] * 2
        assert {came for came, _ in found.values()} == {1, 2}
    (_, message) = start([1], 2, agent.port, 0.5)[1]
    assert f"rank 1 on {socket.gethostname()} has come to 127.0.0.1:{agent.port}, and rank 0 has not" in message
