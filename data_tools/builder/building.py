"""Documents -> token stores: `output/{train,validation}/<source>/`, and a report beside them.

1. The input is cut into units (files). Workers read, clean, hash and encode them into segments (`units.py`), in a work
   directory beside the output. A segment is written whole and done once: a build that was killed goes on from there.
2. Duplicates are found over all segments (`dedup.py`).
3. The segments that are left are put together, in the order of the input (`merging.py`), and get the final name.

The segments depend on the input and the configuration alone, so the stores are the same bytes for any number of workers
and however often the build was killed.
"""

import dataclasses
import json
import os
import shutil
from collections.abc import Mapping, Sequence
from concurrent.futures.process import BrokenProcessPool
from importlib import metadata
from pathlib import Path

import xxhash

import megalite
from megalite.config.schema_data import DataBuildConfig
from megalite.config.validate_commands import validate_data_build
from megalite.data.files import OVERWRITE_HINT, commit_directory, disk_errors, refuse_existing, write_synced
from megalite.data.manifest import DTYPES, dtype_for
from megalite.errors import DataError, ResourceError
from megalite.log import get_logger
from megalite.tokenizer import Tokenizer, load_tokenizer

from ..cleaning import build_cleaner
from ..readers import find_files
from .decontamination import write_ngrams
from .dedup import find_duplicates
from .line_dedup import mark_repeats
from .merging import WrittenStore, write_stores
from .minhash import require_minhash
from .page import build_page
from .report import REPORT, REPORT_PAGE, BuildReport, make_report, read_report
from .segments import DOCUMENT, Counts, finished_heads, open_segments, read_done
from .units import Unit, Worker
from .work import identity_of, names_of, part_directory, remove_work, units_of, was_committed, work_directory
from .workers import run_units

log = get_logger(__name__)

_LIBRARIES = ("ftfy", "selectolax", "py3langid", "trafilatura", "rensa")  # whose versions may change what is kept
# What the bytes of a build do not depend on, or where they go.
_NOT_IN_DIGEST = ("workers", "overwrite", "output", "part", "parts", "launch")


def build_store(config: DataBuildConfig) -> BuildReport:
    """Tokenise `config.input` into stores below `config.output`; a build that was killed is gone on with.

    Raises `ConfigError` for values out of range, `DataError` for bad input, an unfit tokenizer, an output that exists
    (without `overwrite`) or no document at all, `ResourceError` when the disk or a worker gives out, or another build
    is at it. After an error nothing stands under the final name.
    """
    tokenizer, work, units = _plan(config)
    mark, output = REPORT if config.overwrite else None, Path(config.output)
    if was_committed(work, output, units):
        log.info("%s was finished already", output)
        remove_work(work)
        return read_report(output)
    refuse_existing(output, mark, OVERWRITE_HINT)
    try:
        with disk_errors(output), work_directory(work, units):
            report = _build(config, units, tokenizer, work)
            # So that what comes after the next line is known for what it is.
            (work / REPORT).write_text(names_of(units), encoding="utf-8")
            commit_directory(work / "stores", output, mark)
    except BrokenProcessPool:
        raise ResourceError("a worker process died, perhaps for want of memory: set a smaller workers=") from None
    return report


def check_build(config: DataBuildConfig) -> None:
    """Raise what `build_store` would before it reads a document: for values, the tokenizer, the input, the output."""
    _, work, units = _plan(config)
    if not was_committed(work, Path(config.output), units):
        refuse_existing(Path(config.output), REPORT if config.overwrite else None, OVERWRITE_HINT)


def build_part(config: DataBuildConfig) -> int:
    """Do the i-th of n shares of a build, as `config.part` says, on a disk that all see; returns its number of units.

    `build_store` with the same input and settings puts them together. Raises as it does.
    """
    tokenizer, work, units = _plan(config)
    assert config.part is not None, "called for a part"
    share = units[config.part[0] :: config.part[1]]
    if not share or was_committed(work, Path(config.output), units):
        return 0
    refuse_existing(Path(config.output), REPORT if config.overwrite else None, OVERWRITE_HINT)
    with disk_errors(Path(config.output)), part_directory(work, config.part) as own:
        run_units(Worker.run, share, config, _write_leaks(config, own), tokenizer)
    return len(share)


def _plan(config: DataBuildConfig) -> tuple[Tokenizer, Path, list[Unit]]:
    """What a build is made with, where it works, and what there is to do."""
    validate_data_build(config)
    build_cleaner(config.clean)  # its options are checked before a worker starts
    if config.dedup.near:
        require_minhash()
    output = Path(config.output)
    tokenizer = load_tokenizer(config.tokenizer.path)
    files = _without_builds(find_files(config.input, config.reader.format), output)
    work = output.with_name(f"{output.name}.work-{_digest(config, tokenizer, files)}")
    return tokenizer, work, units_of(config, files, work)


