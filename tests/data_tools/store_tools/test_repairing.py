import itertools
import json
import shutil

import numpy as np
import pytest

from megalite.config.schema_data import DataRepairConfig, GivenTokenizerConfig
from megalite.data.files import digest_file
from megalite.data.format import TokenStore
from megalite.data_tools.store_tools import documents, salvage
from megalite.data_tools.store_tools.repairing import repair_store
from megalite.errors import DataError
from tests.data_tools.corpora import make_tokenizer
from tests.data_tools.store_tools.stores import END, contents, flat, random_store, text_store


def config(store, output, tokenizer=None, **changes) -> DataRepairConfig:
    path = None if tokenizer is None else str(tokenizer)
    return DataRepairConfig(
        store=str(store.path), output=str(output), tokenizer=GivenTokenizerConfig(path=path), **changes
    )


def flip(file, at=-1):
    data = bytearray(file.read_bytes())
    data[at] ^= 1
    file.write_bytes(data)


def cut(file):
    file.write_bytes(file.read_bytes()[:-3])


def drop(file):
    file.unlink()


def lengthen(file):
    file.write_bytes(file.read_bytes() + b"more")


DAMAGES = [flip, cut, drop, lengthen]


def by_shard(store) -> list[list]:
    """The documents of each shard."""
    found, starts = contents(store), store.document_starts.tolist()
    return [found[a:b] for a, b in itertools.pairwise(starts)]


@pytest.fixture
def store(tmp_path, monkeypatch):
    """Some shards, looked at in blocks smaller than they are."""
    for room in (documents, salvage):
        monkeypatch.setattr(room, "BLOCK_TOKENS", 64)
    store = random_store(tmp_path / "a", count=60, shard_tokens=300)
    assert store.num_shards > 3
    return store


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("lost", [(0,), (1, 2), (3,)])
def test_damaged_shards_are_lost_and_the_others_stay(tmp_path, store, damage, lost):
    before = by_shard(store)
    for number in lost:
        damage(store.path / store.manifest.shards[number].tokens.file)
    damaged = sorted((p.name, p.read_bytes()) for p in store.path.iterdir() if p.is_file())
    report = repair_store(config(store, tmp_path / "out"))
    repaired = TokenStore.open(tmp_path / "out")
    assert contents(repaired) == flat(docs for number, docs in enumerate(before) if number not in lost)
    names = [store.manifest.shards[number].tokens.file for number in lost]
    assert (report.lost_shards, list(report.problems)) == (names, names)
    assert report.lost_documents == sum(len(before[number]) for number in lost)
    assert report.lost_tokens == sum(len(ids) for number in lost for ids, _ in before[number])
    assert (report.documents, report.tokens) == (repaired.num_documents, repaired.num_tokens)
    assert (report.unverified_documents, report.recounted_documents, report.lost_tokenizer) == (0, 0, False)
    assert repaired.manifest.tokenizer == store.manifest.tokenizer
    assert repaired.manifest.source == "s"
    assert sorted((p.name, p.read_bytes()) for p in store.path.iterdir() if p.is_file()) == damaged, "never in place"


@pytest.mark.parametrize("damage", DAMAGES)
def test_offsets_are_rebuilt(tmp_path, store, damage):
    before = contents(store)
    files = [shard.document_offsets.file for shard in store.manifest.shards[:2]]
    for file in files:
        damage(store.path / file)
    report = repair_store(config(store, tmp_path / "out"))
    assert contents(tmp_path / "out") == before
    assert (report.lost_documents, report.lost_tokens, list(report.problems)) == (0, 0, files)


@pytest.mark.parametrize("values", [[0, 7, 7], [3, 7], [0, 9999]])
def test_offsets_of_a_faulty_writer_are_rebuilt(tmp_path, store, values):
    """Digests that fit files which make no sense."""
    before = contents(store)
    offsets = np.fromfile(store.path / store.manifest.shards[0].document_offsets.file, "<u8")
    offsets[: len(values)] = values
    resign(store, 0, "document_offsets", offsets)
    report = repair_store(config(store, tmp_path / "out"))
    assert contents(tmp_path / "out") == before
    assert list(report.problems) == [store.manifest.shards[0].document_offsets.file]


