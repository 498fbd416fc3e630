import itertools
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from dataclasses import asdict, replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from megalite.config.schema_data import CleanStepConfig, DedupConfig, ReaderConfig
from megalite.config.schema_launch import LaunchConfig
from megalite.data.format import TokenStore
from megalite.data_tools.builder import building, units
from megalite.data_tools.builder import work as room
from megalite.data_tools.builder.building import build_store
from megalite.data_tools.store_tools.inspection import inspect_documents, store_tokenizer, verify_stores
from megalite.errors import ConfigError, DataError, ResourceError
from megalite.guard.lock import RunLock
from megalite.tokenizer import load_tokenizer
from tests.data_tools.corpora import build_config, chinese, english, make_tokenizer, texts, write_jsonl


def decoded(store_path: Path) -> list[bytes]:
    store = TokenStore.open(store_path)
    tokenizer = store_tokenizer(store)
    out = []
    for i in range(store.num_documents):
        ids = store.document(i).tolist()
        assert ids[-1] == tokenizer.end_of_document
        assert tokenizer.end_of_document not in ids[:-1]
        out.append(tokenizer.decode_bytes(ids[:-1]))
        assert len(out[-1]) == store.document_bytes(i)
    return out


def tree(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


@pytest.fixture
def source(tmp_path) -> Path:
    return write_jsonl(tmp_path / "in.jsonl", [{"text": text} for text in texts(200)])


def test_every_document_comes_back(tmp_path, source, tokenizer_path):
    report = build_store(build_config([source], tmp_path / "out", tokenizer_path))
    assert sorted(report.paths) == ["train/in", "validation/in"]
    back = Counter(document for path in report.paths.values() for document in decoded(path))
    assert back == Counter(text.encode() for text in texts(200))
    assert len(verify_stores(tmp_path / "out")) == 2
    for name, store in report.stores.items():
        opened = TokenStore.open(tmp_path / "out" / name)
        assert opened.manifest.tokenizer.digest == load_tokenizer(tokenizer_path).digest == report.tokenizer_digest
        assert (store.documents, store.tokens, store.bytes) == (
            opened.num_documents,
            opened.num_tokens,
            opened.manifest.num_bytes,
        )
        assert store.bytes_per_token == pytest.approx(store.bytes / store.tokens, abs=1e-4)
        assert opened.manifest.source == "in"
        assert store.unknown_tokens == 0
    assert report.documents_read == 210
    assert json.loads((tmp_path / "out/build_report.json").read_text())["stores"]["train/in"]["documents"] > 100
    first = inspect_documents(TokenStore.open(report.paths["train/in"]), 2)
    assert [d.text.encode() for d in first] == decoded(report.paths["train/in"])[:2]


def test_text_that_the_tokenizer_cannot_spell_is_counted(tmp_path, caplog):
    """Without byte fallback a character outside the vocabulary is one unknown token, and lost."""
    plain = make_tokenizer(tmp_path, byte_fallback=False, character_coverage=1.0)
    source = write_jsonl(tmp_path / "in.jsonl", [{"text": "the king ℵ of night ℵ"}, {"text": "the river"}])
    report = build_store(build_config([source], tmp_path / "out", plain, validation_fraction=0.0))
    assert report.stores["train/in"].unknown_tokens == 2
    assert f"2 of {report.stores['train/in'].tokens} tokens are unknown" in caplog.text


def test_an_id_that_is_not_unicode_is_only_an_id(tmp_path, tokenizer_path):
    rows = ['{"id": "\\ud800", "text": "the king"}', '{"id": "b", "text": "of night"}']
    source = write_jsonl(tmp_path / "in.jsonl", rows)
    report = build_store(build_config([source], tmp_path / "out", tokenizer_path, ReaderConfig(id_column="id")))
    assert report.documents_read == 2


def many_files(folder: Path, count: int = 5) -> list[Path]:
    """Files of short and long documents in two languages, some of them twice, some all but twice."""
    rng = random.Random(0)
    folder.mkdir()
    known = [english(rng, 12) for _ in range(20)]
    paths = []
    for number in range(count):
        new = [{"text": chinese(rng, rng.randint(1, 80))} for _ in range(40)]
        old = [{"text": rng.choice(known) + rng.choice(["", " more"])} for _ in range(20)]
        paths.append(write_jsonl(folder / f"{number}.jsonl", rng.sample(new + old, 60)))
    return paths


def stores_of(output: Path) -> dict[str, bytes]:
    """The files of a build but for its reports, which name its output."""
    return {name: data for name, data in tree(output).items() if not name.startswith("build_report")}


BOTH = DedupConfig(exact=True, near=True)


def test_the_same_bytes_for_any_number_of_workers(tmp_path, tokenizer_path, monkeypatch):
    monkeypatch.setattr(room, "_TOGETHER_FILES", 2)
    sources = many_files(tmp_path / "in")
    trees = []
    for workers in (1, 3):
        output = tmp_path / str(workers) / "out"
        build_store(build_config(sources, output, tokenizer_path, workers=workers, shard_tokens=20_000, dedup=BOTH))
        trees.append(stores_of(output))
    assert len(trees[0]) > 10
    assert trees[0] == trees[1]


def test_a_build_that_is_killed_goes_on_from_there(tmp_path, tokenizer_path, monkeypatch):
    """Each forked build dies by SIGKILL at one of its next files: half a segment, half a store, half a rename."""
    monkeypatch.setattr(units, "SEGMENT_BYTES", 10_000)
    config = build_config(many_files(tmp_path / "in"), tmp_path / "out", tokenizer_path, dedup=BOTH)
    build_store(replace(config, output=str(tmp_path / "whole")))
    rng, kills = random.Random(0), 0
    while (code := fork_build(config, deadly=rng.randint(1, 40))) != 0:
        assert code == -signal.SIGKILL
        kills += 1
        assert len(list(tmp_path.glob("out*"))) == 1, "something stands under the final name"
    assert kills > 5
    assert stores_of(tmp_path / "out") == stores_of(tmp_path / "whole")
    assert not list(tmp_path.glob("*.work-*"))


def fork_build(config, deadly: int) -> int:
    """Build in a forked process that dies when it syncs its `deadly`-th file; returns 0 or the negative signal."""
    child = os.fork()
    if child == 0:
        honest, synced = os.fsync, itertools.count(1)

        def fsync(descriptor):
            if next(synced) == deadly:
                os.kill(os.getpid(), signal.SIGKILL)
            honest(descriptor)

        os.fsync = fsync
        build_store(config)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def test_a_file_that_changed_is_read_again(tmp_path, tokenizer_path, monkeypatch):
    monkeypatch.setattr(room, "SEGMENT_BYTES", 1)
    monkeypatch.setattr(room, "_TOGETHER_FILES", 1)
    sources = many_files(tmp_path / "in", 3)
    config = build_config(sources, tmp_path / "out", tokenizer_path)
    good = sources[2].read_text()
    sources[2].write_text(good + "{}\n")
    with pytest.raises(DataError, match="missing text"):
        build_store(config)
    (work,) = tmp_path.glob("out.work-*")
    done = {path: path.stat().st_mtime_ns for path in work.glob("unit_*/done.json")}
    assert len(done) == 2
    sources[2].write_text(good)
    read = []
    honest = units.iter_file_documents
    monkeypatch.setattr(units, "iter_file_documents", lambda path, *rest: read.append(path) or honest(path, *rest))
    build_store(config)
    assert read == [sources[2]]
    build_store(replace(config, output=str(tmp_path / "whole")))
    assert stores_of(tmp_path / "out") == stores_of(tmp_path / "whole")


def test_a_build_that_is_killed_after_its_end_was_finished(tmp_path, source, tokenizer_path, monkeypatch):
    config = build_config([source], tmp_path / "out", tokenizer_path)

    def killed(path):
        shutil.rmtree(next(path.glob("unit_*")))
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(room, "remove_work", killed)
        with pytest.raises(KeyboardInterrupt):
            build_store(config)
    assert len(list(tmp_path.glob("out*"))) == 2
    before = tree(tmp_path / "out")
    report = build_store(config)
    assert json.loads(before["build_report.json"]) == json.loads(json.dumps(asdict(report)))
    assert tree(tmp_path / "out") == before
    assert [path.name for path in tmp_path.glob("out*")] == ["out"]
    with pytest.raises(DataError, match="exists already"):
        build_store(config)


@pytest.mark.parametrize("vanishes", [False, True])
def test_a_file_that_changes_while_others_are_read(tmp_path, tokenizer_path, monkeypatch, vanishes):
    """Files and spans are read one after the other: none may come from another version than the planned one."""
    first, second = many_files(tmp_path / "in", 2)
    honest = units.iter_file_documents

    def change(path, *rest):
        yield from honest(path, *rest)
        if path == first:
            second.unlink() if vanishes else second.write_text(second.read_text() + "\n")

    monkeypatch.setattr(units, "iter_file_documents", change)
    with pytest.raises(DataError, match=r"1\.jsonl changed since the build began"):
        build_store(build_config([first, second], tmp_path / "out", tokenizer_path))
    assert not list(tmp_path.glob("out*"))


def test_what_is_in_a_list_that_a_step_names_is_part_of_the_build(tmp_path, source, tokenizer_path):
    (tmp_path / "list").write_text("spam.example\n")
    step = CleanStepConfig(step="urls", options={"domains_file": str(tmp_path / "list")})
    config = build_config([source], tmp_path / "out", tokenizer_path, clean=(step,))
    tokenizer = load_tokenizer(tokenizer_path)
    before = building._digest(config, tokenizer, [source])
    assert building._digest(config, tokenizer, [source]) == before
    (tmp_path / "list").write_text("spam.example\nother.example\n")
    assert building._digest(config, tokenizer, [source]) != before


def test_shares_of_a_build_make_the_same_bytes(tmp_path, tokenizer_path, monkeypatch):
    """As the jobs of an array do, in any order, one twice and one never: the last command does what is left."""
    monkeypatch.setattr(room, "_TOGETHER_FILES", 2)
    sources = many_files(tmp_path / "in")
    build_store(build_config(sources, tmp_path / "whole", tokenizer_path, dedup=BOTH))
    config = build_config(sources, tmp_path / "out", tokenizer_path, dedup=BOTH)
    done = [building.build_part(replace(config, part=(i, 3))) for i in (2, 0, 0)]
    assert all(done)
    assert not (tmp_path / "out").exists()
    build_store(config)
    assert stores_of(tmp_path / "out") == stores_of(tmp_path / "whole")
    assert [path.name for path in tmp_path.glob("out*")] == ["out"]
    with pytest.raises(DataError, match="exists"):
        building.build_part(replace(config, part=(1, 3)))


def test_shares_work_side_by_side_and_nobody_puts_them_together_meanwhile(tmp_path, source, tokenizer_path):
    config = build_config([source], tmp_path / "out", tokenizer_path)
    _, work, _ = building._plan(config)
    with room.part_directory(work, (0, 2)):
        assert building.build_part(replace(config, part=(1, 2))) == 0
        with room.part_directory(work, (1, 2)), pytest.raises(ResourceError, match="in use by another build"):
            build_store(config)
        with pytest.raises(ResourceError, match="in use"), room.part_directory(work, (0, 2)):
            pass
    build_store(config)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"part": (2, 2)}, r"part: found \[2, 2\], expected \[i,n\]"),
        ({"parts": 4}, "parts: found 4, which are jobs of launch=slurm"),
        ({"part": (0, 2), "dedup": DedupConfig(lines=True)}, "dedup.lines: found true"),
        ({"launch": LaunchConfig(name="torchrun")}, "launch: found torchrun, allowed for a build: local, slurm"),
        ({"launch": LaunchConfig(name="slurm", nodes=2)}, "launch.nodes: found 2, which a build has no use for"),
    ],
)
def test_shares_that_cannot_be(tmp_path, source, tokenizer_path, changes, message):
    with pytest.raises(ConfigError, match=message):
        build_store(build_config([source], tmp_path / "out", tokenizer_path, **changes))


