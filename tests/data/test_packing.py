"""Documents laid out in rows: best-fit decreasing against the plain algorithm, the files, the rows that come out."""

import json

import numpy as np
import pytest

from megalite.data.dataset import BlendedDataset
from megalite.data.format import TokenStore
from megalite.data.packing import PackedRows, best_fit, cut_documents, packing_path, write_packing
from megalite.data.writer import StoreWriter
from megalite.errors import ConfigError, DataError

END, S = 0, 16


def write_store(path, lengths, shard_tokens=200) -> TokenStore:
    """Documents whose tokens count up through the store, so that each says where it stands; ends are 0."""
    with StoreWriter(path, vocab_size=30_000, end_of_document=END, shard_tokens=shard_tokens) as writer:
        for length in lengths:
            first = writer.num_tokens + 1
            writer.add_document(np.arange(first, first + length - 1), num_bytes=length)
    return TokenStore.open(path)


@pytest.fixture
def store(tmp_path) -> TokenStore:
    lengths = np.random.default_rng(0).integers(1, 30, 60).tolist()
    return write_store(tmp_path / "store", [*lengths, S, S + 1, 3 * S, 1, 100])


def plain_best_fit(lengths, capacity):
    """Room left in each row, one piece and one row at a time."""
    rooms: list[int] = []
    for length in sorted(lengths, reverse=True):
        fitting = [room for room in rooms if room >= length]
        if fitting:
            rooms.remove(min(fitting))
            rooms.append(min(fitting) - length)
        else:
            rooms.append(capacity - length)
    return sorted(rooms)


@pytest.mark.parametrize("seed", range(60))
def test_best_fit_leaves_the_room_that_the_plain_algorithm_leaves(seed):
    rng = np.random.default_rng(seed)
    capacity = int(rng.integers(1, 40))
    lengths = rng.integers(1, capacity + 1, rng.integers(1, 120))
    order, rows = best_fit(lengths, capacity)
    assert sorted(order.tolist()) == list(range(len(lengths)))
    assert (rows[0], rows[-1]) == (0, len(lengths))
    used = np.add.reduceat(lengths[order], rows[:-1])
    assert sorted((capacity - used).tolist()) == plain_best_fit(lengths.tolist(), capacity)


def test_only_documents_longer_than_a_row_are_cut():
    starts, lengths = cut_documents(np.array([0, 3, 11, 12, 16]), 4)
    assert starts.tolist() == [0, 3, 7, 11, 12]
    assert lengths.tolist() == [3, 4, 4, 1, 4]


@pytest.mark.parametrize("packing", ["best_fit", "documents"])
def test_a_packed_epoch_predicts_every_token_once_from_its_own_document(store, packing):
    rows = write_packing(store, packing, S)
    dataset = BlendedDataset([(store, 1.0)], S, seed=3, packing=packing)
    view = dataset.views[0]
    samples = dataset.samples(np.arange(view.num_units))
    assert samples.shape == (rows.num_rows, 3, S)
    assert samples.dtype == np.uint16
    tokens, labels, documents = samples.transpose(1, 0, 2).astype(np.int64)
    stream = store.tokens(0, store.num_tokens).astype(np.int64)
    padding = documents == 0
    assert np.all(labels[padding] == END)
    assert np.all(np.diff(padding.astype(int), axis=1) >= 0), "padding is at the end of a row"
    assert sorted(labels[~padding].tolist()) == sorted(stream.tolist())
    assert rows.manifest.fill == pytest.approx(1 - padding.mean())
    for row in range(len(samples)):
        for number in range(1, documents[row].max() + 1):
            own = documents[row] == number
            inputs, targets = tokens[row, own], labels[row, own]
            assert inputs[1:].tolist() == targets[:-1].tolist()
            # Never the token of another document: the end that stands before a document, or the one before the cut.
            nonzero = targets[0] or (targets[-1] if len(targets) > 1 else 0)
            assert inputs[0] == (stream[targets[0] - 2] if targets[0] > 1 else END) or not nonzero
            assert END not in targets[:-1], "a piece is of one document"
    if packing == "documents":
        assert documents.max() == 1
    else:
        assert rows.num_rows < PackedRows.open(store, packing, S).manifest.num_pieces
        assert rows.manifest.fill > 0.97