def resign(store, number, name, values):
    """Change a file of a shard and its digest."""
    file = getattr(store.manifest.shards[number], name).file
    values.tofile(store.path / file)
    manifest = json.loads((store.path / "manifest.json").read_text())
    manifest["shards"][number][name]["digest"] = digest_file(store.path / file)
    (store.path / "manifest.json").write_text(json.dumps(manifest))


def test_documents_with_foreign_ids_are_lost(tmp_path, store):
    before = contents(store)
    tokens = np.array(store.shard_tokens(0))
    first = next(i for i, (ids, _) in enumerate(before) if len(ids) > 1)
    tokens[int(store.shard_offsets(0)[first])] = 300
    resign(store, 0, "tokens", tokens)
    report = repair_store(config(store, tmp_path / "out"))
    assert contents(tmp_path / "out") == before[:first] + before[first + 1 :]
    assert (report.lost_documents, report.lost_tokens) == (1, len(before[first][0]))


@pytest.mark.parametrize("damage", DAMAGES)
def test_complete_documents_of_damaged_shards(tmp_path, store, damage):
    before = by_shard(store)
    damage(store.path / store.manifest.shards[1].tokens.file)  # its last byte: the end of its last document
    report = repair_store(config(store, tmp_path / "out", unverified="keep"))
    kept = {flip: before[1][:-1], cut: before[1][:-1], drop: [], lengthen: before[1]}[damage]
    if damage is cut and len(before[1][-1][0]) == 1:
        kept = kept[:-1]
    assert contents(tmp_path / "out") == flat([before[0], kept, *before[2:]])
    assert report.unverified_documents == len(kept)
    assert report.lost_shards == [store.manifest.shards[1].tokens.file]


def test_an_end_that_appeared_inside_a_document_makes_it_incomplete(tmp_path, store):
    before = contents(store)
    file = store.path / store.manifest.shards[0].tokens.file
    tokens = np.fromfile(file, "<u2")
    first = next(i for i, (ids, _) in enumerate(before) if len(ids) > 3)
    tokens[int(store.shard_offsets(0)[first]) + 1] = END
    tokens.tofile(file)
    repair_store(config(store, tmp_path / "out", unverified="keep"))
    assert contents(tmp_path / "out") == before[:first] + before[first + 1 :]


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("offsets_too", [False, True])
def test_byte_counts_are_rebuilt_by_decoding(tmp_path, tokenizer_path, damage, offsets_too):
    store, corpus = text_store(tmp_path / "a", tokenizer_path, shard_tokens=5000)
    before = contents(store)
    damage(store.path / store.manifest.shards[0].document_bytes.file)
    if offsets_too:
        damage(store.path / store.manifest.shards[0].document_offsets.file)
    report = repair_store(config(store, tmp_path / "out"))
    assert contents(tmp_path / "out") == before
    assert report.recounted_documents == store.manifest.shards[0].num_documents < len(corpus)


def test_byte_counts_that_do_not_add_up(tmp_path, tokenizer_path):
    store, corpus = text_store(tmp_path / "a", tokenizer_path, shard_tokens=5000)
    before = contents(store)
    resign(store, 0, "document_bytes", np.array(store.shard_bytes(0)) + np.uint64(1))
    report = repair_store(config(store, tmp_path / "out"))
    assert contents(tmp_path / "out") == before
    assert report.recounted_documents == len(corpus)