def test_small_files_are_read_together(tmp_path, tokenizer_path, monkeypatch):
    sources = many_files(tmp_path / "in", 7)
    whole = build_config(sources, tmp_path / "one", tokenizer_path)
    report = build_store(whole)
    assert report.files == 7
    monkeypatch.setattr(room, "_TOGETHER_FILES", 3)
    assert [len(unit.parts) for unit in room.units_of(whole, sources, tmp_path)] == [3, 3, 1]
    monkeypatch.setattr(room, "_TOGETHER_BYTES", sources[0].stat().st_size + 1)
    assert {len(unit.parts) for unit in room.units_of(whole, sources, tmp_path)} == {1}
    build_store(replace(whole, output=str(tmp_path / "many")))
    assert stores_of(tmp_path / "one") == stores_of(tmp_path / "many")


def test_two_builds_of_one_output(tmp_path, source, tokenizer_path):
    config = build_config([source], tmp_path / "out", tokenizer_path)
    work = tmp_path / f"out.work-{building._digest(config, load_tokenizer(tokenizer_path), [source])}"
    lock = RunLock(work)
    with pytest.raises(ResourceError, match="in use by another build"):
        build_store(config)
    lock.close()
    build_store(config)


def test_split_by_hash(tmp_path, tokenizer_path):
    rows = [{"text": f"document {i}", "id": i} for i in range(1000)]
    ids = ReaderConfig(id_column="id")

    def validation(name, rows, **changes):
        source = write_jsonl(tmp_path / "in.jsonl", rows)
        report = build_store(build_config([source], tmp_path / name, tokenizer_path, ids, **changes))
        path = report.paths.get("validation/in")
        return set(decoded(path)) if path else set()

    base = validation("a", rows)
    assert 150 < len(base) < 250
    assert validation("b", rows[::-1]) == base, "the order of the input does not matter"
    assert validation("c", rows, seed=1) != base
    assert base < validation("d", rows, validation_fraction=0.4)
    assert validation("e", rows, validation_fraction=0.0) == set()
    assert not (tmp_path / "e/validation").exists()


