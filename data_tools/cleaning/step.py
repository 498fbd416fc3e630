"""What every step of the cleaning has in common."""

import importlib.util
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from .words import View


@dataclass(frozen=True, slots=True)
class Dropped:
    """What a step gives back instead of a text: the document goes, for this reason."""

    reason: str


class Step(Protocol):
    """One step. Its fields are its options; one that cannot work raises `ValueError("field: why")` when it is made."""

    def apply(self, view: View, language: str, counts: Counter[str]) -> str | Dropped:
        """The text after this step. `language` is the document's, "" when unknown; `counts` is for what it tells."""
        ...


def require(holds: bool, message: str) -> None:
    """Refuse an option: `message` begins with its name."""
    if not holds:
        raise ValueError(message)


def require_share(step: object, *names: str) -> None:
    """Refuse options that are no shares between 0 and 1."""
    for name in names:
        value = getattr(step, name)
        for share in value if isinstance(value, tuple) else (value,):
            require(0 <= share <= 1, f"{name}: found {value}, allowed: 0 to 1")


def require_package(name: str, extra: str) -> None:
    """Refuse a step whose package is not installed, without importing it."""
    try:
        found = importlib.util.find_spec(name) is not None
    except ValueError:  # a module without a specification
        found = False
    if not found:
        raise ModuleNotFoundError(f"needs one more package, {name}: pip install 'megalite[{extra}]'")


def read_list(name: str, path: str) -> list[str]:
    """The lines of the file that the option `name` gives, without blank ones and comments (#)."""
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{name}: {path} cannot be read: {error}") from None
    found = [line.strip() for line in lines if line.strip() and not line.startswith("#")]
    require(bool(found), f"{name}: {path} holds no line")
    return found
