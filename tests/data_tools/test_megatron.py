"""Megatron's datasets to stores and back; Megatron's own reader is the judge where it is installed."""

import importlib.util
import json
import struct
import warnings

import numpy as np
import pytest

from megalite.config.schema_data import DataConvertConfig, GivenTokenizerConfig
from megalite.data.format import TokenStore
from megalite.data.writer import StoreWriter
from megalite.data_tools.megatron import index as index_room
from megalite.data_tools.megatron.from_store import export_store
from megalite.data_tools.megatron.index import read_index
from megalite.data_tools.megatron.to_store import import_dataset
from megalite.data_tools.store_tools import documents as documents_room
from megalite.errors import ConfigError, DataError
from megalite.tokenizer import load_tokenizer
from tests.data_tools.corpora import texts
from tests.data_tools.megatron_files import CODES, read_current, write_current, write_legacy
from tests.data_tools.store_tools.stores import contents, random_store, text_store
from tests.ranks import run_ranks

END = 0
WRITERS = {"MMIDIDX": write_current, "TNTIDX": write_legacy}


def config(dataset, output, tokenizer=None, **changes) -> DataConvertConfig:
    path = None if tokenizer is None else str(tokenizer)
    if tokenizer is None:
        changes = {"vocab_size": 120, "end_of_document": END} | changes
    return DataConvertConfig(
        input=str(dataset), output=str(output), tokenizer=GivenTokenizerConfig(path=path), **changes
    )


def some_documents(seed=0, count=30, end="all", top=120) -> list[list[list[int]]]:
    """Documents of 0 to 3 sequences of 0 to 9 ids. `end`: which get the end-of-document id: all, none, some."""
    rng = np.random.default_rng(seed)
    found = []
    for number in range(count):
        document = [rng.integers(1, top, rng.integers(0, 10)).tolist() for _ in range(rng.integers(0, 4))]
        if document and (end == "all" or (end == "some" and number % 2)):
            document[-1].append(END)
        found.append(document)
    return found


def stored(documents) -> list[tuple[int, ...]]:
    """What a store should hold of them: every document's ids and one end."""
    flat = [[i for ids in document for i in ids] for document in documents]
    return [tuple(ids if ids and ids[-1] == END else [*ids, END]) for ids in flat]


@pytest.mark.parametrize("block", [8, 1 << 22])
@pytest.mark.parametrize("end", ["all", "none", "some"])
@pytest.mark.parametrize("kind", WRITERS)
def test_documents_made_of_sequences(tmp_path, monkeypatch, kind, end, block):
    monkeypatch.setattr(documents_room, "BLOCK_TOKENS", block)
    monkeypatch.setattr("megalite.data_tools.megatron.to_store.BLOCK_TOKENS", block)
    monkeypatch.setattr(index_room, "_BLOCK", 8)
    documents = some_documents(end=end)
    WRITERS[kind](tmp_path / "in", documents)
    report = import_dataset(config(tmp_path / "in", tmp_path / "out"))
    found = contents(tmp_path / "out")
    assert [ids for ids, _ in found] == stored(documents)
    flat = [[i for ids in document for i in ids] for document in documents]
    ended = sum(bool(ids) and ids[-1] == END for ids in flat)
    assert (report.format, report.documents, report.megatron_documents) == (kind, 30, 30)
    assert (report.ended, report.given_ends, report.tokens) == (ended, 30 - ended, sum(map(len, stored(documents))))
    assert (report.bytes, {num_bytes for _, num_bytes in found}) == (None, {0})
    store = TokenStore.open(tmp_path / "out")
    assert (store.manifest.source, store.manifest.tokenizer, store.manifest.vocab_size) == ("in", None, 120)


@pytest.mark.parametrize("kind", WRITERS)
@pytest.mark.parametrize("dtype", CODES)
def test_types_of_ids(tmp_path, kind, dtype):
    documents = [[[1, 2, 100]], [[3]]]
    WRITERS[kind](tmp_path / "in", documents, dtype)
    for name in ("in", "in.idx", "in.bin"):
        out = tmp_path / f"out_{name}"
        import_dataset(config(tmp_path / name, out, vocab_size=70_000, end_of_document=65_000, source="x"))
        assert [ids for ids, _ in contents(out)] == [(1, 2, 100, 65_000), (3, 65_000)]
        assert TokenStore.open(out).manifest.source == "x"


def test_a_name_with_a_dot(tmp_path):
    write_current(tmp_path / "c4.v1", [[[1]]])
    import_dataset(config(tmp_path / "c4.v1", tmp_path / "out"))
    assert TokenStore.open(tmp_path / "out").manifest.source == "c4.v1"