def test_split_and_source_columns(tmp_path, tokenizer_path):
    rows = [{"text": f"text {i}", "s": "ab"[i % 2], "p": "validation" if i > 7 else "train"} for i in range(10)]
    source = write_jsonl(tmp_path / "in.jsonl", rows)
    reader = ReaderConfig(source_column="s", split_column="p")
    report = build_store(build_config([source], tmp_path / "out", tokenizer_path, reader))
    assert decoded(report.paths["train/b"]) == [b"text 1", b"text 3", b"text 5", b"text 7"]
    assert decoded(report.paths["validation/a"]) == [b"text 8"]
    assert sorted(report.paths) == ["train/a", "train/b", "validation/a", "validation/b"]


def test_too_many_sources(tmp_path, tokenizer_path):
    source = write_jsonl(tmp_path / "in.jsonl", [{"text": "x", "s": f"s{i}"} for i in range(70)])
    with pytest.raises(DataError, match="more than 64 sources"):
        build_store(build_config([source], tmp_path / "out", tokenizer_path, ReaderConfig(source_column="s")))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["in.jsonl"]


def damaged_input(folder: Path, kind: str) -> Path:
    """Good documents, and one thing that is wrong."""
    folder.mkdir()
    write_jsonl(folder / "a.jsonl", [{"text": text} for text in texts(20)])
    if kind == "truncated parquet":
        pq.write_table(pa.table({"text": texts(50)}), folder / "b.parquet")
        (folder / "b.parquet").write_bytes((folder / "b.parquet").read_bytes()[:-100])
    elif kind == "invalid UTF-8":
        (folder / "b.txt").write_bytes(b"caf\xe9")
    elif kind == "empty file":
        (folder / "b.jsonl").touch()
    elif kind == "empty document":
        write_jsonl(folder / "b.jsonl", [{"text": ""}])
    elif kind == "dangling link":
        (folder / "b.jsonl").symlink_to("gone")
    elif kind == "loop of links":
        (folder / "b.jsonl").symlink_to("b.jsonl")
    else:
        write_jsonl(folder / "b.jsonl", [{"body": "x"}])
    return folder


