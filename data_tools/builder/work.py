"""The work directory of a build: what it is named by, who may be in it, and what is left of it."""

import dataclasses
import glob
import json
import shutil
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path

import xxhash

from megalite.config.schema_data import DataBuildConfig
from megalite.guard.lock import RunLock
from megalite.log import get_logger

from ..formats import WHOLE
from ..readers import default_source, spans_of, status_of
from .report import REPORT
from .segments import read_done
from .units import SEGMENT_BYTES, Part, Unit

log = get_logger(__name__)

_TOGETHER_BYTES, _TOGETHER_FILES = 1 << 23, 256  # small files that make one unit


def units_of(config: DataBuildConfig, files: Sequence[Path], work: Path) -> list[Unit]:
    """In order; a unit's folder is named by what its files are, so that a changed one is read again."""
    source = default_source(config.input, files, config.reader)
    groups: list[list[Part]] = []
    together = 0  # bytes of the last group
    for path in files:
        _, size, changed = identity_of(path)
        for span in spans_of(path, config.reader):
            # Files of a few kB each would cost more in folders than in reading.
            fits = span == WHOLE and groups and together + size <= _TOGETHER_BYTES and len(groups[-1]) < _TOGETHER_FILES
            if not fits:
                groups.append([])
                together = 0
            together += size
            groups[-1].append(Part(path, span, size, changed))
    units = []
    for parts in groups:
        identity = json.dumps([source, *([str(part.path), *dataclasses.astuple(part)[1:]] for part in parts)])
        units.append(Unit(tuple(parts), source, work / f"unit_{xxhash.xxh3_64_hexdigest(identity.encode())}"))
    return units


def identity_of(path: Path) -> tuple[str, int, int]:
    """Its name, its size in bytes and its time of change in nanoseconds."""
    status = status_of(path)
    return str(path), status.st_size, status.st_mtime_ns


def names_of(units: Sequence[Unit]) -> str:
    """What the input was, in short."""
    return "\n".join(unit.folder.name for unit in units)


def was_committed(work: Path, output: Path, units: Sequence[Unit]) -> bool:
    """Whether a build of the same input was killed when its stores had their final name, and its work a folder yet."""
    mark = work / REPORT
    whole = mark.is_file() and (output / REPORT).is_file() and not (work / "stores").exists()
    return whole and mark.read_text(encoding="utf-8") == names_of(units)


def remove_work(work: Path) -> None:
    """The mark of what was committed goes last: a kill in between leaves it."""
    for path in work.iterdir():
        if path.is_dir():
            shutil.rmtree(path)
        elif path.name != REPORT:
            path.unlink()
    (work / REPORT).unlink(missing_ok=True)
    work.rmdir()


@contextmanager
def work_directory(work: Path, units: Sequence[Unit]) -> Iterator[None]:
    """Make and lock a build's work directory; an error leaves it when there is much in it to go on from."""
    for other in work.parent.glob(f"{glob.escape(work.name.rsplit('-', 1)[0])}-*"):
        if other != work:
            log.warning("%s is left of a build with other settings: remove it when it is not wanted", other)
    lock = RunLock(work, "output", "build", "output")
    try:
        yield
    except BaseException:
        done = [unit for unit in units if read_done(unit.folder)]
        if sum(map(_num_bytes, done)) > SEGMENT_BYTES:
            log.warning("%d of %d parts are done and kept in %s: the same command goes on", len(done), len(units), work)
        else:
            shutil.rmtree(work)
        raise
    else:
        remove_work(work)
    finally:
        lock.close()


@contextmanager
def part_directory(work: Path, part: tuple[int, int]) -> Iterator[Path]:
    """A folder of a share's own in the work directory, which shares may fill together, and nobody puts together yet."""
    with ExitStack() as stack:
        stack.enter_context(closing(RunLock(work, "output", "build", "output", shared=True)))
        own = work / "part_{}_of_{}".format(*part)
        stack.enter_context(closing(RunLock(own, "part", "build", "part")))
        yield own


def _num_bytes(unit: Unit) -> int:
    """Of the segments that are written."""
    return sum(path.stat().st_size for path in unit.folder.iterdir())
