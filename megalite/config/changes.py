"""What may differ between the configuration that saved a checkpoint and the one that resumes from it."""

from collections.abc import Mapping, Sequence
from typing import Any

from megalite.config.compose import SAFE, flatten
from megalite.errors import CheckpointError

# The checkpoint's tensors would not fit, or would mean something else.
REFUSED = ("model",)
BUT_NOT_REFUSED = ("model.dropout",)
_MOVES_DROPOUT = ("parallel", "trainer.micro_batch_size", "engine.compile")  # of the safe ones


def check_changes(old: Mapping[str, Any], new: Mapping[str, Any], allowed: Sequence[str]) -> list[str]:
    """Compare two configurations (plain values); returns the changes as `key: old -> new (class)`.

    The class is "safe", or "allowed" for one that changes the trajectory and is in `allowed`. Raises `CheckpointError`
    for a change that is refused, whatever `allowed` says, and for one that changes the trajectory and is not in
    `allowed`.
    """
    before, after = flatten(old), flatten(new)
    changed = {key for key in before | after if before.get(key) != after.get(key)}
    notes, refused, asked = [], [], []
    for key in sorted(changed):
        note = f"{key}: {before.get(key)} -> {after.get(key)}"
        if _under(key, REFUSED) and not _under(key, BUT_NOT_REFUSED):
            refused.append(note)
        elif _under(key, SAFE):
            notes.append(f"{note} ({safety_of(key, after.get('model.dropout'))})")
        elif _under(key, allowed):
            notes.append(f"{note} (allowed: it changes the trajectory)")
        else:
            asked.append(note)
    if refused:
        raise CheckpointError("the checkpoint belongs to another model:\n  " + "\n  ".join(refused))
    if asked:
        keys = ",".join(note.split(":")[0] for note in asked)
        raise CheckpointError(
            "these changes would take the run off its trajectory:\n  "
            + "\n  ".join(asked)
            + "\nundo them, or allow them "
            f"with checkpoint.allow_changes=[{keys}], or begin another run with another run_name"
        )
    return notes


def safety_of(key: str, dropout: float | None) -> str:
    """How safe a change of `key`, one of `SAFE`, is for a run with this rate of dropout."""
    return "safe, but dropout draws other elements" if dropout and _under(key, _MOVES_DROPOUT) else "safe"


def _under(key: str, prefixes: Sequence[str]) -> bool:
    return any(key == prefix or key.startswith((f"{prefix}.", f"{prefix}[")) for prefix in prefixes)
