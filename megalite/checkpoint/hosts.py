"""Resuming where hosts share no run directory: all go on from the newest checkpoint that any has; it is sent to them.

A save is whole on the first host alone. Another one holds what it was sent when it last resumed, or, where it was the
first one in an earlier life, what it saved then.
"""

import os
import shutil
import socket
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from megalite.checkpoint.agreement import gather_lists, on_rank
from megalite.checkpoint.fragments import TIMEOUT
from megalite.checkpoint_folder import (
    check_space,
    checkpoint_name,
    choose_checkpoint,
    commit,
    create_temporary,
    newest_checkpoint,
    remove_temporaries,
)
from megalite.checkpoint_format import FileEntry, Manifest, digest_manifest, read_manifest, verify_file
from megalite.errors import CheckpointError, MegaliteError, ResourceError
from megalite.guard.stall import name_ranks
from megalite.log import get_logger
from megalite.sharing import Sharing

RECEIVED = "received"  # in run_dir: a copy of what checkpoint.resume=PATH names, which is no checkpoint of this run
_BLOCK_BYTES = 16 << 20

log = get_logger(__name__)
T = TypeVar("T")


@dataclass(frozen=True)
class _Offer:
    """What there is on a host, as the first rank of its run directory finds it."""

    rank: int
    newest: int  # step of the newest whole checkpoint of the run; -1: there is none
    folder: Path | None  # what `choose_checkpoint` says
    is_of_this_run: bool
    digest: str  # of its manifest
    problem: str


def agree_among_hosts(resume: str, run_dir: Path, sharing: Sharing, moves: Callable[[], None]) -> Path | None:
    """`choose_checkpoint` over all run directories; what is chosen is sent to the hosts that lack it. Collective.

    Returns where this rank finds it. `moves` is called again and again, so that the watchdog sees life. Raises
    `CheckpointError`, or `ResourceError` for a disk too small, on every rank alike.
    """
    own = [_look(resume, run_dir, sharing.rank)] if sharing.is_first else []
    offers = {offer.rank: offer for offer in gather_lists(own, None)}
    chosen = _choose(list(offers.values()), resume)
    problems = [offer.problem for offer in offers.values() if offer.problem]
    if chosen.folder is None:
        if problems:
            raise CheckpointError("; ".join(problems))
        return None
    if chosen.digest != offers[0].digest:
        problems.append(f"{sharing.hosts[0]} has {_name(offers[0])}, {sharing.hosts[chosen.rank]} {_name(chosen)}")
    if problems:
        log.warning("%s; continuing from %s of %s", "; ".join(problems), chosen.folder, sharing.hosts[chosen.rank])
    lacking = [rank for rank, offer in offers.items() if offer.digest != chosen.digest]
    here = offers[sharing.firsts[sharing.rank]]
    if sharing.is_first and (here.folder is None or here.folder.parent != run_dir / RECEIVED):
        shutil.rmtree(run_dir / RECEIVED, ignore_errors=True)
    sent = _send(chosen, lacking, run_dir, moves) if lacking else None
    return sent if here.rank in lacking else here.folder


def _look(resume: str, run_dir: Path, rank: int) -> _Offer:
    own, problem = _try(newest_checkpoint, run_dir)
    folder = own
    if resume != "auto":
        folder, problem = _try(choose_checkpoint, resume, run_dir)
    newest = read_manifest(own).step if own else -1
    digest = digest_manifest(read_manifest(folder)) if folder else ""
    is_of_this_run = folder is not None and folder.parent == run_dir / "checkpoints"
    return _Offer(rank, newest, folder, is_of_this_run, digest, problem)


def _choose(offers: list[_Offer], resume: str) -> _Offer:
    """How the run stands, the host with its newest checkpoint knows; a PATH that is missing there another may have."""
    newest = max(offers, key=lambda offer: (offer.newest, -offer.rank))
    named = [offer for offer in offers if offer.folder == Path(resume)]
    return named[0] if named and newest.folder in (None, Path(resume)) else newest


def _name(offer: _Offer) -> str:
    return offer.folder.name if offer.folder else "no checkpoint"


def _send(chosen: _Offer, lacking: list[int], run_dir: Path, moves: Callable[[], None]) -> Path:
    """From the rank that holds it to the ranks that are `lacking` it; returns where these have it. Collective."""
    rank, source = dist.get_rank(), chosen.folder
    assert source is not None
    parent = run_dir / ("checkpoints" if chosen.is_of_this_run else RECEIVED)
    manifest: Manifest = on_rank(chosen.rank, "read", lambda: read_manifest(source))
    size = sum(entry.num_bytes for entry in manifest.files)
    log.info("%s is sent from rank %d to %s: %.2f GB", source, chosen.rank, name_ranks(lacking), size / 1e9)

    def begin() -> Path:
        parent.mkdir(parents=True, exist_ok=True)
        remove_temporaries(parent)
        check_space(run_dir, size)
        return create_temporary(parent, manifest.step)

    folder, problem = _try(begin) if rank in lacking else (source, "")
    gather_lists([], problem, ResourceError)
    members = sorted({chosen.rank, *lacking})
    group = dist.new_group(members, backend="gloo", timeout=TIMEOUT)
    try:
        for entry in manifest.files:
            if rank in members and folder:
                problem = _pass_file(folder / entry.name, entry, chosen.rank, group, moves)
            moves()
            gather_lists([], problem)
        if rank in lacking and folder:
            _, problem = _try(commit, folder, manifest)
        gather_lists([], problem)
    except CheckpointError:
        if rank in lacking and folder:
            shutil.rmtree(folder, ignore_errors=True)
        raise
    finally:
        if rank in members:
            dist.destroy_process_group(group)
    return parent / checkpoint_name(manifest.step)


def _pass_file(path: Path, entry: FileEntry, source: int, group: dist.ProcessGroup, moves: Callable[[], None]) -> str:
    """A file from `source`, which reads it, to the rest of `group`, who write and verify it; returns what went wrong.

    Who cannot read or write goes on with the blocks: others wait for it.
    """
    sends = dist.get_rank() == source
    block = torch.empty(min(_BLOCK_BYTES, entry.num_bytes), dtype=torch.uint8)
    with ExitStack() as stack:
        file: Any
        opened = partial(open, path, "rb") if sends else partial(open, path, "xb", buffering=0)
        file, problem = _try(lambda: stack.enter_context(opened()))
        for start in range(0, entry.num_bytes, _BLOCK_BYTES):
            part = block[: entry.num_bytes - start]
            if sends and not problem:
                _, problem = _try(file.readinto, part.numpy())
            dist.broadcast(part, source, group=group)
            if not sends and not problem:
                _, problem = _try(file.write, part.numpy())
            moves()
        if not sends and not problem:
            _, problem = _try(os.fsync, file.fileno())
    if not sends and not problem:
        _, problem = _try(verify_file, path.parent, entry)
    return problem


def _try(call: Callable[..., T], *args: Any) -> tuple[T | None, str]:
    """What `call(*args)` returns, or what went wrong on this host."""
    try:
        return call(*args), ""
    except (MegaliteError, OSError) as error:
        return None, f"{socket.gethostname()}: {error}"
