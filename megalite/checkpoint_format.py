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
import shutil
import uuid
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import xxhash

from megalite.data.files import digest_file, sync_directory
from megalite.errors import CheckpointError
from megalite.log import get_logger

FORMAT_VERSION = 1
MANIFEST = "manifest.json"
LATEST = "latest"
KINDS = ("weight", "exp_avg", "exp_avg_sq")
_NAME = re.compile(r"step_(\d{8,})")
_TEMPORARY = re.compile(r"step_\d{8,}\.tmp-[0-9a-f]{32}")
_FILE = re.compile(r"[a-z_]+-\d{5}\.safetensors")

log = get_logger(__name__)


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
    format_version: int = FORMAT_VERSION

    def location(self, kind: str, name: str) -> str:
        """The file that holds tensor `name` of `kind`. Raises `CheckpointError` when there is none."""
        for entry in self.files:
            if entry.kind == kind and name in entry.tensors:
                return entry.name
        raise CheckpointError(f"the checkpoint of step {self.step} holds no {kind} of {name}")


def checkpoint_name(step: int) -> str:
    """The directory's name; zero-padded, so that names sort by step."""
    return f"step_{step:08d}"


def create_temporary(checkpoints: Path, step: int) -> Path:
    """A fresh directory to write in; a name that no reader takes for a checkpoint."""
    temporary = checkpoints / f"{checkpoint_name(step)}.tmp-{uuid.uuid4().hex}"
    temporary.mkdir(parents=True)
    return temporary


def write_file(folder: Path, name: str, content: bytes) -> str:
    """Write and sync one file; returns its digest."""
    with open(folder / name, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    return xxhash.xxh3_128_hexdigest(content)


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Write and sync the manifest, its own digest in it."""
    values = asdict(manifest)
    write_file(folder, MANIFEST, json.dumps({**values, "digest": _digest_of(values)}, indent=1).encode())


def commit(temporary: Path, manifest: Manifest) -> Path:
    """Write the manifest, sync, and give the directory its final name; returns it.

    A checkpoint of the same step that is already there is replaced.
    """
    checkpoints = temporary.parent
    write_manifest(temporary, manifest)
    sync_directory(temporary)
    final = checkpoints / checkpoint_name(manifest.step)
    if final.exists():
        old = final.rename(create_temporary(checkpoints, manifest.step) / "replaced")
        temporary.rename(final)
        shutil.rmtree(old.parent)
    else:
        temporary.rename(final)
    write_file(checkpoints, f"{LATEST}.tmp", final.name.encode())
    (checkpoints / f"{LATEST}.tmp").replace(checkpoints / LATEST)
    sync_directory(checkpoints)
    return final


def set_aside_newer(checkpoints: Path, step: int) -> None:
    """Rename checkpoints above `step`, so that a run which starts again below them is not mistaken for theirs.

    Nothing is deleted; the new names say what the folders are and are no checkpoints' names.
    """
    for folder in list_checkpoints(checkpoints):
        if int(folder.name[5:]) > step:
            aside = folder.rename(checkpoints / f"superseded-{folder.name}-{uuid.uuid4().hex[:8]}")
            log.warning("%s is newer than what this run continues from (step %d): kept as %s", folder, step, aside.name)


def prune(checkpoints: Path, keep: int) -> None:
    """Remove all but the newest `keep` checkpoints, and what interrupted saves left behind."""
    for folder in list_checkpoints(checkpoints)[:-keep]:
        shutil.rmtree(folder)
    for folder in checkpoints.iterdir():
        if _TEMPORARY.fullmatch(folder.name):
            shutil.rmtree(folder)


def list_checkpoints(checkpoints: Path) -> list[Path]:
    """Directories with a checkpoint's name and a manifest, oldest first."""
    if not checkpoints.is_dir():
        return []
    found = [folder for folder in checkpoints.iterdir() if _NAME.fullmatch(folder.name)]
    return sorted(
        (folder for folder in found if (folder / MANIFEST).is_file()), key=lambda folder: int(folder.name[5:])
    )


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
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise CheckpointError(f"{path} is damaged: {error!r}") from None
    for entry in manifest.files:
        if not _FILE.fullmatch(entry.name) or entry.kind not in KINDS:
            raise CheckpointError(f"{path} names {entry.name!r}, which is not a file of a checkpoint")
    return manifest


def verify_file(folder: Path, entry: FileEntry) -> None:
    """Compare one file with its entry in the manifest. Raises `CheckpointError` that says what differs."""
    path = folder / entry.name
    if not path.is_file():
        raise CheckpointError(f"{path} is missing")
    if path.stat().st_size != entry.num_bytes:
        raise CheckpointError(f"{path}: found {path.stat().st_size} bytes, the manifest says {entry.num_bytes}")
    digest = digest_file(path)
    if digest != entry.digest:
        raise CheckpointError(f"{path}: its digest is {digest}, the manifest says {entry.digest}")


def choose_checkpoint(resume: str, run_dir: Path) -> Path | None:
    """What `checkpoint.resume` means for a run: a verified checkpoint's folder, or None for a start from step 0.

    `auto` is the newest whole checkpoint of the run, `never` none, anything else a folder. Raises `CheckpointError` for
    a folder that is not a whole checkpoint, and as `newest_checkpoint` does.
    """
    if resume == "never":
        return None
    if resume == "auto":
        return newest_checkpoint(run_dir)
    folder = Path(resume)
    for entry in read_manifest(folder).files:
        verify_file(folder, entry)
    return folder


def require_checkpoint(checkpoint: str | None, run_dir: Path) -> Path:
    """The verified checkpoint at `checkpoint`, or the run's newest. Raises `CheckpointError` when there is none."""
    folder = choose_checkpoint(checkpoint or "auto", run_dir)
    if folder is None:
        raise CheckpointError(f"{run_dir} holds no checkpoint yet: train first, or name one with checkpoint=PATH")
    return folder


def newest_checkpoint(run_dir: Path) -> Path | None:
    """The newest checkpoint of a run whose files all verify; older ones are fallen back on, with a warning.

    None when the run has none yet. Raises `CheckpointError` when there are checkpoints but none is whole: a run never
    starts again from zero in silence.
    """
    found = list_checkpoints(run_dir / "checkpoints")
    for folder in reversed(found):
        try:
            for entry in read_manifest(folder).files:
                verify_file(folder, entry)
        except CheckpointError as error:
            log.warning("%s; falling back to an older checkpoint", error)
            continue
        return folder
    if found:
        raise CheckpointError(
            f"{run_dir}/checkpoints holds {len(found)} checkpoint(s) and none is whole; restore one, or start over "
            "from step 0 with checkpoint.resume=never"
        )
    return None


def _digest_of(values: dict[str, Any]) -> str:
    """xxh3_128 of a manifest's values, whatever the order and the spaces in the file."""
    return xxhash.xxh3_128_hexdigest(json.dumps(values, sort_keys=True).encode())
