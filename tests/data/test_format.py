import gc
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from megalite.data.format import TokenStore
from megalite.data.writer import StoreWriter
from megalite.errors import DataError

END = 0


def write_store(path: Path, documents, vocab_size=100, shard_tokens=10**9) -> TokenStore:
    with StoreWriter(path, vocab_size=vocab_size, end_of_document=END, source="s", shard_tokens=shard_tokens) as writer:
        for ids in documents:
            writer.add_document(ids, num_bytes=3 * len(ids))
    return TokenStore.open(path)


def documents(num: int, vocab_size=100, seed=0) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    return [rng.integers(1, vocab_size, rng.integers(1, 30)) for _ in range(num)]


@pytest.mark.parametrize("was_enabled", [True, False])
def test_opening_leaves_the_garbage_collector_as_it_was(tmp_path, was_enabled):
    """It is paused meanwhile; also where the manifest is damaged."""
    path = write_store(tmp_path / "store", documents(3)).path
    try:
        if not was_enabled:
            gc.disable()
        TokenStore.open(path)
        assert gc.isenabled() is was_enabled
        (path / "manifest.json").write_text('{"format_version": 2, "shards": 3}')
        with pytest.raises(DataError, match="damaged"):
            TokenStore.open(path)
        assert gc.isenabled() is was_enabled
    finally:
        gc.enable()


@pytest.mark.parametrize("shard_tokens", [1, 17, 50, 10**9])
@pytest.mark.parametrize(("vocab_size", "dtype"), [(100, "uint16"), (65536, "uint16"), (65537, "uint32")])
def test_round_trip_over_shards(tmp_path, shard_tokens, vocab_size, dtype):
    docs = documents(40, vocab_size)
    docs[0][0] = vocab_size - 1
    store = write_store(tmp_path / "store", docs, vocab_size, shard_tokens)
    stream = np.concatenate([np.append(d, END) for d in docs])
    assert store.manifest.dtype == dtype
    assert store.num_documents == 40
    assert store.num_tokens == len(stream)
    assert store.manifest.num_bytes == sum(3 * len(d) for d in docs)
    for start, stop in [(0, len(stream)), (0, 0), (5, 6), (16, 18), (3, 200), (len(stream) - 1, len(stream))]:
        np.testing.assert_array_equal(store.tokens(start, stop), stream[start:stop])
    for i, doc in enumerate(docs):
        np.testing.assert_array_equal(store.document(i), np.append(doc, END))
        assert store.document_bytes(i) == 3 * len(doc)
    offsets = np.cumsum([0] + [len(d) + 1 for d in docs])
    for start, stop in [(0, 40), (0, 1), (39, 40), (7, 23)]:
        np.testing.assert_array_equal(store.offsets_of_documents(start, stop), offsets[start : stop + 1])
        np.testing.assert_array_equal(store.bytes_of_documents(start, stop), [3 * len(d) for d in docs[start:stop]])
    positions = np.random.default_rng(1).permutation(len(stream))
    np.testing.assert_array_equal(store.document_at(positions), np.searchsorted(offsets, positions, side="right") - 1)
    # No document crosses a shard: every shard ends with an end-of-document token.
    for shard in store.manifest.shards:
        raw = np.fromfile(tmp_path / "store" / shard.tokens.file, np.dtype(dtype))
        assert raw[-1] == END
        assert len(raw) <= shard_tokens or np.sum(raw == END) == 1
    store.verify()


def test_files_are_little_endian_on_disk(tmp_path):
    write_store(tmp_path / "store", [[1, 256]], vocab_size=300)
    assert (tmp_path / "store/tokens_00000.bin").read_bytes() == bytes([1, 0, 0, 1, 0, 0])
    assert (tmp_path / "store/document_offsets_00000.bin").read_bytes() == bytes(8) + bytes([3]) + bytes(7)