def test_a_damaged_tokenizer(tmp_path, tokenizer_path):
    store, _ = text_store(tmp_path / "a", tokenizer_path)
    before = contents(store)
    flip(store.path / "tokenizer/tokenizer.model")
    report = repair_store(config(store, tmp_path / "without"))
    assert report.lost_tokenizer
    assert list(report.problems) == ["tokenizer/tokenizer.model"]
    assert TokenStore.open(tmp_path / "without").manifest.tokenizer is None
    report = repair_store(config(store, tmp_path / "with", tokenizer_path))
    assert not report.lost_tokenizer
    assert TokenStore.open(tmp_path / "with").manifest.tokenizer == store.manifest.tokenizer
    assert contents(tmp_path / "with") == contents(tmp_path / "without") == before
    # Where it is needed, to count bytes.
    drop(store.path / store.manifest.shards[0].document_bytes.file)
    with pytest.raises(DataError, match=r"its tokenizer is damaged too: name a whole copy of it as tokenizer\.path"):
        repair_store(config(store, tmp_path / "no"))
    repair_store(config(store, tmp_path / "counted", tokenizer_path))
    assert contents(tmp_path / "counted") == before
    other = make_tokenizer(tmp_path, vocab_size=420)
    with pytest.raises(DataError, match="was written by another, with digest"):
        repair_store(config(store, tmp_path / "no", other))
    assert not (tmp_path / "no").exists()


def test_byte_counts_without_any_tokenizer(tmp_path):
    store = random_store(tmp_path / "a", tokenizer=None)
    drop(store.path / store.manifest.shards[0].document_bytes.file)
    with pytest.raises(DataError, match="holds no tokenizer to rebuild them"):
        repair_store(config(store, tmp_path / "out"))


def test_a_whole_store_is_left_alone(tmp_path, store):
    assert repair_store(config(store, tmp_path / "out")) is None
    assert not (tmp_path / "out").exists()


def test_nothing_to_save(tmp_path, store):
    for shard in store.manifest.shards:
        flip(store.path / shard.tokens.file)
    with pytest.raises(DataError, match=r"no document can be saved.*tokens_00000\.bin has digest"):
        repair_store(config(store, tmp_path / "out"))
    shutil.rmtree(store.path / "tokenizer")
    (store.path / "manifest.json").write_text("{}")
    with pytest.raises(DataError, match="format_version None"):
        repair_store(config(store, tmp_path / "out"))
    with pytest.raises(DataError, match="a exists already: choose another output"):
        repair_store(config(store, store.path))
    assert [p.name for p in tmp_path.iterdir()] == ["a"]


def test_ends_that_do_not_tell_documents_apart(tmp_path, store):
    """Offsets gone, and a writer that put an end inside a document: that shard cannot be cut."""
    before = by_shard(store)
    tokens = np.array(store.shard_tokens(0))
    tokens[int(np.flatnonzero(tokens != END)[0])] = END
    resign(store, 0, "tokens", tokens)
    drop(store.path / store.manifest.shards[0].document_offsets.file)
    report = repair_store(config(store, tmp_path / "out"))
    assert "end-of-document tokens for" in report.problems[store.manifest.shards[0].tokens.file]
    assert contents(tmp_path / "out") == flat(before[1:])


def test_random_damage_loses_only_what_it_touched(tmp_path, store):
    before = by_shard(store)
    rng = np.random.default_rng(0)
    for attempt in range(12):
        copy = tmp_path / f"copy{attempt}"
        shutil.copytree(store.path, copy)
        hit = set()
        for _ in range(rng.integers(1, 4)):
            number = int(rng.integers(store.num_shards))
            name = str(rng.choice(["tokens", "document_offsets"]))
            file = copy / getattr(store.manifest.shards[number], name).file
            if file.exists() and file.stat().st_size > 3:
                DAMAGES[rng.integers(3)](file)
                hit |= {number} if name == "tokens" else set()
        report = repair_store(
            DataRepairConfig(store=str(copy), output=str(tmp_path / f"out{attempt}"), tokenizer=GivenTokenizerConfig())
        )
        if report is None:  # two flips of one bit
            continue
        kept = [docs for number, docs in enumerate(before) if number not in hit]
        assert contents(tmp_path / f"out{attempt}") == flat(kept)