@pytest.mark.parametrize(("tokens", "message"), [([1, 120], "from 1 to 120"), ([-1, 5], "from -1 to 5")])
def test_ids_outside_the_vocabulary(tmp_path, tokens, message):
    write_current(tmp_path / "in", [[tokens]])
    with pytest.raises(DataError, match=rf"in\.bin: token ids {message} do not fit a vocabulary of 120"):
        import_dataset(config(tmp_path / "in", tmp_path / "out"))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("block", [1, 1 << 22])
def test_ends_inside_documents(tmp_path, monkeypatch, block):
    monkeypatch.setattr("megalite.data_tools.megatron.to_store.BLOCK_TOKENS", block)
    write_current(tmp_path / "in", [[[5]], [[1, END, 2], [3]], [[END, END]]])
    with pytest.raises(DataError, match="document 1 holds the end-of-document id 0 before its end"):
        import_dataset(config(tmp_path / "in", tmp_path / "out"))
    report = import_dataset(config(tmp_path / "in", tmp_path / "out", inner_ends="split"))
    expected = [(5, END), (1, END), (2, 3, END), (END,), (END,)]
    assert [ids for ids, _ in contents(tmp_path / "out")] == expected
    assert (report.megatron_documents, report.documents, report.ended, report.given_ends) == (3, 5, 1, 2)


def test_another_end_is_pointed_at(tmp_path):
    write_current(tmp_path / "in", [[[1, 7]], [[2, 3, 7]]])
    assert import_dataset(config(tmp_path / "in", tmp_path / "a")).common_last == 7
    assert import_dataset(config(tmp_path / "in", tmp_path / "b", end_of_document=7)).common_last is None
    write_current(tmp_path / "in", [[[1, 7]], [[2, 3, 8]]])
    assert import_dataset(config(tmp_path / "in", tmp_path / "c")).common_last is None


def test_with_the_tokenizer(tmp_path, tokenizer_path):
    tokenizer, corpus = load_tokenizer(tokenizer_path), texts()
    write_current(tmp_path / "in", [[tokenizer.encode(text)] for text in corpus], "uint16")
    report = import_dataset(config(tmp_path / "in", tmp_path / "out", tokenizer_path))
    expected, _ = text_store(tmp_path / "expected", tokenizer_path)
    assert contents(tmp_path / "out") == contents(expected)
    assert report.bytes == sum(len(text.encode()) for text in corpus)
    assert TokenStore.open(tmp_path / "out").manifest.tokenizer == expected.manifest.tokenizer
    with pytest.raises(ConfigError, match="vocab_size: found 7, but the tokenizer tokenizer says 400"):
        import_dataset(config(tmp_path / "in", tmp_path / "no", tokenizer_path, vocab_size=7))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"vocab_size": None}, "give tokenizer.path, or vocab_size and end_of_document"),
        ({"end_of_document": None}, r"found 120 and None"),
        ({"end_of_document": 120}, "end_of_document: found 120, must be below vocab_size=120"),
        ({"vocab_size": 0}, "vocab_size: found 0, allowed: 1 or more"),
        ({"end_of_document": -1}, "end_of_document: found -1"),
        ({"vocab_size": 2**33}, "at most 2"),
    ],
)
def test_unfit_settings(tmp_path, changes, message):
    write_current(tmp_path / "in", [[[1]]])
    with pytest.raises(ConfigError, match=message):
        import_dataset(config(tmp_path / "in", tmp_path / "out", **changes))


def edit(file, at, layout, *values):
    data = bytearray(file.read_bytes())
    struct.pack_into(layout, data, at, *values)
    file.write_bytes(data)


