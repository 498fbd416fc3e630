"""The rules of the conf group `launch`: what each launcher needs, and what it would ignore."""

import dataclasses
import re
from collections.abc import Iterator

from megalite.config.frozen import FROZEN
from megalite.config.place import PLACES
from megalite.config.schema_launch import LaunchConfig, SlurmConfig

# Keys that mean something to some launchers only; the others refuse them, so that no setting is ignored in silence.
_ONLY_FOR = {
    "nodes": ("torchrun", "deepspeed", "slurm"),
    "wait": ("slurm",),
    "address": ("torchrun", "deepspeed"),
    "port": ("torchrun", "deepspeed", "slurm"),
    "interface": ("torchrun", "deepspeed", "slurm"),
    "hostfile": ("deepspeed",),
    "slurm": ("slurm",),
}
_SECRET = re.compile(r"(?i)(^|_)(key|token|secret|password|passwd|credentials?)$")
_MOST_MINUTES = 1440
_OF_RANKS = ("nodes", "nproc_per_node", "address", "port", "interface", "start_timeout", "grace", "hostfile")
_TIME = re.compile(r"(?:(\d+)-)?(\d+)(?::(\d{1,2}))?(?::(\d{1,2}))?")


def launch_rules(launch: LaunchConfig) -> Iterator[str]:
    """A line for every rule that `launch` breaks."""
    defaults = LaunchConfig()
    for key, launchers in _ONLY_FOR.items():
        if launch.name not in launchers and getattr(launch, key) != getattr(defaults, key):
            found = f"{getattr(launch, key)!r}" if key != "slurm" else "values"
            fix = f"it is for {_either(launchers)}"
            yield f"launch.{key}: found {found}, which launch={launch.name} has no use for; {fix}"
    for key in ("nodes", "nproc_per_node"):
        if (number := getattr(launch, key)) is not None and number < 1:
            yield f"launch.{key}: found {number}, must be at least 1"
    if launch.restarts < 0:
        yield f"launch.restarts: found {launch.restarts}, must be 0 (none) or more"
    if launch.port is not None and not 1024 <= launch.port < 65535:
        yield f"launch.port: found {launch.port}, must lie between 1024 and 65534; the one above it is used too"
    for key in ("start_timeout", "grace"):
        if not 0 < getattr(launch, key) < float("inf"):
            yield f"launch.{key}: found {getattr(launch, key)}, must be above 0 seconds"
    for key in ("address", "interface", "hostfile") if launch.nodes == 1 else ():
        if getattr(launch, key) is not None:
            yield f"launch.{key}: found {getattr(launch, key)!r}, which launch.nodes=1 has no use for"
    if launch.name == "torchrun" and launch.nodes > 1 and not launch.address:
        yield "launch.address: is null; with launch=torchrun on several nodes it is the name of the first of them"
    if launch.name == "deepspeed" and launch.nodes > 1 and not launch.hostfile:
        yield "launch.hostfile: is null; with launch=deepspeed on several nodes it names them, `HOST slots=N` a line"
    yield from _environment_rules(launch)
    yield from _slurm_rules(launch.slurm)


def slurm_path_rules(key: str, path: str) -> Iterator[str]:
    """A line where `path`, of `key`, cannot be written into a batch script."""
    if re.search(r"[\"\\\n]", path):
        yield f"{key}: found {path!r}; in a batch script a path holds no quotes, backslashes or line ends"


def build_launch_rules(launch: LaunchConfig, parts: int) -> Iterator[str]:
    """A line for every rule that the launch of a data build in so many parts breaks: it has no ranks."""
    if launch.name not in ("local", "slurm"):
        yield f"launch: found {launch.name}, allowed for a build: local, slurm"
        return
    kept = LaunchConfig(name=launch.name)
    if launch.name == "slurm":
        slurm = dataclasses.replace(launch.slurm, signal_seconds=0)  # it has nothing to save
        launch = dataclasses.replace(launch, slurm=slurm)
        # Restarts stand in conf/launch/slurm.yaml.
        kept = dataclasses.replace(launch, **{key: getattr(kept, key) for key in _OF_RANKS})
    for field in dataclasses.fields(launch):
        if getattr(launch, field.name) != getattr(kept, field.name):
            yield f"launch.{field.name}: found {getattr(launch, field.name)!r}, which a build has no use for"
    for key in ("container", "mounts", "tasks"):
        if getattr(launch.slurm, key) != getattr(SlurmConfig(), key):
            yield f"launch.slurm.{key}: found {getattr(launch.slurm, key)!r}, which a build has no use for"
    if launch.name == "local" and parts != 1:
        yield f"parts: found {parts}, which are jobs of launch=slurm; on one machine see workers"
    yield from launch_rules(launch)


