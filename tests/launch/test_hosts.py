"""Hosts meet: here threads of one process, on the loopback; in tests/cluster on networks of their own."""

import contextlib
import dataclasses
import socket
import threading
import time

import pytest

from megalite.errors import CheckpointError, ResourceError
from megalite.launch import hosts as room
from megalite.launch.deepspeed import start_deepspeed
from megalite.launch.hosts import MeetingPoint, describe_host, meet
from megalite.launch.prepare import prepare
from megalite.launch.torchrun import start_torchrun
from tests.runs import tiny_config, write_store


@pytest.fixture
def point() -> MeetingPoint:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return MeetingPoint("127.0.0.1", server.getsockname()[1] - 1, ("one", "two"))


@pytest.fixture
def config(tmp_path):
    launch = {"name": "torchrun", "nodes": 2, "address": "one", "start_timeout": 5.0}
    return tiny_config(tmp_path / "run", write_store(tmp_path / "store"), launch=launch)


def gather(config, point, others=(), **changes):
    """The first host meets `others`, each another host with those changes; returns what each came to."""
    outcomes = {}
    own = dataclasses.replace(describe_host(config, "127.0.0.1"), name="one")
    deadline = time.monotonic() + config.launch.start_timeout

    def report(name, more):
        other = dataclasses.replace(own, name=name, **more)
        outcomes[name] = room._report(config, point, other, deadline)[1]

    threads = [threading.Thread(target=report, args=item) for item in others]
    for thread in threads:
        thread.start()
    found, problems = room._gather(config, point, own, deadline)
    for thread in threads:
        thread.join()
    assert all(told == problems for told in outcomes.values()), "every host hears the same"
    return [host.name for host in found], problems


def test_hosts_that_are_alike_may_begin(config, point, tmp_path):
    names, problems = gather(config, point, [("two", {})])
    assert (names, problems) == (["one", "two"], [])
    assert not list((tmp_path / "run").iterdir()), "the mark is gone"


def test_a_host_that_does_not_come_is_named(config, point):
    launch = dataclasses.replace(config.launch, start_timeout=0.5)
    _, [problem] = gather(dataclasses.replace(config, launch=launch), point)
    assert problem == "1 of 2 hosts came within launch.start_timeout=0 s: one; missing: two"


def test_machines_of_one_name_are_two_hosts(config, point):
    names, problems = gather(config, point, [("one", {"address": "127.0.0.2"})])
    assert (names, problems) == (["one", "one"], [])


def test_a_host_that_has_come_hears_who_is_missing_however_early_it_was(config, point, monkeypatch):
    """Its own patience ends before that of the first host."""
    config = dataclasses.replace(config, launch=dataclasses.replace(config.launch, nodes=3, start_timeout=2.0))
    report = room._report
    monkeypatch.setattr(room, "_report", lambda *args: report(*args[:3], time.monotonic() + 0.5))
    monkeypatch.setattr(room, "_POLL_SECONDS", 0.02)
    _, [problem] = gather(config, point, [("two", {})])
    assert problem.startswith("2 of 3 hosts came within launch.start_timeout=2 s: one, two; ")


@pytest.mark.parametrize(
    ("known", "order"),
    [(("one", "four", "three.site", "two"), ["four", "three", "two"]), ((), ["four", "three", "two"]),
     (("one", "two", "three", "four"), ["two", "three", "four"])],
)  # fmt: skip
def test_hosts_stand_in_the_order_of_slurm_or_of_their_names_whoever_comes_first(config, point, known, order):
    """Behind the first one, where ranks meet: rank 0 is there."""
    config = dataclasses.replace(config, launch=dataclasses.replace(config.launch, nodes=4))
    others = [("three", {}), ("two", {}), ("four", {})]
    names, problems = gather(config, dataclasses.replace(point, hosts=known), others)
    assert (names, problems) == (["one", *order], [])


@pytest.mark.parametrize("odd", [{"versions": [1]}, {"stores": None}, {"clock": "noon"}])
def test_what_no_host_says_is_not_listened_to(config, odd):
    said = dataclasses.asdict(describe_host(config, "127.0.0.1")) | odd
    with pytest.raises(TypeError):
        room._host(said)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"versions": {"python": "3.9"}}, "two has python 3.9, one has"),
        ({"config": "another"}, "two was started with another configuration than one"),
        ({"stores": {}}, "on two it is not what it is on one"),
    ],
)
def test_a_host_that_is_unfit_is_named(config, point, change, message):
    _, problems = gather(config, point, [("two", change)])
    assert any(message in problem for problem in problems), problems


