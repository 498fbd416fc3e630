"""Two runs of the same training, bit by bit: the figures of every step and the tensors of the last checkpoint."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megalite.checkpoint_folder import list_checkpoints
from megalite.checkpoint_format import KINDS, FileEntry, Manifest, read_manifest, verify_checkpoint
from megalite.metrics.jsonl import read_metrics

METRICS = "metrics.jsonl"
# Of the rows: what follows from the training alone, and not from how fast it went.
FIGURES = ("loss", "grad_norm", "learning_rate", "tokens_seen", "skipped_steps")
# Of the manifests: where the next step begins.
STATE = (
    "step", "samples_consumed", "tokens_seen", "skipped_steps", "skipped_in_a_row", "optimizer_step", "loss_scaler",
)  # fmt: skip
_NAMED = 3  # tensors that differ, described one by one


@dataclass(frozen=True)
class Comparison:
    """How far two runs were compared, and the first that differs: where, and both values."""

    num_steps: int = 0
    num_tensors: int = 0
    num_bytes: int = 0
    difference: str = ""  # empty: every bit is the same
    step: int | None = None  # of a difference in metrics.jsonl; None: it is in the checkpoint


def compare_runs(reference: Path, other: Path) -> Comparison:
    """Compare two run directories: all rows of metrics.jsonl, then the newest checkpoints by their files' digests.

    Raises `CheckpointError` when a manifest or a file is damaged: digests stand for bytes only where they are theirs.
    """
    rows = compare_rows(read_metrics(reference / METRICS), read_metrics(other / METRICS))
    if rows.difference:
        return rows
    folders = [newest(reference), newest(other)]
    names = [folder.name if folder else "none" for folder in folders]
    if names[0] != names[1] or not (folders[0] and folders[1]):
        found = f"the newest checkpoint is {names[0]} in {reference} and {names[1]} in {other}"
        return Comparison(rows.num_steps, difference=found)
    manifests = verify_checkpoint(folders[0]), verify_checkpoint(folders[1])
    files = manifests[0].files
    return Comparison(
        rows.num_steps,
        sum(len(entry.tensors) for entry in files),
        sum(entry.num_bytes for entry in files),
        next(_state_differences(*manifests), "") or next(_tensor_differences(folders[0], folders[1], *manifests), ""),
    )


def compare_rows(
    reference: Sequence[Mapping[str, Any]], other: Sequence[Mapping[str, Any]], whole: bool = True
) -> Comparison:
    """Compare rows of metrics.jsonl; without `whole`, `other` may hold a part of the steps only."""
    rows, others = ({row["step"]: row for row in run} for run in (reference, other))
    steps = sorted({*rows, *others} if whole else others)
    if not steps:
        return Comparison(difference="neither of the runs has logged a step")
    for step in steps:
        if step not in rows or step not in others:
            which = "first" if step not in rows else "second"
            return Comparison(len(steps), difference=f"step {step} has no row in the {which} run", step=step)
        for name in FIGURES:
            found = [row[step].get(name) for row in (rows, others)]
            if _exact(found[0]) != _exact(found[1]):
                return Comparison(len(steps), difference=f"step {step}: {_describe(name, *found)}", step=step)
    return Comparison(len(steps))


def describe_tensors(reference: Path, other: Path) -> list[str]:
    """The first tensors that differ between the newest checkpoints of two runs, a line each, and how many do."""
    folders = [newest(reference), newest(other)]
    if not (folders[0] and folders[1] and folders[0].name == folders[1].name):
        return []
    lines = list(_tensor_differences(folders[0], folders[1], *map(read_manifest, (folders[0], folders[1]))))
    more = [f"... and {len(lines) - _NAMED} more tensors"] if len(lines) > _NAMED else []
    return lines[:_NAMED] + more


def newest(run_dir: Path) -> Path | None:
    """The newest checkpoint of a run."""
    found = list_checkpoints(run_dir / "checkpoints")
    return found[-1] if found else None


def _describe(name: str, reference: Any, other: Any) -> str:
    text = f"{name} is {_decimal(reference)} in the first run and {_decimal(other)} in the second"
    if isinstance(reference, float) and isinstance(other, float):
        text += f", {abs(other - reference):.2g} apart"
    return text


def _decimal(value: Any) -> str:
    """A float's shortest decimal that gives the same bits, and the bits."""
    return f"{value!r} ({value.hex()})" if isinstance(value, float) else str(value)


def _exact(value: Any) -> str:
    """Equal texts for equal bits: a `nan` is equal to itself, and 0.0 is not -0.0."""
    return value.hex() if isinstance(value, float) else str(value)


def _state_differences(reference: Manifest, other: Manifest) -> Iterator[str]:
    for name in STATE:
        found = getattr(reference, name), getattr(other, name)
        if found[0] != found[1]:
            yield f"the checkpoints of step {reference.step}: {_describe(name, *found)}"


def _tensor_differences(folder: Path, other_folder: Path, manifest: Manifest, other: Manifest) -> Iterator[str]:
    """A line for each tensor that differs, weights first; files of the same digest are not read."""
    others = {entry.name: entry for entry in other.files}
    if others.keys() != {entry.name for entry in manifest.files}:
        yield f"the checkpoints of step {manifest.step} consist of different files: {folder} and {other_folder}"
        return
    for entry in sorted(manifest.files, key=lambda entry: (KINDS.index(entry.kind), entry.name)):
        if entry.digest != others[entry.name].digest:
            yield from _differences_of_file(folder, other_folder, entry)


def _differences_of_file(folder: Path, other_folder: Path, entry: FileEntry) -> Iterator[str]:
    import torch
    from safetensors import safe_open

    with safe_open(folder / entry.name, "pt") as file, safe_open(other_folder / entry.name, "pt") as other_file:
        for name in entry.tensors:
            tensor, other = (opened.get_tensor(name).flatten() for opened in (file, other_file))
            if tensor.shape != other.shape or tensor.dtype != other.dtype:
                yield f"{entry.kind} of {name}: another size or precision"
            elif not torch.equal(tensor.view(torch.uint8), other.view(torch.uint8)):
                changed = int((tensor != other).sum())
                apart, size = float((tensor - other).abs().max()), float(tensor.abs().max())
                yield (
                    f"{entry.kind} of {name}: {changed:,} of {tensor.numel():,} values differ, by {apart:.2g} at most "
                    f"(the largest value is {size:.2g})"
                )
