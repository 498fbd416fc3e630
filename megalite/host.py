"""What a host says of itself to others, and how hosts find out whether they share a directory."""

import importlib.metadata
import platform
import secrets
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import megalite

CLOCK_SECONDS = 2.0  # further apart, the times in logs and the ages of locks mislead
PACKAGES = ("torch", "deepspeed", "safetensors", "numpy")  # whose other version computes or writes something else


def package_versions() -> dict[str, str]:
    """The versions on which hosts must agree to train together."""
    versions = {"python": platform.python_version(), "megalite": megalite.__version__}
    return versions | {name: importlib.metadata.version(name) for name in PACKAGES}


def differences(
    host: str, versions: Mapping[str, str], ahead: float, first: str, wanted: Mapping[str, str]
) -> list[str]:
    """Why `host` cannot train together with the host `first`, whose versions are `wanted`; `ahead`: its clock, in s."""
    problems = [
        f"{host} has {name} {versions.get(name)}, {first} has {version}: install the same"
        for name, version in wanted.items()
        if versions.get(name) != version
    ]
    if abs(ahead) > CLOCK_SECONDS:
        problems.append(f"the clock of {host} is {ahead:+.1f} s off that of {first}: let NTP set both")
    return problems


@contextmanager
def shared_mark(directory: Path, text: str = "") -> Iterator[Path]:
    """A file with `text` in `directory`, which is made if needed, for others to see who share its disk.

    Renamed into place, as checkpoints are; removed at the end.
    """
    directory.mkdir(parents=True, exist_ok=True)
    mark = directory / f".hosts-{secrets.token_hex(8)}"
    try:
        write_mark(mark, text)
        yield mark
    finally:
        mark.unlink(missing_ok=True)


def write_mark(mark: Path, text: str) -> None:
    """Write `mark`, or put another text in its place, by rename."""
    temporary = mark.with_suffix(".tmp")
    temporary.write_text(text, encoding="utf-8")
    temporary.rename(mark)