def test_empty_store_and_empty_document(tmp_path):
    store = write_store(tmp_path / "empty", [])
    assert (store.num_tokens, store.num_documents, len(store.tokens(0, 0))) == (0, 0, 0)
    store.verify()
    store = write_store(tmp_path / "one", [[]])
    assert store.document(0).tolist() == [END]
    store.verify()


@pytest.mark.parametrize("ids", [[100], [-1], [5, 70000]])
def test_ids_outside_the_vocabulary_are_refused(tmp_path, ids):
    with pytest.raises(DataError, match="do not fit a vocabulary of 100"):
        write_store(tmp_path / "store", [[1], ids])
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(DataError, match="do not fit"):
        StoreWriter(tmp_path / "store", vocab_size=10, end_of_document=10)


@pytest.mark.parametrize(("start", "stop"), [(-1, 2), (3, 2), (0, 10**6)])
def test_out_of_range(tmp_path, start, stop):
    store = write_store(tmp_path / "store", documents(3))
    with pytest.raises(IndexError):
        store.tokens(start, stop)
    with pytest.raises(IndexError):
        store.document(3)
    with pytest.raises(IndexError):
        store.document(-1)


def test_existing_output_is_refused(tmp_path):
    write_store(tmp_path / "store", [[1]])
    with pytest.raises(DataError, match="exists already"):
        write_store(tmp_path / "store", [[2]])
    assert TokenStore.open(tmp_path / "store").document(0).tolist() == [1, END]


def test_failed_writer_leaves_nothing(tmp_path, monkeypatch):
    def fail():
        with StoreWriter(tmp_path / "a", vocab_size=9, end_of_document=0) as writer:
            writer.add_document([1], 1)
            raise RuntimeError("no more")

    with pytest.raises(RuntimeError, match="no more"):
        fail()
    assert list(tmp_path.iterdir()) == []

    def disk_full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("megalite.data.writer.write_synced", disk_full)
    with pytest.raises(OSError, match="No space"):
        write_store(tmp_path / "b", [[1]])
    assert list(tmp_path.iterdir()) == []


def test_killed_writer_leaves_temporary_names_only(tmp_path):
    code = (
        "import sys, time\nfrom megalite.data.writer import StoreWriter\n"
        "with StoreWriter(sys.argv[1], vocab_size=9, end_of_document=0) as writer:\n"
        "    while True:\n        writer.add_document([1, 2], 2)\n        time.sleep(0.001)\n"
    )
    child = subprocess.Popen([sys.executable, "-c", code, str(tmp_path / "store")])
    deadline = time.monotonic() + 30
    while not list(tmp_path.glob("store.tmp-*/tokens_00000.bin")) and time.monotonic() < deadline:
        time.sleep(0.01)
    child.send_signal(signal.SIGKILL)
    child.wait()
    assert [p.name.startswith("store.tmp-") for p in tmp_path.iterdir()] == [True]


def test_rename_waits_until_the_files_are_whole(tmp_path, monkeypatch):
    """At the moment of the rename the manifest and every file it names are complete."""
    seen = []
    rename = Path.rename

    def checked(self, target):
        TokenStore.open(self).verify()
        seen.append(target)
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", checked)
    write_store(tmp_path / "store", documents(5))
    assert seen == [tmp_path / "store"]


def damage(path: Path, kind: str) -> None:
    data = path.read_bytes()
    if kind == "flip":
        path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    elif kind == "truncate":
        path.write_bytes(data[:-2])
    elif kind == "empty":
        path.write_bytes(b"")
    else:
        path.unlink()


