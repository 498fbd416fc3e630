"""Whether this host still reaches the one where ranks met."""

import socket

_SECONDS = 2.0


def describe_cut(meeting: str) -> str:
    """What is wrong with the way to `meeting` (HOST:PORT); empty when nothing is, or when there is none."""
    host, _, port = meeting.rpartition(":")
    if not host:
        return ""
    try:
        socket.create_connection((host, int(port)), timeout=_SECONDS).close()
    except ConnectionRefusedError:
        return ""  # somebody there says no: the network is whole
    except OSError as error:
        return f"cut off from {meeting}, where ranks met: {error}"
    return ""