def _environment_rules(launch: LaunchConfig) -> Iterator[str]:
    for name, value in launch.environment.items():
        key = f"launch.environment.{name}"
        if not re.fullmatch(r"[A-Za-z_]\w*", name):
            yield f"{key}: {name!r} is no name of a variable"
        elif name in PLACES or name == FROZEN:
            yield f"{key}: is for the launcher to set"
        elif _SECRET.search(name):
            yield f"{key}: would be written to the run directory; export {name} where you start the run instead"
        elif isinstance(value, bool | float) or not isinstance(value, str | int) or "\n" in str(value):
            yield f"{key}: found {value!r}, expected text on one line or a whole number; quotes make text of anything"


def _slurm_rules(slurm: SlurmConfig) -> Iterator[str]:
    for field in dataclasses.fields(slurm):
        value = getattr(slurm, field.name)
        for text in value if isinstance(value, tuple) else (value,):
            if isinstance(text, str) and (not text.strip() or re.search(r"[\n\r\0]", text)):
                yield f"launch.slurm.{field.name}: found {text!r}, expected text on one line"
            elif isinstance(text, str) and field.name != "setup" and re.search(r"[\"'`$\\;]", text):
                yield f"launch.slurm.{field.name}: found {text!r}, which holds a character that a shell would act on"
    for option in slurm.options:
        if not re.match(r"--?[a-zA-Z]", option):
            yield f"launch.slurm.options: found {option!r}, expected an option of sbatch, such as --reservation=night"
    for job in slurm.after:
        if not job.isdecimal():
            yield f"launch.slurm.after: found {job!r}, expected the number of a job"
    for key in ("gpus_per_node", "cpus_per_task"):
        if (number := getattr(slurm, key)) is not None and number < 1:
            yield f"launch.slurm.{key}: found {number}, must be at least 1"
    if not 0 <= slurm.signal_seconds < 65536:
        yield f"launch.slurm.signal_seconds: found {slurm.signal_seconds}, must lie between 0 and 65535"
    if slurm.mounts and not slurm.container:
        yield "launch.slurm.mounts: needs launch.slurm.container"
    if slurm.time is not None:
        limit = 0 if slurm.time == "UNLIMITED" else time_limit(slurm.time)
        if limit is None:
            yield f"launch.slurm.time: found {slurm.time!r}, expected minutes, HH:MM:SS, D-HH:MM:SS or UNLIMITED"
        elif slurm.time.isdecimal() and int(slurm.time) >= _MOST_MINUTES:
            yield (
                f"launch.slurm.time: found {slurm.time}, which are minutes: write a day or more as D-HH:MM:SS; in YAML "
                "put quotes around times, for 4:00:00 without them is the number 14400"
            )
        elif 0 < limit <= slurm.signal_seconds:
            yield (
                f"launch.slurm.signal_seconds: found {slurm.signal_seconds}, but launch.slurm.time={slurm.time} ends "
                f"the job after {limit} s: the run would be stopped as soon as it starts"
            )


def time_limit(text: str) -> int | None:
    """Seconds of a time limit as sbatch reads it; None when it cannot. (M, M:S, H:M:S, D-H, D-H:M, D-H:M:S)"""
    match = _TIME.fullmatch(text)
    if not match:
        return None
    days, *parts = match.groups()
    numbers = [int(part) for part in parts if part is not None]
    if days is not None:
        hours, minutes, seconds = [*numbers, 0, 0][:3]
        return ((int(days) * 24 + hours) * 60 + minutes) * 60 + seconds
    if len(numbers) == 3:
        return (numbers[0] * 60 + numbers[1]) * 60 + numbers[2]
    return numbers[0] * 60 + (numbers[1] if len(numbers) == 2 else 0)


def _either(names: tuple[str, ...]) -> str:
    return " or ".join(f"launch={name}" for name in names)
