"""Weights & Biases: one run of theirs for one run directory, however often it is resumed; no secret leaves.

Settings that matter were tried with wandb 0.31 (and exist since 0.28.2): its metadata holds the command line, the
requirements file the machine's packages, the console log whatever was printed; all three are off. Its messages print
the server's address with the user-info in it, so it is silent here and we say what a user needs.
"""

import os
import re
import secrets
from pathlib import Path
from typing import Any

from megalite.config.schema import WandbConfig
from megalite.errors import ConfigError
from megalite.log import get_logger
from megalite.metrics.base import Row, panels
from megalite.metrics.wandb_file import read_wandb_file
from megalite.redaction import redact, redact_text

_INIT_SECONDS = 30.0  # how long a server may take to answer before the run is logged offline
_FINISH_SECONDS = 300.0  # how long the end of a run waits for uploads; the rest stays on disk for `wandb sync`
_ID_FILE = "wandb_run_id.txt"


class WandbSink:
    """Logs each row to a started wandb run; steps that the run holds already are left out."""

    def __init__(self, run: Any, known_steps: set[int]) -> None:
        """`run` is what `wandb.init` returned; `known_steps` were logged by earlier sessions of the same run."""
        self._run = run
        self._known = known_steps

    def log(self, step: int, row: Row) -> None:
        """Log the row's panels; the first row of a step counts."""
        if step not in self._known:
            self._known.add(step)
            self._run.log(panels(row), step=step, commit=True)

    def close(self) -> None:
        """Finish the run and end wandb's service process."""
        import wandb

        try:
            self._run.finish()
        finally:
            wandb.teardown()


def build_wandb_sink(
    settings: WandbConfig,
    run_dir: Path,
    run_name: str,
    resume_step: int,
    config: dict[str, Any],
    init_seconds: float = _INIT_SECONDS,
) -> WandbSink | None:
    """Start (at `resume_step` 0) or continue a wandb run inside `run_dir`, or return None after a warning.

    When `online` cannot be had (no key, no network), the run is logged offline; `wandb sync` uploads it later. Raises
    `ConfigError` when wandb is not installed.
    """
    os.environ.setdefault("WANDB_ERROR_REPORTING", "false")  # its telemetry has no other switch, and is read at import
    try:
        import wandb
    except ImportError as error:
        raise ConfigError(
            f"logging.wandb.mode={settings.mode} needs wandb, which cannot be imported ({error}): "
            "pip install wandb, or set logging.wandb.mode=disabled"
        ) from None
    for mode in dict.fromkeys((settings.mode, "offline")):
        try:
            run_id = _run_id(run_dir / _ID_FILE, new=resume_step == 0)
            known = _steps_on_disk(run_dir, run_id) if mode == "offline" else set()
            run = _start(wandb, settings, mode, run_dir, run_name, run_id, config, init_seconds)
        except Exception as error:
            wandb.teardown()  # or the id stays taken by the failed start
            then = "logging offline; `wandb sync` uploads it later" if mode == "online" else "going on without wandb"
            reason = redact_text(" ".join(f"{type(error).__name__}: {error}".split()))
            get_logger(__name__).warning("wandb could not start in mode %s (%s): %s", mode, reason, then)
            continue
        get_logger(__name__).info("wandb (%s): %s", mode, redact_text(run.url) if run.url else f"{run_dir}/wandb")
        return WandbSink(run, known | set(range(run.starting_step)))
    return None


def _start(
    wandb: Any,
    settings: WandbConfig,
    mode: str,
    run_dir: Path,
    run_name: str,
    run_id: str,
    config: dict[str, Any],
    init_seconds: float,
) -> Any:
    # Silent before anything else: it also keeps wandb from asking for a key on the terminal, which would wait for ever.
    wandb.setup(settings=wandb.Settings(silent=True))
    return wandb.init(
        mode=mode,
        dir=str(run_dir),
        project=settings.project,
        entity=settings.entity,
        group=settings.group,
        tags=list(settings.tags),
        name=run_name,
        id=run_id,
        resume="allow",
        config=redact(config),
        settings=wandb.Settings(
            silent=True,
            console="off",
            disable_code=True,
            disable_git=True,
            save_code=False,
            x_disable_meta=True,
            x_save_requirements=False,
            init_timeout=init_seconds,
            finish_timeout=_FINISH_SECONDS,
        ),
    )


def _run_id(path: Path, new: bool) -> str:
    """The id of the wandb run that belongs to this run directory, kept in `path`."""
    if not new and path.exists():
        stored = path.read_text(encoding="utf-8").strip()
        if re.fullmatch(r"[0-9a-z]{8}", stored):
            return stored
    run_id = secrets.token_hex(4)
    path.write_text(run_id + "\n", encoding="utf-8")
    return run_id


def _steps_on_disk(run_dir: Path, run_id: str) -> set[int]:
    """The steps that earlier offline sessions of this run have written."""
    files = (run_dir / "wandb").glob(f"offline-run-*-{run_id}/run-{run_id}.wandb")
    return {int(row["_step"]) for file in files for row in read_wandb_file(file)}