# Three sequences of 3, 1 and 2 ids as int32, documents of 2 and 1 of them. Where the fields of the .idx are:
# MMIDIDX: version 9, code 17, counts 18 and 26, lengths 34, pointers 46, documents 70.
# TNTIDX: version 8, code 16, width 24, counts 32, 40, 48, first sizes 56, pointers 88, sizes 120, documents 144.
DAMAGED = {
    "no idx": ("MMIDIDX", lambda p: (p / "in.idx").unlink(), r"in\.idx is missing"),
    "no bin": ("MMIDIDX", lambda p: (p / "in.bin").unlink(), r"in\.bin is missing"),
    "empty idx": ("MMIDIDX", lambda p: (p / "in.idx").write_bytes(b""), r"in\.idx starts with b'', expected"),
    "header cut": ("MMIDIDX", lambda p: (p / "in.idx").write_bytes(b"MMIDIDX\0\0\1"), "ends inside its header"),
    "idx cut": (
        "MMIDIDX",
        lambda p: (p / "in.idx").write_bytes((p / "in.idx").read_bytes()[:-1]),
        "has 93 bytes, its header's counts make 94",
    ),
    "idx longer": (
        "MMIDIDX",
        lambda p: (p / "in.idx").write_bytes((p / "in.idx").read_bytes() + b"x"),
        "has 95 bytes, its header's counts make 94",
    ),
    "modes": ("MMIDIDX", lambda p: write_current(p / "in", THREE, modes=True), "multimodal datasets are not supported"),
    "magic": ("MMIDIDX", lambda p: edit(p / "in.idx", 0, "<B", 0), "no index of Megatron"),
    "version": ("MMIDIDX", lambda p: edit(p / "in.idx", 9, "<Q", 2), "is version 2, this program reads"),
    "big endian": ("MMIDIDX", lambda p: edit(p / "in.idx", 9, ">Q", 1), "written big endian"),
    "type code": ("MMIDIDX", lambda p: edit(p / "in.idx", 17, "<B", 9), "type code 9, known: 1, 2, 3, 4, 5, 8"),
    "floats": ("MMIDIDX", lambda p: edit(p / "in.idx", 17, "<B", 7), "floating point"),
    "narrower code": (
        "MMIDIDX",
        lambda p: edit(p / "in.idx", 17, "<B", 8),
        "sequence 1 starts at byte 12, after a gap",
    ),
    "wider code": ("MMIDIDX", lambda p: edit(p / "in.idx", 17, "<B", 5), "sequence 1 starts at byte 12, inside"),
    "huge count": ("MMIDIDX", lambda p: edit(p / "in.idx", 18, "<Q", 2**62), "its header's counts make"),
    "document count": ("MMIDIDX", lambda p: edit(p / "in.idx", 26, "<Q", 4), "its header's counts make 102"),
    "odd bin": ("MMIDIDX", lambda p: (p / "in.bin").write_bytes(bytes(23)), "has 23 bytes, no multiple of an id's 4"),
    "short bin": ("MMIDIDX", lambda p: (p / "in.bin").write_bytes(bytes(20)), "sequence 2 ends past the end"),
    "long bin": ("MMIDIDX", lambda p: (p / "in.bin").write_bytes(bytes(28)), "holds 7 ids, .* names 6"),
    "negative length": ("MMIDIDX", lambda p: edit(p / "in.idx", 38, "<i", -1), "sequence 1 has -1 tokens"),
    "long length": ("MMIDIDX", lambda p: edit(p / "in.idx", 38, "<i", 99), "sequence 1 has 99 tokens"),
    "negative pointer": ("MMIDIDX", lambda p: edit(p / "in.idx", 54, "<q", -4), "byte -4, which is negative"),
    "overlap": ("MMIDIDX", lambda p: edit(p / "in.idx", 54, "<q", 8), "byte 8, inside the one before it, .* at 12"),
    "gap": ("MMIDIDX", lambda p: edit(p / "in.idx", 54, "<q", 16), "byte 16, after a gap"),
    "pointer past the end": ("MMIDIDX", lambda p: edit(p / "in.idx", 54, "<q", 2**40), "past the end of .* at 24"),
    "first document": ("MMIDIDX", lambda p: edit(p / "in.idx", 70, "<q", 1), "span the sequences 1 to 3"),
    "last document": ("MMIDIDX", lambda p: edit(p / "in.idx", 86, "<q", 2), "sequences 0 to 2, the header counts 3"),
    "document order": ("MMIDIDX", lambda p: edit(p / "in.idx", 78, "<q", 4), "document 2 starts at sequence 3, before"),
    "no document": ("MMIDIDX", lambda p: write_current(p / "in", []), "names no document"),
    "legacy version": ("TNTIDX", lambda p: edit(p / "in.idx", 8, "<Q", 3), "is version 3"),
    "legacy width": ("TNTIDX", lambda p: edit(p / "in.idx", 24, "<Q", 8), "ids of 8 bytes, but type code 4 has 4"),
    "legacy shapes": ("TNTIDX", lambda p: edit(p / "in.idx", 40, "<Q", 6), "6 sizes for 3 sequences"),
    "legacy counts": ("TNTIDX", lambda p: edit(p / "in.idx", 48, "<Q", 9), "its header's counts make"),
    "legacy sizes": ("TNTIDX", lambda p: edit(p / "in.idx", 64, "<q", 2), "a sequence has not one size"),
    "legacy pointer": ("TNTIDX", lambda p: edit(p / "in.idx", 96, "<q", 2), "starts at id 2, inside"),
    "legacy end": ("TNTIDX", lambda p: edit(p / "in.idx", 112, "<q", 5), r"ids end at 5, .*in\.bin holds 6"),
    "legacy length": ("TNTIDX", lambda p: edit(p / "in.idx", 136, "<q", 2**62), "sequence 2 has 4611686018427387904"),
    "legacy cut": ("TNTIDX", lambda p: (p / "in.idx").write_bytes(b"TNTIDX\0\0"), "ends inside its header, after 8"),
}
THREE = [[[1, 2, 3], [4]], [[5, 6]]]