def _without_builds(files: Sequence[Path], output: Path) -> list[Path]:
    """`files` but for those that a build of `output` has written itself, below an input that holds it."""
    own = output.resolve()
    began = f"{own.name}.work-"

    def is_own(path: Path) -> bool:
        folders = Path(os.path.realpath(path)).parents  # not resolve(), which raises for a loop of links
        return own in folders or any(f.parent == own.parent and f.name.startswith(began) for f in folders)

    kept = [path for path in files if not is_own(path)]
    if len(kept) < len(files):
        log.info("%d files below %s are left out of the input: a build wrote them", len(files) - len(kept), output)
    if not kept:
        raise DataError(f"input: every file found lies in the output, {output}")
    return kept


def _build(config: DataBuildConfig, units: Sequence[Unit], tokenizer: Tokenizer, work: Path) -> BuildReport:
    """Fill `work/stores`."""
    leaks = _write_leaks(config, work)
    if config.dedup.lines:
        run_units(Worker.hash_lines, units, config, leaks, tokenizer)
        mark_repeats([unit.folder for unit in units])
    run_units(Worker.run, units, config, leaks, tokenizer)
    counts = _gather_counts(units)
    segments = open_segments([unit.folder for unit in units], DTYPES[dtype_for(tokenizer.vocab_size)])
    threshold = config.dedup.threshold if config.dedup.near else None
    dropped, duplicates = find_duplicates(segments, config.dedup.exact, threshold, _fresh(work / "duplicates"))
    stores = _fresh(work / "stores")
    written = write_stores(stores, segments, dropped, tokenizer, config)
    if not written:
        raise DataError(
            f"no document is left of {_num_files(units)} files; skipped: {dict(counts.skipped) or 'nothing'}; "
            f"dropped: {dict(counts.dropped) or 'nothing'}"
        )
    _warn_of_unknown(counts, written)
    report = make_report(config.output, tokenizer, _num_files(units), counts, duplicates, written, segments)
    write_synced(stores / REPORT, json.dumps(dataclasses.asdict(report), indent=2, ensure_ascii=False) + "\n")
    write_synced(stores / REPORT_PAGE, build_page(report))
    return report


def _write_leaks(config: DataBuildConfig, folder: Path) -> Path | None:
    """The n-grams of evaluation texts, where the build looks for them."""
    if not config.decontaminate.input:
        return None
    looked_for = write_ngrams(folder / "ngrams", config.decontaminate, config.reader)
    if looked_for.too_short:
        log.warning(
            "%d of %d evaluation texts have fewer than decontaminate.ngram=%d words: they cannot be found",
            looked_for.too_short,
            looked_for.texts,
            config.decontaminate.ngram,
        )
    return folder / "ngrams"


def _digest(config: DataBuildConfig, tokenizer: Tokenizer, files: Sequence[Path]) -> str:
    """Of all that segments depend on beside their own files: settings, files that they name, libraries; their layout.

    With `dedup.lines` what is left of one file depends on those before it.
    """
    values = dataclasses.asdict(config)
    for name in _NOT_IN_DIGEST:
        values.pop(name)
    named = [Path(str(value)) for step in config.clean for key, value in step.options.items() if key.endswith("_file")]
    if config.decontaminate.input:
        named += find_files(config.decontaminate.input, "auto")
    if config.dedup.lines:
        named += files
    libraries = {name: _version_of(name) for name in _LIBRARIES}
    parts = [megalite.__version__, DOCUMENT.descr, libraries, tokenizer.digest, values, [*map(identity_of, named)]]
    return xxhash.xxh3_64_hexdigest(json.dumps(parts, sort_keys=True).encode())


def _version_of(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _num_files(units: Sequence[Unit]) -> int:
    return len({part.path for unit in units for part in unit.parts})


def _gather_counts(units: Sequence[Unit]) -> Counts:
    """What became of the input of all units, whose messages are logged."""
    counts = Counts()
    for unit in units:
        done = read_done(unit.folder)
        assert done is not None, f"{unit.parts[0].path} was not finished"
        for head in finished_heads(unit.folder):
            counts.add(head.counts)
        counts.add(done[0])
        for message in done[1]:
            log.warning("%s", message)
    for reason, count in sorted(counts.skipped.items()):
        log.warning("skipped in all: %d x %s", count, reason)
    return counts


def _warn_of_unknown(counts: Counts, written: Mapping[str, WrittenStore]) -> None:
    if unknown := counts.unknown.total():
        log.warning(
            "%d of %d tokens are unknown: text that the tokenizer cannot spell is lost; train one with byte fallback",
            unknown,
            sum(store.writer.num_tokens for store in written.values()),
        )


def _fresh(folder: Path) -> Path:
    """An empty folder, whatever a killed build left there."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    return folder
