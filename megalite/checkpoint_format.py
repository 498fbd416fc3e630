"""A checkpoint on disk: one directory with a JSON manifest and safetensors files, free of torch and of the layout.

    run_dir/checkpoints/step_00000100/manifest.json
                                      weight-00000.safetensors  exp_avg-00000.safetensors  exp_avg_sq-00000.safetensors
    run_dir/checkpoints/latest        the name of the newest, for people; the program looks at the manifests

Tensors have their logical (unsharded, unpadded) shapes and fp32 values; imported norm weights fp64. A checkpoint is
written under a temporary name, every file synced to disk, the manifest last, and renamed when whole, so a directory
with the final name is complete.
The manifest holds the digest of every file, and one of itself.
"""

import json
import os
import re
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import xxhash

from megalite.data.files import digest_file, naming
from megalite.errors import CheckpointError
from megalite.failpoints import failpoint

FORMAT_VERSION = 1
MANIFEST = "manifest.json"
KINDS = ("weight", "exp_avg", "exp_avg_sq")
_READERS = 4  # files that one process digests at once: network disks want several
_FILE = re.compile(r"[a-z_]+-\d{5}\.safetensors")


@dataclass(frozen=True)
class FileEntry:
    """One file of a checkpoint: its size, xxh3_128 digest, and the names and logical shapes of the tensors in it."""

    name: str
    kind: str
    num_bytes: int
    digest: str
    tensors: dict[str, list[int]]


@dataclass(frozen=True)
class Manifest:
    """Everything about a checkpoint but the tensors' values."""

    step: int  # optimizer steps taken, skipped ones included
    samples_consumed: int  # the position in the closed-form order: the next step begins with this sample
    tokens_seen: int
    skipped_steps: int
    skipped_in_a_row: int  # of them, those since the last step that was applied
    optimizer_step: int  # Adam's count, which skipped steps do not advance
    loss_scaler: dict[str, float]  # fp16's dynamic loss scale; empty otherwise
    seed: int  # all random streams are keyed by it and the step: no generator state is needed
    config: dict[str, Any]
    stores: list[str]  # digests of the training stores, in the order of data.train
    topology: dict[str, Any]  # the layout that saved; nothing depends on it
    versions: dict[str, str]
    files: list[FileEntry]
    loss_sum: float = 0.0  # of the steps since the last row of metrics.jsonl
    loss_count: int = 0
    data_since_step: int = 0  # the present stores, weights, order and batch size hold from here on
    data_since_sample: int = 0
    evaluation: dict[str, float] = field(default_factory=dict)  # eval/<source>/loss and so on, where one was due
    evaluation_due: bool = False  # the run was stopped before it had evaluated at this step
    ephemeral: bool = False  # only for going on from: removed when a newer one is there
    format_version: int = FORMAT_VERSION

    def location(self, kind: str, name: str) -> str:
        """The file that holds tensor `name` of `kind`. Raises `CheckpointError` when there is none."""
        for entry in self.files:
            if entry.kind == kind and name in entry.tensors:
                return entry.name
        raise CheckpointError(f"the checkpoint of step {self.step} holds no {kind} of {name}")


def write_file(folder: Path, name: str, content: bytes) -> str:
    """Write and sync one file; returns its digest."""
    with naming(folder / name), open(folder / name, "wb") as file:
        file.write(content)
        file.flush()
        failpoint("before fsync")
        os.fsync(file.fileno())
    return xxhash.xxh3_128_hexdigest(content)


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Write and sync the manifest, its own digest in it."""
    values = asdict(manifest)
    write_file(folder, MANIFEST, json.dumps({**values, "digest": _digest_of(values)}, indent=1).encode())


def read_manifest(folder: Path) -> Manifest:
    """Read a manifest. Raises `CheckpointError` when it is missing, damaged or of another format version."""
    path = folder / MANIFEST
    try:
        values = json.loads(path.read_bytes())
        version = values["format_version"]
        if version != FORMAT_VERSION:
            raise CheckpointError(f"{path}: format version {version}, this MegaLite reads {FORMAT_VERSION}")
        expected, found = values.pop("digest"), _digest_of(values)
        if found != expected:
            raise CheckpointError(f"{path} is damaged: its digest is {found}, it says {expected}")
        manifest = Manifest(**{**values, "files": [FileEntry(**entry) for entry in values["files"]]})
    except (FileNotFoundError, NotADirectoryError):
        raise CheckpointError(f"{folder} is not a checkpoint: it has no {MANIFEST}") from None
    except (OSError, ValueError, TypeError, KeyError, RecursionError) as error:
        raise CheckpointError(f"{path} is damaged: {error!r}") from None
    for entry in manifest.files:
        if not _FILE.fullmatch(entry.name) or entry.kind not in KINDS:
            raise CheckpointError(f"{path} names {entry.name!r}, which is not a file of a checkpoint")
    return manifest


def verify_file(folder: Path, entry: FileEntry) -> None:
    """Compare one file with its entry in the manifest. Raises `CheckpointError` that says what differs, `OSError`."""
    path = folder / entry.name
    if path.is_symlink():
        raise CheckpointError(f"{path} is a link: a checkpoint's files lie in its own directory")
    if not path.is_file():
        raise CheckpointError(f"{path} is missing")
    if path.stat().st_size != entry.num_bytes:
        raise CheckpointError(f"{path}: found {path.stat().st_size} bytes, the manifest says {entry.num_bytes}")
    with naming(path):
        digest = digest_file(path)
    if digest != entry.digest:
        raise CheckpointError(f"{path}: its digest is {digest}, the manifest says {entry.digest}")


def verify_checkpoint(folder: Path) -> Manifest:
    """Read a checkpoint's manifest and compare every file with it. Raises `CheckpointError` at the first difference."""
    manifest = read_manifest(folder)

    def verify(entry: FileEntry) -> None:
        try:
            verify_file(folder, entry)
        except OSError as error:
            raise CheckpointError(f"{folder / entry.name} cannot be read: {error}") from None

    with ThreadPoolExecutor(_READERS) as threads:
        list(threads.map(verify, manifest.files))
    return manifest


def digest_manifest(manifest: Manifest) -> str:
    """Equal for two checkpoints exactly if they hold the same: xxh3_128 of all that the manifest says."""
    return _digest_of(asdict(manifest))


def _digest_of(values: dict[str, Any]) -> str:
    """xxh3_128 of a manifest's values, whatever the order and the spaces in the file."""
    return xxhash.xxh3_128_hexdigest(json.dumps(values, sort_keys=True).encode())
