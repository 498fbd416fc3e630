"""Hosts meet before any rank starts: who is missing, and who is unfit, is known by name within seconds.

One process a host, over TCP, a line of JSON each way; on the port above the one where ranks will meet.
"""

import json
import socket
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from megalite.config.compose import config_digest, config_values
from megalite.config.schema import TrainConfig
from megalite.data.format import TokenStore
from megalite.errors import DataError, ResourceError
from megalite.host import differences, package_versions, shared_mark
from megalite.log import get_logger
from megalite.network import PORT_SECONDS, any_address, await_port, interface_of, is_own, listen

log = get_logger(__name__)

_LINE_BYTES = 1 << 20
_POLL_SECONDS = 0.2
_ANSWER_SECONDS = 10.0  # in which the first host, its patience at an end, tells what it makes of all
_APPEARS_SECONDS = 1.0  # well below what the first host waits for one that has come


@dataclass(frozen=True)
class MeetingPoint:
    """Where ranks of several hosts meet; the hosts themselves meet on the port above."""

    address: str  # of the first host
    port: int
    hosts: tuple[str, ...] = ()  # the names of all, where somebody knows them


@dataclass(frozen=True)
class Host:
    """What a host says of itself."""

    name: str
    address: str
    interface: str
    versions: dict[str, str]
    config: str  # the configuration's digest
    stores: dict[str, str]  # path -> digest, or what is wrong with it
    clock: float = 0.0  # seconds ahead of the first host, within the time of one message


def meet(config: TrainConfig, point: MeetingPoint, address: str) -> list[Host]:
    """Wait for all `launch.nodes` hosts and compare them; every host gets the same list, the first host at its head.

    `address`: this host's own in the network between hosts. Raises `ResourceError` when one has not come within
    `launch.start_timeout`, or when they cannot train together.
    """
    own = describe_host(config, address)
    deadline = time.monotonic() + config.launch.start_timeout
    if is_own(point.address):
        await_port(own.address, point.port, PORT_SECONDS)  # ranks' launchers meet there next
        hosts, problems = _gather(config, point, own, deadline)
    else:
        hosts, problems = _report(config, point, own, deadline)
    for host in hosts:
        log.info("host %s: %s on %s, clock %+.3f s", host.name, host.address, host.interface, host.clock)
    if problems:
        raise ResourceError("\n".join(problems))
    return hosts


def describe_host(config: TrainConfig, address: str) -> Host:
    """This host."""
    stores = {store.path: _store(store.path) for store in (*config.data.train, *config.data.validation)}
    return Host(
        socket.gethostname(),
        address,
        interface_of(address),
        package_versions(),
        config_digest(config_values(config)),
        stores,
    )


def _store(path: str) -> str:
    try:
        return TokenStore.open(path).digest
    except DataError as error:
        return str(error)


def _gather(config: TrainConfig, point: MeetingPoint, own: Host, deadline: float) -> tuple[list[Host], list[str]]:
    """The first host: hear the others, judge, tell them. Its name may lead to another interface than ranks take."""
    hosts, answers = [own], []
    with shared_mark(Path(config.run_dir)) as mark, listen(any_address(own.address), point.port + 1) as server:
        server.settimeout(_POLL_SECONDS)
        blind = []  # hosts that do not see what is written to run_dir here
        while len(hosts) < config.launch.nodes and time.monotonic() < deadline:
            with suppress(TimeoutError, OSError, ValueError, TypeError, KeyError):
                connection, _ = server.accept()
                connection.settimeout(_POLL_SECONDS * 10)
                patience = max(deadline - time.monotonic(), 0.0)
                _send(connection, {"mark": mark.name, "time": time.time(), "patience": patience})
                told = _receive(connection)
                if told["config"] != config.run_name:
                    raise ValueError  # another run's, at the same port
                host = _host(told["host"])
                # One that asks again takes its own place; machines that were cloned may all have one name.
                others = [known for known in hosts if (known.name, known.address) != (host.name, host.address)]
                hosts = [*others, host]
                blind += [] if told["sees"] else [host.name]
                answers.append(connection)
        hosts = [own, *sorted(hosts[1:], key=lambda host: _place(host, point.hosts))]
        problems = list(_missing(config, hosts, point.hosts)) + list(_problems(hosts))
        if blind:
            log.warning(
                "run_dir: %s is not the same directory on %s as on %s: checkpoints are kept on %s, and sent to the "
                "others when the run is resumed; logs stay on each host",
                *(Path(config.run_dir).absolute(), ", ".join(sorted(blind)), own.name, own.name),
            )
        for connection in answers:
            with suppress(OSError), connection:
                _send(connection, {"hosts": [asdict(host) for host in hosts], "problems": problems})
    return hosts, problems