@pytest.mark.parametrize("packing", ["best_fit", "documents", "stream"])
def test_units_tell_their_tokens_and_back(store, packing):
    if packing != "stream":
        write_packing(store, packing, S)
    view = BlendedDataset([(store, 1.0)], S, 0, packing=packing).views[0]
    ranges = [view.ranges(unit) for unit in range(view.num_units)]
    for document in range(store.num_documents):
        start, stop = store.offsets_of_documents(document, document + 1).tolist()
        holding = [u for u, parts in enumerate(ranges) if any(a < stop and b > start for a, b in parts)]
        assert view.units_of(start, stop) == holding


def test_the_store_is_left_as_it_is_and_a_stale_packing_is_refused(tmp_path):
    store = write_store(tmp_path / "store", [5, 9])
    before = {path.name: path.read_bytes() for path in store.path.iterdir()}
    with pytest.raises(DataError, match=r"store is not packed yet; `megalite data pack store=.*store packing=best_fit"):
        PackedRows.open(store, "best_fit", S)
    write_packing(store, "best_fit", S)
    assert {path.name: path.read_bytes() for path in store.path.iterdir()} == before
    assert PackedRows.open(store, "best_fit", S).num_rows == 1
    with pytest.raises(DataError, match="sequence_length=17` does it"):
        PackedRows.open(store, "best_fit", 17)
    with pytest.raises(DataError, match="exists already"):
        write_packing(store, "best_fit", S)
    store.path.rename(tmp_path / "old")
    store = write_store(tmp_path / "store", [5, 10])
    with pytest.raises(DataError, match=r"made of another content of .*; `.*` overwrite=true makes it anew"):
        PackedRows.open(store, "best_fit", S)
    write_packing(store, "best_fit", S, overwrite=True)
    assert PackedRows.open(store, "best_fit", S).manifest.num_tokens == 15


@pytest.mark.parametrize(
    ("file", "change", "message"),
    [
        ("packing.json", lambda data: b"{", "is damaged"),
        ("packing.json", lambda data: b"[]", "another format version"),
        ("packing.json", lambda data: data.replace(b'"num_rows": 1', b'"num_rows": 2'), "do not match its counts"),
        ("starts.bin", lambda data: data[:-1], "15 bytes, 16 are expected"),
    ],
)
def test_a_damaged_packing(tmp_path, file, change, message):
    store = write_store(tmp_path / "store", [5, 9])
    folder = write_packing(store, "best_fit", S).path
    (folder / file).write_bytes(change((folder / file).read_bytes()))
    with pytest.raises(DataError, match=message):
        PackedRows.open(store, "best_fit", S)


def test_rows_that_do_not_fit(tmp_path):
    store = write_store(tmp_path / "store", [5, 9])
    folder = write_packing(store, "best_fit", S).path
    for file, values in (("lengths.bin", np.array([9, 8], "<u4")), ("starts.bin", np.array([7, 0], "<u8"))):
        kept = (folder / file).read_bytes()
        values.tofile(folder / file)
        with pytest.raises(DataError, match="row 0 does not fit"):
            BlendedDataset([(store, 1.0)], S, 0, packing="best_fit").samples([0])
        (folder / file).write_bytes(kept)


def test_nothing_to_pack(tmp_path):
    empty = write_store(tmp_path / "empty", [])
    with pytest.raises(DataError, match="no documents"):
        write_packing(empty, "best_fit", S)
    for packing, length in (("stream", S), ("best_fit", 0)):
        with pytest.raises(ConfigError, match="nothing to pack"):
            write_packing(empty, packing, length)
    assert not packing_path(empty.path, "best_fit", S).exists()


def test_the_same_packing_every_time(tmp_path):
    lengths = np.random.default_rng(5).integers(1, 40, 300).tolist()
    made = [write_packing(write_store(tmp_path / name, lengths), "best_fit", S) for name in ("a", "b")]
    texts = [json.loads((rows.path / "packing.json").read_text())["files"] for rows in made]
    assert texts[0] == texts[1]