@pytest.mark.parametrize(
    ("kind", "reason", "workers"),
    [
        ("truncated parquet", "damaged or unreadable file", 1),
        ("truncated parquet", "damaged or unreadable file", 2),
        ("invalid UTF-8", "invalid UTF-8", 1),
        ("empty file", "empty file", 1),
        ("empty document", "empty document", 1),
        ("dangling link", "link to a file that does not exist", 2),
        ("loop of links", "link to a file that does not exist", 1),
        ("missing column", None, 1),
    ],
)
def test_bad_input_stops_or_is_counted_and_leaves_nothing_half_written(tmp_path, tokenizer_path, kind, reason, workers):
    source = damaged_input(tmp_path / "in", kind)
    config = build_config([source], tmp_path / "out", tokenizer_path, workers=workers)
    with pytest.raises(DataError, match=reason or "no column 'text'; found: body"):
        build_store(config)
    assert [p.name for p in tmp_path.iterdir()] == ["in"]
    skip = replace(config, reader=ReaderConfig(on_bad="skip"))
    if reason is None:
        with pytest.raises(DataError, match="no column 'text'; found: body"):
            build_store(skip)
        assert [p.name for p in tmp_path.iterdir()] == ["in"]
    else:
        report = build_store(skip)
        assert report.skipped == {reason: 1}
        assert report.documents_read == 30
        assert json.loads((tmp_path / "out/build_report.json").read_text())["skipped"] == {reason: 1}