def _report(config: TrainConfig, point: MeetingPoint, own: Host, deadline: float) -> tuple[list[Host], list[str]]:
    """Any other host: tell the first one, and hear what it makes of all."""
    address, port, reason = point.address, point.port + 1, ""
    while time.monotonic() < deadline:
        try:
            with socket.create_connection((address, port), timeout=_POLL_SECONDS * 10) as connection:
                first = _receive(connection)
                clock = time.time() - float(first["time"])  # too large by the way here: milliseconds
                sees = _appears(Path(config.run_dir) / str(first["mark"]))
                host = asdict(own) | {"clock": clock}
                _send(connection, {"config": config.run_name, "host": host, "sees": sees})
                # From here on it is the first host who says how long to wait, and for whom.
                connection.settimeout(float(first["patience"]) + _ANSWER_SECONDS)
                answer = _receive(connection)
                return [_host(host) for host in answer["hosts"]], list(answer["problems"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            reason = str(error) or type(error).__name__
            time.sleep(_POLL_SECONDS)
    raise ResourceError(
        f"{own.name} cannot reach the first host, {address}:{port}, within launch.start_timeout="
        f"{config.launch.start_timeout:.0f} s: {reason}. Was the run started there? Does a firewall close the port?"
    )


def _host(said: dict[str, Any]) -> Host:
    """Raises `TypeError` for what no host of ours says."""
    host = Host(**said)
    if not (isinstance(host.versions, dict) and isinstance(host.stores, dict) and isinstance(host.clock, float)):
        raise TypeError
    return host


def _appears(mark: Path) -> bool:
    """Whether a file is here, soon. Its folder is read: of a name, a network file system may remember its absence."""
    deadline = time.monotonic() + _APPEARS_SECONDS
    while time.monotonic() < deadline:
        with suppress(OSError):
            if any(path.name == mark.name for path in mark.parent.iterdir()):
                return True
        time.sleep(_POLL_SECONDS)
    return False


def _place(host: Host, names: Sequence[str]) -> tuple[int, str, str]:
    """By what hosts are sorted: as in `names`, where Slurm puts neighbours side by side; else by their own names."""
    short = [_short(name) for name in names]
    return short.index(_short(host.name)) if _short(host.name) in short else len(short), host.name, host.address


def _short(name: str) -> str:
    return name.partition(".")[0]


def _missing(config: TrainConfig, hosts: Sequence[Host], names: Sequence[str]) -> Iterator[str]:
    if len(hosts) < config.launch.nodes:
        came = {_short(host.name) for host in hosts}
        absent = [name for name in names if _short(name) not in came]
        who = f"missing: {', '.join(absent)}" if absent else f"{config.launch.nodes - len(hosts)} missing"
        yield (
            f"{len(hosts)} of {config.launch.nodes} hosts came within launch.start_timeout="
            f"{config.launch.start_timeout:.0f} s: {', '.join(host.name for host in hosts)}; {who}"
        )


def _problems(hosts: Sequence[Host]) -> Iterator[str]:
    """Why the hosts that came cannot train together."""
    first, others = hosts[0], hosts[1:]
    for host in others:
        yield from differences(host.name, host.versions, host.clock, first.name, first.versions)
        if host.config != first.config:
            yield f"{host.name} was started with another configuration than {first.name}: give both the same command"
        for path, digest in first.stores.items():
            if host.stores.get(path) != digest:
                yield f"{path}: on {host.name} it is not what it is on {first.name} ({host.stores.get(path)}; {digest})"


def _send(connection: socket.socket, value: object) -> None:
    connection.sendall(json.dumps(value).encode() + b"\n")


def _receive(connection: socket.socket) -> dict[str, Any]:
    """A line of JSON. Raises `ValueError` when it is too long, or no mapping."""
    text = b""
    while not text.endswith(b"\n"):
        part = connection.recv(1 << 16)
        if not part or len(text) > _LINE_BYTES:
            raise ValueError("the other side hung up")
        text += part
    value = json.loads(text)
    if not isinstance(value, dict):
        raise ValueError("not a mapping")
    return value
