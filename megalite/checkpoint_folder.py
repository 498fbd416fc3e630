"""The checkpoints of a run: which there are, which one to continue from, which ones to keep.

run_dir/checkpoints/step_00000100/                    whole, or damaged since
                    step_00000200.tmp-<32 hex>/       being written, or left behind by a kill
                    superseded-step_00000300-<8 hex>/ above a step that the run went back to
                    latest                            the name of the newest, for people alone
"""

import math
import re
import shutil
import uuid
from pathlib import Path

from megalite.checkpoint_format import MANIFEST, Manifest, read_manifest, verify_checkpoint, write_file, write_manifest
from megalite.config.schema import CheckpointConfig
from megalite.data.files import put_in_place, sync_directory
from megalite.errors import CheckpointError, ResourceError
from megalite.failpoints import failpoint
from megalite.guard.goodput import GOODPUT, read_lives
from megalite.log import get_logger

LATEST = "latest"
_NAME = re.compile(r"step_(\d{8,})")
_TEMPORARY = re.compile(r"step_\d{8,}\.tmp-[0-9a-f]{32}|latest\.tmp")

log = get_logger(__name__)


def checkpoint_name(step: int) -> str:
    """The directory's name; zero-padded, so that names sort by step."""
    return f"step_{step:08d}"


def create_temporary(checkpoints: Path, step: int) -> Path:
    """A fresh directory to write in; a name that no reader takes for a checkpoint."""
    temporary = checkpoints / f"{checkpoint_name(step)}.tmp-{uuid.uuid4().hex}"
    temporary.mkdir(parents=True)
    return temporary


def commit(temporary: Path, manifest: Manifest) -> Path:
    """Write the manifest, sync, and give the directory its final name; returns it.

    A checkpoint of the same step that is already there is replaced. Raises `OSError`; called again it goes on.
    """
    final = temporary.parent / checkpoint_name(manifest.step)
    if temporary.exists():
        failpoint("before manifest")
        write_manifest(temporary, manifest)
        sync_directory(temporary)
        failpoint("before rename")
        put_in_place(temporary, final)
    failpoint("before latest")
    _name_latest(final)
    return final


def _name_latest(folder: Path) -> None:
    write_file(folder.parent, f"{LATEST}.tmp", folder.name.encode())
    (folder.parent / f"{LATEST}.tmp").replace(folder.parent / LATEST)
    sync_directory(folder.parent)


def set_aside_newer(checkpoints: Path, step: int) -> None:
    """Rename checkpoints above `step`, so that a run which starts again below them is not mistaken for theirs.

    Nothing is deleted; the new names say what the folders are and are no checkpoints' names.
    """
    for folder in _named(checkpoints):
        if _step_of(folder) > step:
            aside = folder.rename(checkpoints / f"superseded-{folder.name}-{uuid.uuid4().hex[:8]}")
            log.warning("%s is newer than what this run continues from (step %d): kept as %s", folder, step, aside.name)


def prune(checkpoints: Path, keep: CheckpointConfig) -> None:
    """Remove what the settings do not keep, and what interrupted saves left behind; call when the newest is verified.

    Kept: the newest; of those that are not ephemeral the last `keep`, the multiples of `keep_every`, and with
    `keep_best` the one whose evaluation has the lowest mean loss. What cannot be read is left to a person.
    """
    manifests = {}
    for folder in list_checkpoints(checkpoints):
        try:
            manifests[folder] = read_manifest(folder)
        except CheckpointError:
            continue
    lasting = [folder for folder, manifest in manifests.items() if not manifest.ephemeral]
    kept = {*list(manifests)[-1:], *lasting[-keep.keep :]}
    if keep.keep_every:
        kept.update(folder for folder in lasting if _step_of(folder) % keep.keep_every == 0)
    judged = [folder for folder in lasting if manifests[folder].evaluation]
    if keep.keep_best and judged:
        kept.add(min(judged, key=lambda folder: mean_loss(manifests[folder].evaluation)))
    for folder in manifests:
        if folder not in kept:
            failpoint("during prune")
            _remove(folder)
    if manifests and (newest := list(manifests)[-1]).name != _read_latest(checkpoints):
        _name_latest(newest)  # a kill came between the two names
    remove_temporaries(checkpoints)


def remove_temporaries(checkpoints: Path) -> None:
    """Remove what was being written here when a kill came."""
    for path in checkpoints.iterdir():
        if path.is_dir() and _TEMPORARY.fullmatch(path.name):
            shutil.rmtree(path)


def check_space(run_dir: Path, num_bytes: int) -> tuple[int, str]:
    """How many bytes are free for a checkpoint that takes `num_bytes`, and the same in words.

    Raises `ResourceError` where these are too few.
    """
    free = shutil.disk_usage(run_dir).free
    text = f"run_dir: a checkpoint takes {num_bytes / 1e9:.2f} GB, the disk of {run_dir} has {free / 1e9:.2f} GB free"
    if free < num_bytes:
        raise ResourceError(f"{text}; make room, or choose a run_dir on another disk")
    return free, text