def test_nothing_left(tmp_path, tokenizer_path):
    source = write_jsonl(tmp_path / "in.jsonl", [{"text": ""}, {"text": " "}])
    with pytest.raises(DataError, match=r"no document is left of 1 files; skipped: .'empty document': 2"):
        build_store(build_config([source], tmp_path / "out", tokenizer_path, ReaderConfig(on_bad="skip")))
    assert not (tmp_path / "out").exists()


def test_existing_output(tmp_path, source, tokenizer_path):
    config = build_config([source], tmp_path / "out", tokenizer_path)
    build_store(config)
    before = tree(tmp_path / "out")
    with pytest.raises(DataError, match=r"exists already.*overwrite=true"):
        build_store(config)
    bad = write_jsonl(tmp_path / "bad.jsonl", [{"text": "x"}, {"text": ""}])
    with pytest.raises(DataError, match="empty document"):
        build_store(replace(config, input=(str(bad),), overwrite=True))
    assert tree(tmp_path / "out") == before, "a failed build keeps what it was to replace"
    build_store(replace(config, validation_fraction=0.0, overwrite=True))
    assert not (tmp_path / "out/validation").exists()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["bad.jsonl", "in.jsonl", "out"]


def test_overwrite_spares_what_is_not_ours(tmp_path, source, tokenizer_path):
    (tmp_path / "home").mkdir()
    (tmp_path / "home/thesis.txt").write_text("years of work")
    with pytest.raises(DataError, match="not written by this command"):
        build_store(build_config([source], tmp_path / "home", tokenizer_path, overwrite=True))
    assert (tmp_path / "home/thesis.txt").read_text() == "years of work"


def test_full_disk(tmp_path, source, tokenizer_path, monkeypatch):
    def full(self, values):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("megalite.data.writer._DigestedFile.write", full)
    with pytest.raises(ResourceError, match="No space left"):
        build_store(build_config([source], tmp_path / "out", tokenizer_path))
    assert [p.name for p in tmp_path.iterdir()] == ["in.jsonl"]


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({"validation_fraction": 1.0}, "validation_fraction"),
        ({"validation_fraction": -0.1}, "validation_fraction"),
        ({"workers": 0}, "workers"),
        ({"shard_tokens": 0}, "shard_tokens"),
    ],
)
def test_values_out_of_range(tmp_path, source, tokenizer_path, changes, key):
    with pytest.raises(ConfigError, match=f"{key}: found"):
        build_store(build_config([source], tmp_path / "out", tokenizer_path, **changes))


def test_unfit_tokenizer(tmp_path, source):
    with pytest.raises(DataError, match="tokenizer"):
        build_store(build_config([source], tmp_path / "out", tmp_path / "gone"))


def children(pid: int) -> list[int]:
    """Processes whose parent is `pid`."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rsplit(")", 1)[1].split()
        except OSError:
            continue
        if int(fields[1]) == pid:
            found.append(int(stat.parent.name))
    return found


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] not in "ZX"
    except OSError:
        return False


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="looks for processes in /proc")
def test_killed_builder_leaves_temporary_names_and_no_process(tmp_path, tokenizer_path):
    """A build whose input never ends, with documents written and workers at work, is killed."""
    (tmp_path / "run.py").write_text(ENDLESS_BUILD)
    command = [sys.executable, tmp_path / "run.py", tmp_path / "in", tmp_path / "out", tokenizer_path]
    (tmp_path / "in").mkdir()
    for name in "ab":
        (tmp_path / "in" / f"{name}.txt").write_text(name)
    builder = subprocess.Popen(command)
    try:
        wait_for(lambda: len(children(builder.pid)) >= 2 and list(tmp_path.glob("out.work-*/unit_*/*.json")))
        workers = children(builder.pid)
    finally:
        builder.send_signal(signal.SIGKILL)
        builder.wait()
    wait_for(lambda: not any(map(alive, workers)))
    left = sorted(p.name for p in tmp_path.iterdir() if p.name.startswith("out"))
    assert len(left) == 1
    assert left[0].startswith("out.work-")


ENDLESS_BUILD = """
import itertools, sys
from megalite.config.schema_data import DataBuildConfig, ReaderConfig, StoreTokenizerConfig
from megalite.data_tools.builder import building, units
from megalite.data_tools.builder import work as room
from megalite.data_tools.readers import Document

