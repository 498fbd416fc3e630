"""The dataclasses of the commands that look at runs: `megalite jobs` and `megalite logs`."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class JobsConfig:
    """`megalite jobs`."""

    folder: str = "outputs"  # every run below it is shown, those of sweeps too
    watch: float = 0.0  # seconds between two looks; 0: look once
    format: Literal["table", "json"] = "table"  # json: one document, for scripts


@dataclass(frozen=True, kw_only=True)
class LogsConfig:
    """`megalite logs`."""

    run_dir: str  # of a run, or of a sweep
    ranks: tuple[int, ...] = ()  # only these; empty: all
    lines: int = 50  # so many of the newest are shown
    errors: bool = False  # show only errors