def test_a_clock_of_its_own_and_a_directory_of_its_own(config, point, monkeypatch):
    """The one keeps hosts from training together, the other does not."""
    monkeypatch.setattr("megalite.host.CLOCK_SECONDS", -1.0)
    monkeypatch.setattr(room.Path, "iterdir", lambda self: iter(()))
    warned = []
    monkeypatch.setattr(room.log, "warning", lambda text, *values: warned.append(text % values))
    _, problems = gather(config, point, [("two", {})])
    assert [problem.partition(" is ")[0] for problem in problems] == ["the clock of two"]
    [warning] = warned
    assert "is not the same directory on two as on one: checkpoints are kept on one, and sent to the others" in warning


def test_the_first_host_is_named_where_nobody_answers(config, point):
    launch = dataclasses.replace(config.launch, start_timeout=0.5)
    own = describe_host(config, "127.0.0.1")
    with pytest.raises(ResourceError, match=r"cannot reach the first host, .*within launch.start_timeout=0"):
        room._report(dataclasses.replace(config, launch=launch), point, own, time.monotonic() + 0.5)


def test_strangers_at_the_port_do_not_disturb(config, point):
    """A port scanner, a word of no JSON, and another run's host."""

    def disturb():
        for words in (
            b"",
            b"GET / HTTP/1.1\r\n\r\n",
            b'{"config": "another run", "host": {}, "sees": true}\n',
            b"[]\n",
        ):
            with socket.create_connection(("127.0.0.1", point.port + 1), timeout=5) as connection:
                connection.sendall(words)

    thread = threading.Timer(0.5, disturb)
    thread.start()
    threading.Timer(2.0, lambda: None).start()
    late = threading.Event()

    def report():
        late.wait(2.0)
        other = dataclasses.replace(describe_host(config, "127.0.0.1"), name="two")
        room._report(config, point, other, time.monotonic() + 20)

    other = threading.Thread(target=report)
    other.start()
    own = dataclasses.replace(describe_host(config, "127.0.0.1"), name="one")
    found, problems = room._gather(config, point, own, time.monotonic() + 20)
    other.join()
    assert ([host.name for host in found], problems) == (["one", "two"], [])


@pytest.mark.parametrize(("name", "nodes", "looks"), [("torchrun", 2, False), ("local", 1, True), ("slurm", 2, True)])
def test_a_checkpoint_is_looked_at_before_ranks_start_unless_another_host_may_have_it(config, name, nodes, looks):
    address = "one" if name == "torchrun" else None
    launch = dataclasses.replace(config.launch, name=name, nodes=nodes, nproc_per_node=1, address=address)
    resuming = dataclasses.replace(config.checkpoint, resume="gone")
    config = dataclasses.replace(config, launch=launch, checkpoint=resuming)
    with pytest.raises(CheckpointError, match="gone is not a checkpoint") if looks else contextlib.nullcontext():
        prepare(config)


def test_alone_there_is_nobody_to_meet(config, point):
    launch = dataclasses.replace(config.launch, nodes=1)
    assert len(meet(dataclasses.replace(config, launch=launch), point, "127.0.0.1")) == 1


@pytest.mark.parametrize("name", ["torchrun", "deepspeed"])
def test_a_port_that_is_taken_is_said_before_a_launcher_starts(config, name, monkeypatch):
    monkeypatch.setattr("megalite.launch.torchrun.PORT_SECONDS", 0.1)
    monkeypatch.setattr("megalite.launch.deepspeed.PORT_SECONDS", 0.1)
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        launch = dataclasses.replace(config.launch, name=name, nodes=1, address=None, nproc_per_node=1, port=port)
        training = prepare(dataclasses.replace(config, launch=launch))
        start = {"torchrun": start_torchrun, "deepspeed": start_deepspeed}[name]
        with pytest.raises(ResourceError, match=rf"cannot listen on 127.0.0.1:{port}: Address already in use"):
            start(training)


def test_the_first_host_looks_at_both_ports(config, point, monkeypatch):
    monkeypatch.setattr(room, "PORT_SECONDS", 0.1)
    with (
        socket.create_server(("127.0.0.1", point.port)),
        pytest.raises(ResourceError, match=f":{point.port}: Address already in use; choose another launch.port"),
    ):
        room.meet(config, point, "127.0.0.1")