@pytest.mark.parametrize("kind", ["flip", "truncate", "empty", "delete"])
@pytest.mark.parametrize(
    "file", ["tokens_00000.bin", "tokens_00001.bin", "document_offsets_00001.bin", "document_bytes_00000.bin"]
)
def test_damage_is_named(tmp_path, file, kind):
    write_store(tmp_path / "store", documents(20), shard_tokens=100)
    damage(tmp_path / "store" / file, kind)
    if kind == "flip":  # the size is right, so only reading again finds it
        store = TokenStore.open(tmp_path / "store")
        with pytest.raises(DataError, match=f"{file} is damaged: expected digest .* found") as error:
            store.verify()
        assert next(r.digest for r in store.manifest.files if r.file == file) in str(error.value)
    else:
        if file.startswith("tokens"):
            with pytest.raises(DataError, match=file):
                TokenStore.open(tmp_path / "store")
            return
        store = TokenStore.open(tmp_path / "store")
        assert len(store.tokens(0, store.num_tokens)) == store.num_tokens, "tokens are whole"
        for use in (
            store.check_sizes,
            store.verify,
            lambda: [store.document(i) for i in range(20)] and store.bytes_of_documents(0, 20),
        ):
            with pytest.raises(DataError, match=file):
                use()


def edit_manifest(store: Path, **changes) -> None:
    values = json.loads((store / "manifest.json").read_text())
    (store / "manifest.json").write_text(json.dumps(values | changes))


RECORD = {"file": "x.bin", "bytes": 16, "digest": ""}


def shard(**changes):
    return {"shards": [{"tokens": RECORD | changes, "document_offsets": RECORD, "document_bytes": RECORD}]}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format_version": 1}, "format_version 1, this program reads 2"),
        ({"format_version": None}, "format_version None"),
        ({"dtype": "int32"}, "dtype int32, expected uint16"),
        ({"dtype": "uint32"}, "dtype uint32, expected uint16"),
        ({"vocab_size": 70000}, "dtype uint16, expected uint32"),
        ({"num_tokens": 7}, "tokens take .* expected 14"),
        ({"num_documents": 7}, "document byte counts take"),
        ({"end_of_document": 100}, "end_of_document 100"),
        ({"num_tokens": "many"}, "num_tokens"),
        ({"shards": None}, "expected a list"),
        ({"shards": [1]}, "expected document_bytes, document_offsets, tokens, found 1"),
        (shard(file="../x"), "not inside the store"),
        (shard(file="/etc/passwd"), "not inside the store"),
        (shard(file=""), "not inside the store"),
        (shard(file="a\0b"), "not inside the store"),
        (shard(bytes=-2), "-2 bytes"),
        (shard(bytes=True), "True bytes"),
        (shard(bytes=3), "broken number"),
        (shard(digest=7), "digest 7"),
        (shard(surprise=7), "surprise"),
        ({"shards": [{**shard()["shards"][0], "document_bytes": RECORD | {"bytes": 16}}]}, "same number of documents"),
        ({"surprise": 1}, "unknown key surprise"),
    ],
)
def test_unfit_manifest(tmp_path, changes, message):
    write_store(tmp_path / "store", documents(5))
    edit_manifest(tmp_path / "store", **changes)
    with pytest.raises(DataError, match=message):
        TokenStore.open(tmp_path / "store")


def test_not_a_store(tmp_path):
    with pytest.raises(DataError, match="not a token store"):
        TokenStore.open(tmp_path)
    (tmp_path / "manifest.json").write_text("{")
    with pytest.raises(DataError, match=r"manifest\.json is damaged"):
        TokenStore.open(tmp_path)
    (tmp_path / "manifest.json").write_text("[]")
    with pytest.raises(DataError, match="format_version None"):
        TokenStore.open(tmp_path)


def rewrite(store: Path, file: str, values: np.ndarray) -> None:
    """Change a file and its digest, as a faulty writer would."""
    from megalite.data.files import digest_file

    values.tofile(store / file)
    text = json.loads((store / "manifest.json").read_text())
    for shard in text["shards"]:
        for record in shard.values():
            if record["file"] == file:
                record["digest"] = digest_file(store / file)
    (store / "manifest.json").write_text(json.dumps(text))