def endless(path, config, source, report, span, markup):
    for report.documents in itertools.count(1):
        yield Document("night " * 1000, 6000, str(report.documents), "in", "", "train")

# In the workers too, which import this file.
units.iter_file_documents, units.SEGMENT_BYTES, room._TOGETHER_FILES = endless, 100_000, 1

if __name__ == "__main__":
    tokenizer = StoreTokenizerConfig(path=sys.argv[3])
    config = dict(input=(sys.argv[1],), output=sys.argv[2], workers=2, tokenizer=tokenizer, reader=ReaderConfig())
    building.build_store(DataBuildConfig(**config))
"""


def wait_for(condition, seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.05)


SMALL_SEGMENTS = """
import sys
from megalite.config.schema_data import DataBuildConfig, DedupConfig, ReaderConfig, StoreTokenizerConfig
from megalite.data_tools.builder import building, units
from megalite.data_tools.builder import work as room

units.SEGMENT_BYTES, room._TOGETHER_FILES = 50_000, 3  # in the workers too, which import this file

if __name__ == "__main__":
    source, output, tokenizer, workers = sys.argv[1:]
    building.build_store(DataBuildConfig(
        input=(source,), output=output, workers=int(workers), tokenizer=StoreTokenizerConfig(path=tokenizer),
        reader=ReaderConfig(), dedup=DedupConfig(exact=True, near=True, lines=True), validation_fraction=0.2,
    ))
"""


@pytest.mark.slow
def test_twenty_kills_at_random_moments_with_one_two_and_four_workers(tmp_path, tokenizer_path):
    """Each attempt takes up what the one before it left; a finished build begins anew until there were twenty."""
    many_files(tmp_path / "in", 40)
    (tmp_path / "run.py").write_text(SMALL_SEGMENTS)
    command = [sys.executable, tmp_path / "run.py", tmp_path / "in"]
    subprocess.run([*command, tmp_path / "whole", tokenizer_path, "1"], check=True)
    rng, kills = random.Random(8), 0
    for attempt in itertools.count():
        workers = (1, 2, 4)[attempt % 3]
        builder = subprocess.Popen([*command, tmp_path / "out", tokenizer_path, str(workers)])
        try:
            # From the time that imports take on, a little later each time, so that it ends some day.
            builder.wait(timeout=rng.uniform(1.0, 3.0) + 0.1 * max(0, kills - 20))
            assert builder.returncode == 0
        except subprocess.TimeoutExpired:
            builder.send_signal(signal.SIGKILL)
            builder.wait()
            kills += 1
            if not (tmp_path / "out").exists() or list(tmp_path.glob("out.work-*")):
                continue  # else it came just behind the end
        assert stores_of(tmp_path / "out") == stores_of(tmp_path / "whole")
        if kills >= 20:
            break
        shutil.rmtree(tmp_path / "out")


def test_an_output_below_its_own_input(tmp_path, tokenizer_path):
    """What a killed build, or the one before, wrote there is no input."""
    many_files(tmp_path / "in", 2)
    config = build_config([tmp_path / "in"], tmp_path / "in/out", tokenizer_path)
    before = stores_of(build_store(config) and tmp_path / "in/out")
    (tmp_path / "in/out.work-0123456789abcdef/unit_1").mkdir(parents=True)
    (tmp_path / "in/out.work-0123456789abcdef/unit_1/00000.json").write_text("{}")
    build_store(replace(config, overwrite=True))
    assert stores_of(tmp_path / "in/out") == before
    with pytest.raises(DataError, match="every file found lies in the output"):
        build_store(replace(config, input=(str(tmp_path / "in/out"),), overwrite=True))


def test_a_build_killed_in_its_last_clean_up_is_not_taken_for_that_of_another_input(
    tmp_path, tokenizer_path, monkeypatch
):
    many_files(tmp_path / "in", 2)
    config = build_config([tmp_path / "in"], tmp_path / "out", tokenizer_path, overwrite=True)

    def killed(work):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(room, "remove_work", killed)
        with pytest.raises(KeyboardInterrupt):
            build_store(config)
    assert build_store(config).files == 2, "it was finished"
    with monkeypatch.context() as patch:
        patch.setattr(room, "remove_work", killed)
        with pytest.raises(KeyboardInterrupt):
            build_store(config)
    write_jsonl(tmp_path / "in/9.jsonl", [{"text": "another file, which must be read"}])
    assert build_store(config).files == 3
    assert not list(tmp_path.glob("out.work-*"))