@pytest.mark.parametrize("name", DAMAGED)
def test_damage_is_named(tmp_path, name):
    kind, damage, message = DAMAGED[name]
    WRITERS[kind](tmp_path / "in", THREE)
    assert read_index(tmp_path / "in").num_documents == 2
    damage(tmp_path)
    with pytest.raises(DataError, match=message) as error:
        import_dataset(config(tmp_path / "in", tmp_path / "out"))
    assert str(tmp_path) in str(error.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("vocab_size", "dtype"), [(300, "uint16"), (65_536, "uint16"), (65_537, "int32")])
@pytest.mark.parametrize("keep_ends", [True, False])
def test_a_store_as_megatron_files(tmp_path, monkeypatch, vocab_size, dtype, keep_ends):
    monkeypatch.setattr(documents_room, "BLOCK_TOKENS", 50)
    store = random_store(tmp_path / "store", vocab_size=vocab_size, shard_tokens=200)
    report = export_store(config(store.path, tmp_path / "out/books", keep_ends=keep_ends))
    assert report.prefix == tmp_path / "out/books/books"
    found, documents = read_current(report.prefix)
    before = contents(store)
    assert found == report.dtype == dtype
    assert [tuple(ids) for (ids,) in documents] == [ids if keep_ends else ids[:-1] for ids, _ in before]
    assert report.tokens == sum(len(ids) for (ids,) in documents)
    again = config(report.prefix, tmp_path / "back", vocab_size=vocab_size)
    import_dataset(again)
    assert [ids for ids, _ in contents(tmp_path / "back")] == [ids for ids, _ in before]


def test_stores_that_megatron_cannot_hold(tmp_path, monkeypatch):
    with StoreWriter(tmp_path / "wide", vocab_size=2**32, end_of_document=0) as writer:
        writer.add_document([2**31], 1)
    with pytest.raises(DataError, match="token id 2147483648 does not fit Megatron's int32"):
        export_store(config(tmp_path / "wide", tmp_path / "out"))
    monkeypatch.setattr("megalite.data_tools.megatron.from_store._INT32_MAX", 3)
    store = random_store(tmp_path / "long")
    with pytest.raises(DataError, match=r"a document has \d+ tokens, Megatron counts to 3"):
        export_store(config(store.path, tmp_path / "out"))
    with pytest.raises(DataError, match="holds no document"):
        export_store(config(random_store(tmp_path / "empty", count=0).path, tmp_path / "out"))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["empty", "long", "wide"]


@pytest.mark.skipif(
    importlib.util.find_spec("megatron") is None,
    reason="Megatron's own reader needs `pip install --no-deps megatron-core`",
)
def test_megatron_core_reads_what_is_written_here_and_back(tmp_path):
    """In a process of its own: Megatron changes torch when it is imported."""
    store = random_store(tmp_path / "store", shard_tokens=200)
    wide = random_store(tmp_path / "wide", vocab_size=100_000, seed=1)
    exported = {
        str(export_store(config(one.path, tmp_path / f"{one.path.name}_mm")).prefix): [ids for ids, _ in contents(one)]
        for one in (store, wide)
    }
    written = some_documents(seed=2, end="some")
    (seen,) = run_ranks(1, _megatron, list(exported), str(tmp_path / "theirs"), written)
    assert seen == {prefix: [list(ids) for ids in documents] for prefix, documents in exported.items()}
    import_dataset(config(tmp_path / "theirs", tmp_path / "back"))
    assert [ids for ids, _ in contents(tmp_path / "back")] == stored(written)


def _megatron(prefixes, output, written):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from megatron.core.datasets.indexed_dataset import IndexedDataset, IndexedDatasetBuilder
    seen = {}
    for prefix in prefixes:
        dataset = IndexedDataset(prefix)
        bounds = dataset.document_indices.tolist()
        assert bounds == list(range(len(dataset) + 1))
        seen[prefix] = [dataset[i].tolist() for i in range(len(dataset))]
    builder = IndexedDatasetBuilder(f"{output}.bin", dtype=np.int32)
    for document in written:
        builder.add_document([i for ids in document for i in ids], [len(ids) for ids in document])
    builder.finalize(f"{output}.idx")
    return json.loads(json.dumps(seen))
