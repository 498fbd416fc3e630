"""Fragments of tensors, from the ranks that hold them to the rank that writes the whole.

Every rank knows which range of each tensor every other one holds, so nothing but their bytes travels, each once, from
host memory to host memory, while training goes on: in a process group of its own, for the collectives that two threads
begin in one group would meet each other's; and point to point, for ranks are not at the same file at the same time, and
the watchdog would take whoever is late in a collective for the one to blame.
"""

from collections.abc import Iterator, Sequence
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

from megalite.checkpoint.engine_state import get_fragment
from megalite.engine import Engine
from megalite.layers.shard import shard_of

TIMEOUT = timedelta(minutes=30)  # a rank waits for others that write a file, or try to again
_MESSAGE = 4 << 20  # elements

Fragments = dict[str, Tensor]  # by tensor: what this rank holds of it, flat, fp32, on the host
Places = dict[str, list[Tensor]]  # by tensor: room for each tensor rank's part, flat, fp32, on the host


class Exchange:
    """What every rank holds of an engine's tensors, and the way of it to a rank that asks for whole ones."""

    def __init__(self, engine: Engine):
        """Collective: ranks tell each other what they hold."""
        self._rank, self._ranks = engine.mesh.rank, range(engine.mesh.world_size)
        self._size = engine.mesh.tensor.size
        self._shards = {name: shard_of(parameter) for name, parameter in engine.parameters()}
        own = []
        for _, parameter in engine.parameters():
            start, fragment = get_fragment(engine, parameter, "weight")
            own.append((engine.mesh.tensor.rank, start, fragment.numel()))
        self._connect()
        everyone = [torch.empty(len(own), 3, dtype=torch.int64) for _ in self._ranks]
        dist.all_gather(everyone, torch.tensor(own), group=self._group)
        self._held = dict(zip(self._shards, torch.stack(everyone, dim=1), strict=True))  # [rank, 3]
        self._scratch = torch.empty(_MESSAGE)
        for name in self._shards:
            self._check(name)

    def renew(self) -> None:
        """Collective: after an exchange that a rank broke off, in whose group messages may still be on their way."""
        self.close()
        self._connect()

    def close(self) -> None:
        """Leave the group."""
        dist.destroy_process_group(self._group)

    def _connect(self) -> None:
        self._group = dist.new_group(backend="gloo", timeout=TIMEOUT)

    def _check(self, name: str) -> None:
        """What DeepSpeed says that ranks hold is all of a tensor, and nothing of it twice."""
        for part in self._parts(name):
            ranges = sorted((start, count) for holder, start, count in self._held[name].tolist() if holder == part)
            end = 0
            for start, count in ranges:
                assert count == 0 or start == end, f"{name}: ranks hold {ranges} of tensor rank {part}'s part"
                end += count
            assert end == self._numel(name), f"{name}: ranks hold {end} elements of {self._numel(name)}"

    def _parts(self, name: str) -> range:
        return range(1 if self._shards[name].dim is None else self._size)

    def _numel(self, name: str) -> int:
        return torch.Size(self._shards[name].local_shape(self._size)).numel()

    def _held_by(self, rank: int, names: Sequence[str]) -> Iterator[tuple[str, int, int, int]]:
        """Of each tensor: its name, of which tensor rank's part `rank` holds something, from where, and how much."""
        for name in names:
            part, start, count = self._held[name][rank].tolist()
            if count:
                yield name, part, start, count

    def make_room(self, names: Sequence[str], own: Fragments) -> Places:
        """Where `receive` puts the tensors called `names`, of which this rank's `own` are there already.

        A fragment that is all of a part stands for it, and is not copied.
        """
        places: Places = {
            name: [
                own[name] if self._is_all(name, part) else torch.empty(self._numel(name)) for part in self._parts(name)
            ]
            for name in names
        }
        for name, part, start, count in self._held_by(self._rank, names):
            if places[name][part] is not own[name]:
                places[name][part][start : start + count] = own[name]
        return places

    def _is_all(self, name: str, part: int) -> bool:
        return self._held[name][self._rank].tolist() == [part, 0, self._numel(name)]

    def send(self, names: Sequence[str], own: Fragments | None, rank: int) -> list[dist.Work]:
        """Begin to send this rank's `own` fragments to `rank`; they stay as they are until that has ended.

        Without any it sends as much, of whatever.
        """
        sent = []
        for name, _, _, count in self._held_by(self._rank, names):
            for begin in range(0, count, _MESSAGE):
                end = min(begin + _MESSAGE, count)
                message = self._scratch[: end - begin] if own is None else own[name][begin:end]
                sent.append(dist.isend(message, rank, group=self._group))
        return [work for work in sent if work]

    def receive(self, names: Sequence[str], places: Places | None) -> None:
        """Take what other ranks `send` of the tensors called `names`; without `places`, away from them."""
        for rank in self._ranks:
            if rank == self._rank:
                continue
            for name, part, start, count in self._held_by(rank, names):
                for begin in range(start, start + count, _MESSAGE):
                    end = min(begin + _MESSAGE, start + count)
                    place = self._scratch[: end - begin] if places is None else places[name][part][begin:end]
                    dist.recv(place, rank, group=self._group)

    def whole(self, name: str, parts: list[Tensor]) -> Tensor:
        """The logical tensor of its tensor ranks' parts, contiguous."""
        shard, local = self._shards[name], self._shards[name].local_shape(self._size)
        if len(parts) == 1 and local == shard.shape:
            return parts[0].view(local)
        return shard.gather([part.view(local) for part in parts]).contiguous()
