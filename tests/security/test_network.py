"""S5: on one machine nothing listens but on the loopback."""

import json
import os
import socket
import struct
from pathlib import Path

from megalite.guard import vitals
from megalite.launch.spawn import spawn_ranks
from megalite.preflight import preflight
from megalite.train import train
from tests.runs import tiny_config, write_store


def listeners(pid):
    """Addresses on which a process listens, from /proc alone."""
    inodes = set()
    for link in Path(f"/proc/{pid}/fd").iterdir():
        try:
            target = os.readlink(link)
        except FileNotFoundError:
            continue
        if target.startswith("socket:["):
            inodes.add(target[8:-1])
    found = []
    for table, family in (("tcp", socket.AF_INET), ("tcp6", socket.AF_INET6)):
        for line in Path(f"/proc/{pid}/net/{table}").read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == "0A" and fields[9] in inodes:
                raw = bytes.fromhex(fields[1].partition(":")[0])
                words = struct.unpack(f">{len(raw) // 4}I", raw)  # each in the machine's order
                found.append(socket.inet_ntop(family, struct.pack(f"<{len(words)}I", *words)))
    return found


def test_the_search_finds_a_listener():
    with socket.create_server(("127.0.0.1", 0)):
        assert "127.0.0.1" in listeners(os.getpid())


def test_ranks_listen_on_the_loopback_alone(tmp_path):
    config = tiny_config(tmp_path / "run", write_store(tmp_path / "store"), trainer={"steps": 3})

    def rank_main(place):
        enter = vitals.Vitals.enter

        def watched(self, section, detail="", step=None):
            enter(self, section, detail, step)
            if step == 3:
                children = Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()
                addresses = {str(pid): listeners(pid) for pid in [os.getpid(), *children]}
                (tmp_path / f"listeners_{place.rank}").write_text(json.dumps(addresses))

        vitals.Vitals.enter = watched
        train(preflight(config), place)

    assert spawn_ranks(rank_main, 2) == 0
    found = [json.loads((tmp_path / f"listeners_{rank}").read_text()) for rank in range(2)]
    addresses = [address for processes in found for of_one in processes.values() for address in of_one]
    assert addresses, "gloo listens somewhere"
    assert all(address.startswith("127.") or address in ("::1", "::ffff:127.0.0.1") for address in addresses), found
    assert len(found[0]) == 2, "the monitor is looked at too"