@pytest.mark.parametrize(
    ("file", "values", "message"),
    [
        ("tokens_00000.bin", np.array([1, 2, 0, 100, 0], "<u2"), "token id 100 outside"),
        ("document_offsets_00000.bin", np.array([0, 5, 5], "<u8"), "do not increase"),
        ("document_offsets_00000.bin", np.array([0, 3, 6], "<u8"), "expected 0..5"),
        ("document_bytes_00000.bin", np.array([6, 4], "<u8"), "documents hold 10 bytes"),
    ],
)
def test_verify_looks_at_content(tmp_path, file, values, message):
    write_store(tmp_path / "store", [[1, 2], [3]])
    rewrite(tmp_path / "store", file, values)
    with pytest.raises(DataError, match=message):
        TokenStore.open(tmp_path / "store").verify()


def test_more_shards_than_file_descriptors(tmp_path):
    docs = documents(280)
    write_store(tmp_path / "store", docs, shard_tokens=1)
    code = (
        "import resource, sys\nresource.setrlimit(resource.RLIMIT_NOFILE, (300, 300))\n"
        "from megalite.data.format import TokenStore\nstore = TokenStore.open(sys.argv[1])\n"
        "print(int(store.tokens(0, store.num_tokens).sum()))"
    )
    out = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "store")], capture_output=True, text=True, check=True
    )
    assert int(out.stdout) == sum(int(d.sum()) for d in docs)


def test_opening_reads_no_tokens(tmp_path):
    """A sparse file of 64 GiB opens at once."""
    write_store(tmp_path / "store", [[1]])
    tokens = 1 << 35
    os.truncate(tmp_path / "store/tokens_00000.bin", 2 * tokens)
    shards = json.loads((tmp_path / "store/manifest.json").read_text())["shards"]
    shards[0]["tokens"]["bytes"] = 2 * tokens
    edit_manifest(tmp_path / "store", num_tokens=tokens, shards=shards)
    start = time.perf_counter()
    store = TokenStore.open(tmp_path / "store")
    assert store.tokens(tokens - 2, tokens).tolist() == [0, 0]
    assert time.perf_counter() - start < 1


@pytest.mark.parametrize("bytes_left", [0, 4096, 3 * 4096 + 2])
def test_a_shard_that_is_cut_under_its_map_is_an_error_not_a_signal(tmp_path, bytes_left):
    """In a process of its own: reading a page beyond the end of the file would kill it with SIGBUS."""
    write_store(tmp_path / "store", [np.ones(20_000)], shard_tokens=10)
    code = (
        "import os, sys\nimport numpy as np\nfrom megalite.data.format import TokenStore\n"
        "from megalite.errors import DataError\n"
        "store = TokenStore.open(sys.argv[1])\nrows = np.empty((1, 100), np.int64)\nstore.read_rows([19000], rows)\n"
        "os.truncate(sys.argv[1] + '/tokens_00000.bin', int(sys.argv[2]))\n"
        "reads = (lambda: store.read_rows([19000], rows), lambda: store.tokens(0, 20000), lambda: store.document(0))\n"
        "for read in reads:\n"
        "    try:\n        read()\n    except DataError as error:\n        print(error)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "store"), str(bytes_left)],
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.count(f"tokens_00000.bin has {bytes_left} bytes, 40002 are expected") == 3


def test_rows_across_shards_in_a_wider_type(tmp_path):
    docs = documents(60)
    store = write_store(tmp_path / "store", docs, shard_tokens=50)
    stream = np.concatenate([np.append(d, END) for d in docs])
    store.max_mapped_files = 2
    starts = np.random.default_rng(3).integers(0, len(stream) - 35, 200)
    for dtype in (np.uint16, np.int64):
        rows = np.empty((200, 35), dtype)
        store.read_rows(starts, rows)
        np.testing.assert_array_equal(rows, stream[starts[:, None] + np.arange(35)])
    assert len(store._maps) == 2
    for start in (-1, len(stream) - 34):
        with pytest.raises(IndexError, match="do not lie within"):
            store.read_rows([0, start], np.empty((2, 35)))
