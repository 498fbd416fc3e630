import pytest

from megalite.config.schema_data import DataMergeConfig
from megalite.data.format import TokenStore
from megalite.data_tools.store_tools import documents
from megalite.data_tools.store_tools.merging import merge_stores
from megalite.errors import ConfigError, DataError, ResourceError
from tests.data_tools.store_tools.stores import contents, random_store


def config(*stores, output, **changes) -> DataMergeConfig:
    return DataMergeConfig(input=tuple(str(getattr(s, "path", s)) for s in stores), output=str(output), **changes)


@pytest.mark.parametrize("block", [1, 30, 1 << 22])
def test_documents_of_all_stores_in_order(tmp_path, monkeypatch, block):
    monkeypatch.setattr(documents, "BLOCK_TOKENS", block)
    stores = [
        random_store(tmp_path / "a", shard_tokens=100),
        random_store(tmp_path / "b", seed=1),
        random_store(tmp_path / "empty", count=0, seed=2),
    ]
    counts = merge_stores(config(*stores, output=tmp_path / "deep/er/out"))
    merged = TokenStore.open(tmp_path / "deep/er/out")
    assert contents(merged) == contents(stores[0]) + contents(stores[1])
    assert (counts.documents, counts.tokens) == (80, merged.num_tokens)
    assert counts.bytes == merged.manifest.num_bytes
    assert merged.manifest.tokenizer == stores[0].manifest.tokenizer, "names, digests and files"
    assert merged.manifest.source == "s"


def test_source_of_the_merged_store(tmp_path):
    a, b = random_store(tmp_path / "a", source="x"), random_store(tmp_path / "b", source="y")
    merge_stores(config(a, b, output=tmp_path / "both"))
    assert TokenStore.open(tmp_path / "both").manifest.source == "both"
    merge_stores(config(a, b, output=tmp_path / "named", source="z"))
    assert TokenStore.open(tmp_path / "named").manifest.source == "z"


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"tokenizer": "b"}, "tokenizer b0* against a0*; their ids mean different text"),
        ({"tokenizer": None}, "tokenizer None against a0*"),
        ({"vocab_size": 301}, "vocabulary 301 against 300"),
    ],
)
def test_stores_of_another_tokenizer_are_refused(tmp_path, other, message):
    a, b = random_store(tmp_path / "a"), random_store(tmp_path / "b", **other)
    with pytest.raises(DataError, match=message):
        merge_stores(config(a, b, output=tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_stores_without_a_tokenizer(tmp_path):
    a, b = (random_store(tmp_path / name, tokenizer=None) for name in "ab")
    merge_stores(config(a, b, output=tmp_path / "out"))
    assert TokenStore.open(tmp_path / "out").manifest.tokenizer is None


def test_damage_is_not_copied(tmp_path):
    a, b = random_store(tmp_path / "a"), random_store(tmp_path / "b")
    file = tmp_path / "b" / b.manifest.shards[0].tokens.file
    data = file.read_bytes()
    file.write_bytes(bytes([data[0] ^ 1]) + data[1:])
    with pytest.raises(DataError, match=r"is damaged: .* or mend it with `megalite data repair`"):
        merge_stores(config(a, b, output=tmp_path / "out"))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "b"]


def test_refusals(tmp_path, monkeypatch):
    a, b = random_store(tmp_path / "a"), random_store(tmp_path / "b")
    with pytest.raises(ConfigError, match="name two token stores at least"):
        merge_stores(config(a, output=tmp_path / "out"))
    with pytest.raises(DataError, match=r"one store twice: .*a and .*a"):
        merge_stores(config(a, tmp_path / "b/../a", output=tmp_path / "out"))
    with pytest.raises(DataError, match=r"b exists already: choose another output$"):
        merge_stores(config(a, b, output=b.path))

    def disk_full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("megalite.data.writer.write_synced", disk_full)
    with pytest.raises(ResourceError, match="No space left"):
        merge_stores(config(a, b, output=tmp_path / "out"))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "b"]