def _read_latest(checkpoints: Path) -> str:
    try:
        return (checkpoints / LATEST).read_text(errors="replace")
    except OSError:
        return ""


def _remove(folder: Path) -> None:
    """First the name: a kill in the middle must not leave half a checkpoint under it."""
    doomed = folder.rename(folder.with_name(f"{folder.name}.tmp-{uuid.uuid4().hex}"))
    shutil.rmtree(doomed)


def mean_loss(evaluation: dict[str, float]) -> float:
    """The mean over validation sources of their losses, in nats a token; infinite without any."""
    losses = [value for key, value in evaluation.items() if key.endswith("/loss")]
    mean = sum(losses) / len(losses) if losses else math.inf
    return mean if math.isfinite(mean) else math.inf  # nan is less than nothing, and nothing less than it


def list_checkpoints(checkpoints: Path) -> list[Path]:
    """Directories with a checkpoint's name and a manifest, oldest first."""
    return [folder for folder in _named(checkpoints) if (folder / MANIFEST).is_file()]


def _named(checkpoints: Path) -> list[Path]:
    """Whatever has a checkpoint's name, oldest first."""
    if not checkpoints.is_dir():
        return []
    return sorted((path for path in checkpoints.iterdir() if _NAME.fullmatch(path.name)), key=_step_of)


def _step_of(folder: Path) -> int:
    return int(folder.name.removeprefix("step_"))


def choose_checkpoint(resume: str, run_dir: Path) -> Path | None:
    """What `checkpoint.resume` means for a run: a verified checkpoint's folder, or None for a start from step 0.

    `auto` is the newest whole checkpoint of the run, `never` none, anything else a folder. Raises `CheckpointError` for
    a folder that is not a whole checkpoint, and as `newest_checkpoint` does.
    """
    if resume == "auto":
        return newest_checkpoint(run_dir)
    if begun := _begun_with(resume, run_dir):
        log.warning(
            "checkpoint.resume=%s: %s began so already and is not at its end, so it goes on; to begin again choose "
            "another run_name, or remove it",
            resume,
            run_dir,
        )
        return begun
    return None if resume == "never" else require_checkpoint(resume, run_dir)


def _begun_with(resume: str, run_dir: Path) -> Path | None:
    """The newest whole checkpoint, where this same `resume` stood in the command that wrote it, and steps are left.

    So that a command which is given again, by a scheduler perhaps, goes on, whatever it began from.
    """
    try:
        folder = newest_checkpoint(run_dir)
    except CheckpointError:
        return None
    if folder is None:
        return None
    manifest = read_manifest(folder)
    same = manifest.config.get("checkpoint", {}).get("resume") == resume
    return folder if same and manifest.step < manifest.config["trainer"]["steps"] else None


def require_checkpoint(checkpoint: str | None, run_dir: Path) -> Path:
    """The verified checkpoint at `checkpoint`, or the run's newest. Raises `CheckpointError` when there is none."""
    if checkpoint is not None:
        verify_checkpoint(Path(checkpoint))
        return Path(checkpoint)
    folder = newest_checkpoint(run_dir)
    if folder is None:
        raise CheckpointError(f"{run_dir} holds no checkpoint yet: train first, or name one with checkpoint=PATH")
    return folder


def newest_checkpoint(run_dir: Path) -> Path | None:
    """The newest checkpoint of a run whose files all verify; older ones are fallen back on, with one warning.

    None when the run has none yet. Raises `CheckpointError` when there were checkpoints but none is whole: a run never
    starts again from zero in silence.
    """
    checkpoints = run_dir / "checkpoints"
    problems = []
    for folder in reversed(_named(checkpoints)):
        try:
            if (step := verify_checkpoint(folder).step) != _step_of(folder):
                raise CheckpointError(f"{folder / MANIFEST} is of step {step}")
        except CheckpointError as error:
            problems.append(str(error))
            continue
        if problems:
            log.warning("%s; falling back to %s", "; ".join(problems), folder.name)
        return folder
    rest = [path.name for path in checkpoints.iterdir()] if checkpoints.is_dir() else []
    if rest := sorted(name for name in rest if not _TEMPORARY.fullmatch(name)):
        raise CheckpointError(
            f"{checkpoints} holds {', '.join(rest[:5])}{' ...' if len(rest) > 5 else ''} and no whole checkpoint"
            f"{' (' + '; '.join(problems) + ')' if problems else ''}; restore one, or start over from step 0 with "
            "checkpoint.resume=never"
        )
    lives = read_lives(run_dir / GOODPUT)
    if lives and (saved := lives[-1].saved_step or lives[-1].first_step):
        raise CheckpointError(
            f"{run_dir} has saved step {saved}, says {GOODPUT}, and {checkpoints} holds no checkpoint: bring it back, "
            "or start over from step 0 with checkpoint.resume=never"
        )
    return None
