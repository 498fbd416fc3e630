"""`megalite data build launch=slurm`: an array of jobs for the parts, and one more that puts them together."""

import dataclasses
import re
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from megalite.config.schema_data import DataBuildConfig
from megalite.config.schema_launch import LaunchConfig
from megalite.errors import EXIT_OK

from ..tail import TAIL_BYTES, tail_lines
from .script import batch_script
from .submit import JOB, refuse_queued, submit, wait_for


def submit_build(config: DataBuildConfig, arguments: Sequence[str]) -> int:
    """Submit the build of `arguments`; returns 0 once it is in the queue, or with `launch.wait` its exit code."""
    folder = Path(f"{config.output}.slurm")
    launch, after = config.launch, config.launch.slurm.after
    scripts = dict(build_scripts(config, arguments, folder.absolute()))
    if launch.dry_run:
        print("\n".join(f"# {name}\n{text}" for name, text in scripts.items()), end="")
        return EXIT_OK
    refuse_queued("output", folder, "and the same command then begins where it was")
    folder.mkdir(parents=True, exist_ok=True)
    job, numbers = "", []
    said = {log: log.stat().st_size for log in folder.glob("*.log")}  # before: jobs append to what is there
    for name, text in scripts.items():
        (folder / f"{name}.sbatch").write_text(text, encoding="utf-8")
        job = submit(folder / f"{name}.sbatch", after=[job] if job else after)
        numbers.append(job)
        (folder / JOB).write_text(" ".join(numbers) + "\n", encoding="utf-8")
        print(f"job {job}: {folder / name}.sbatch; it writes to {folder}")
    print(f"to train on it when it is there: launch.slurm.after=[{job}]")
    if not launch.wait:
        return EXIT_OK
    if code := wait_for(job):
        _tell_why(folder, said)
    return code


def _tell_why(folder: Path, said: Mapping[Path, int]) -> None:
    """The last words of the first job that has failed: those after it are only cancelled. `said`: bytes from before."""
    for log in [*sorted(folder.glob("part_*.log")), folder / "build.log"]:
        size = (log.stat().st_size if log.exists() else 0) - said.get(log, 0)
        lines = tail_lines(log, min(size, TAIL_BYTES))[0] if size > 0 else []
        if errors := [line for line in lines if re.search(r"Error: |error: ", line)]:
            print(f"{log}: {errors[-1]}", file=sys.stderr)
            return


def build_scripts(config: DataBuildConfig, arguments: Sequence[str], folder: Path) -> list[tuple[str, str]]:
    """The batch scripts by name, in their order; they write to `folder`."""
    names = ("launch", "part", "parts")
    kept = [word for word in arguments if word.partition("=")[0].partition(".")[0] not in names]
    command = ["exec", sys.executable, "-m", "megalite.launch.cli", "data", "build", *kept]
    words = " ".join(shlex.quote(word) for word in command)
    name = re.sub(r"[^\w.-]", "_", Path(config.output).name)
    launch = _without_dependencies(config.launch)
    scripts = []
    if config.parts > 1:
        part = f"part=[$SLURM_ARRAY_TASK_ID,{config.parts}]"
        array = f"0-{config.parts - 1}"
        text = batch_script(f"{name}-parts", launch, 1, folder / "part_%a.log", [f'{words} "{part}"'], array)
        scripts.append(("parts", text))
    return [*scripts, ("build", batch_script(name, launch, 1, folder / "build.log", [words]))]


def _without_dependencies(launch: LaunchConfig) -> LaunchConfig:
    """Those are given when a script is submitted: the second one waits for the first. A build has nothing to save."""
    return dataclasses.replace(launch, slurm=dataclasses.replace(launch.slurm, after=(), signal_seconds=0))
