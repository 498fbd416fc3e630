"""Which way leads to another host; a host whose own name is a loopback address, as Debian has it."""

import collections
import socket
import threading

import psutil
import pytest

from megalite import network
from megalite.errors import ResourceError

Address = collections.namedtuple("Address", "family address")
Stats = collections.namedtuple("Stats", "isup")


@pytest.fixture
def interfaces(monkeypatch):
    """A host with a loopback, an ethernet, and one that is down."""
    found = {
        "lo": [Address(socket.AF_INET, "127.0.0.1")],
        "eth0": [Address(socket.AF_INET, "10.0.0.5"), Address(socket.AF_INET6, "fe80::1%eth0")],
        "eth1": [Address(socket.AF_INET, "10.0.1.5")],
    }
    monkeypatch.setattr(psutil, "net_if_addrs", lambda: found)
    monkeypatch.setattr(psutil, "net_if_stats", lambda: {name: Stats(name != "eth1") for name in found})
    return found


def test_this_host_is_itself_by_any_of_its_names(interfaces):
    assert network.is_own(socket.gethostname())
    assert network.is_own("localhost")
    assert network.is_own("127.0.1.1"), "what Debian gives a host's own name"
    assert network.is_own("10.0.0.5")
    assert not network.is_own("10.0.0.6")
    assert not network.is_own("no such host")


def test_the_way_between_hosts_is_never_the_loopback(interfaces):
    assert network.own_address("127.0.1.1").startswith("127.")
    assert network.outer_address("127.0.1.1") == "10.0.0.5"
    assert network.interface_of("10.0.0.5") == "eth0"
    interfaces["eth2"] = []
    del interfaces["eth0"]
    with pytest.raises(ResourceError, match="no other host can reach, and it has no address besides"):
        network.outer_address("127.0.1.1")


def test_where_there_are_several_ways_one_must_be_chosen(interfaces, monkeypatch):
    monkeypatch.setattr(psutil, "net_if_stats", lambda: {name: Stats(True) for name in interfaces})
    with pytest.raises(ResourceError, match=r"10\.0\.0\.5, 10\.0\.1\.5 besides: choose with launch.interface"):
        network.outer_address("127.0.1.1")
    assert network.addresses_of("eth0") == ["10.0.0.5", "fe80::1%eth0"]
    with pytest.raises(ResourceError, match=r"launch\.interface: found ib0"):
        network.addresses_of("ib0")


def test_a_port_that_is_taken_is_named_and_one_that_is_let_go_is_waited_for():
    server = socket.create_server(("127.0.0.1", 0))
    port = server.getsockname()[1]
    with pytest.raises(ResourceError, match=rf"cannot listen on 127.0.0.1:{port}: .*; choose another launch.port"):
        network.await_port("127.0.0.1", port, 0.3)
    threading.Timer(0.5, server.close).start()
    network.await_port("127.0.0.1", port, 20.0)
