"""Which way leads to another host."""

import ipaddress
import os
import socket
import time

import psutil

from megalite.errors import ResourceError

PORT_SECONDS = 5.0  # for the last life's launcher to let go of its port
_POLL_SECONDS = 0.2


def free_port() -> int:
    """A TCP port that nobody on this host listens on; another process may be quicker to take it."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


def listen(address: str, port: int) -> socket.socket:
    """A TCP server of this host. Raises `ResourceError`, which names the port, where there can be none."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    try:
        return socket.create_server((address, port), family=family)
    except OSError as error:
        reason = os.strerror(error.errno or 0)  # its own words repeat the address
        raise ResourceError(
            f"{socket.gethostname()} cannot listen on {address}:{port}: {reason}; choose another launch.port"
        ) from None


def is_loopback(address: str) -> bool:
    """Whether an IP address is of the loopback; a name is not looked up."""
    try:
        return ipaddress.ip_address(address.partition("%")[0]).is_loopback
    except ValueError:
        return address == "localhost"


def any_address(like: str) -> str:
    """To listen on all interfaces, by the protocol of the address `like`; on the loopback where that is one."""
    if is_loopback(like):
        return like
    return "::" if ":" in like else "0.0.0.0"


def await_port(address: str, port: int, seconds: float) -> None:
    """Return once `port` can be listened on. Raises `ResourceError` when it cannot be for so long."""
    deadline = time.monotonic() + seconds
    while True:
        try:
            listen(address, port).close()
            return
        except ResourceError:
            if time.monotonic() > deadline:
                raise
            time.sleep(_POLL_SECONDS)


def own_address(towards: str) -> str:
    """This host's own IP address on the way to the host `towards`. Raises `ResourceError` when there is no way.

    The name of this host itself may stand for a loopback address, as Debian writes it into /etc/hosts: see
    `outer_address`.
    """
    try:
        family, _, _, _, address = socket.getaddrinfo(towards, 1, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, socket.SOCK_DGRAM) as probe:
            probe.connect(address)  # sends nothing: the kernel only chooses a route
            return str(probe.getsockname()[0])
    except OSError as error:
        raise ResourceError(
            f"{socket.gethostname()} finds no way to {towards}: {error}; see launch.address, or the names in /etc/hosts"
        ) from None


def outer_address(towards: str) -> str:
    """As `own_address`, for a network between hosts: never a loopback address, which no other host can reach."""
    address = own_address(towards)
    if not ipaddress.ip_address(address).is_loopback:
        return address
    up = {name for name, state in psutil.net_if_stats().items() if state.isup}
    found = [
        own.address
        for name, all_of in sorted(psutil.net_if_addrs().items())
        for own in all_of
        if name in up and own.family == socket.AF_INET and not ipaddress.ip_address(own.address).is_loopback
    ]
    if len(found) != 1:
        raise ResourceError(
            f"{towards} is {address} on {socket.gethostname()}, which no other host can reach, and it has "
            f"{', '.join(found) or 'no address'} besides: choose with launch.interface, or mend /etc/hosts"
        )
    return found[0]


def interface_of(address: str) -> str:
    """The name of the network interface with this address of this host, such as eth0."""
    for name, addresses in psutil.net_if_addrs().items():
        if any(found.address.partition("%")[0] == address for found in addresses):
            return name
    raise ResourceError(f"{socket.gethostname()} has no network interface with the address {address}")


def addresses_of(interface: str) -> list[str]:
    """IP addresses of an interface of this host. Raises `ResourceError` when there is no such interface, or none."""
    everything = psutil.net_if_addrs()
    if interface not in everything:
        raise ResourceError(
            f"launch.interface: found {interface}, but {socket.gethostname()} has {', '.join(sorted(everything))}"
        )
    found = [a.address for a in everything[interface] if a.family in (socket.AF_INET, socket.AF_INET6)]
    if not found:
        raise ResourceError(f"launch.interface: {interface} of {socket.gethostname()} has no IP address")
    return sorted(found, key=lambda text: ":" in text)


def is_own(address: str) -> bool:
    """Whether the host name or address `address` is this host."""
    if address == socket.gethostname():
        return True
    try:
        wanted = {str(info[4][0]) for info in socket.getaddrinfo(address, None)}
    except OSError:
        return False
    own = {found.address.partition("%")[0] for all_of in psutil.net_if_addrs().values() for found in all_of}
    return bool(wanted & own) or all(ipaddress.ip_address(found).is_loopback for found in wanted)
