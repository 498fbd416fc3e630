import numpy as np
import pytest

from megalite.config.schema_data import DataSplitConfig
from megalite.data.format import TokenStore
from megalite.data_tools.store_tools import documents
from megalite.data_tools.store_tools.splitting import split_store
from megalite.errors import ConfigError, DataError
from tests.data_tools.store_tools.stores import contents, flat, random_store


def config(store, output, **changes) -> DataSplitConfig:
    return DataSplitConfig(store=str(store.path), output=str(output), **changes)


@pytest.mark.parametrize("shard_tokens", [100, 10**9])
@pytest.mark.parametrize("parts", [2, 3, 11, 40])
def test_contiguous_parts_of_equal_size(tmp_path, monkeypatch, parts, shard_tokens):
    monkeypatch.setattr(documents, "BLOCK_TOKENS", 64)
    store = random_store(tmp_path / "a", shard_tokens=shard_tokens)
    counts = split_store(config(store, tmp_path / "out", parts=parts))
    stores = [TokenStore.open(path) for path in sorted((tmp_path / "out").iterdir())]
    assert [count.path for count in counts] == [part.path for part in stores]
    assert flat(contents(part) for part in stores) == contents(store)
    assert [count.documents for count in counts] == [part.num_documents for part in stores]
    assert all(part.manifest.tokenizer == store.manifest.tokenizer for part in stores)
    longest = max(len(ids) for ids, _ in contents(store))
    if parts < 40:
        assert all(abs(part.num_tokens - store.num_tokens / parts) <= 2 * longest for part in stores)


def test_a_drawn_fraction(tmp_path, monkeypatch):
    monkeypatch.setattr(documents, "BLOCK_TOKENS", 64)
    store = random_store(tmp_path / "a", count=200, shard_tokens=1000)
    split_store(config(store, tmp_path / "out", fraction=0.3))
    train, validation = (contents(tmp_path / "out" / split / "s") for split in ("train", "validation"))
    assert len(validation) == 60
    order = {bytes_: place for place, (_, bytes_) in enumerate(contents(store))}
    for part in (train, validation):
        assert [order[b] for _, b in part] == sorted(order[b] for _, b in part)
    assert sorted(train + validation, key=lambda one: order[one[1]]) == contents(store)
    # Drawn from everywhere, and otherwise by another seed.
    drawn = np.array([order[b] for _, b in validation])
    assert abs(drawn.mean() - 99.5) < 25
    split_store(config(store, tmp_path / "again", fraction=0.3))
    split_store(config(store, tmp_path / "other", fraction=0.3, seed=1))
    assert contents(tmp_path / "again/validation/s") == validation
    assert contents(tmp_path / "other/validation/s") != validation


def test_a_source_names_one_folder(tmp_path):
    split_store(config(random_store(tmp_path / "a", source="../x"), tmp_path / "out", fraction=0.5))
    assert sorted(p.parent.name for p in tmp_path.rglob("manifest.json")) == ["_x", "_x", "a"]
    assert TokenStore.open(tmp_path / "out/train/_x").manifest.source == "../x"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({}, "found None and None, give one of them"),
        ({"parts": 2, "fraction": 0.5}, "found 2 and 0.5, give one of them"),
        ({"parts": 1}, "parts: found 1, allowed: 2 or more"),
        ({"fraction": 1.0}, "fraction: found 1.0, allowed: above 0 and below 1"),
        ({"fraction": float("nan")}, "fraction: found nan"),
    ],
)
def test_unfit_settings(tmp_path, changes, message):
    with pytest.raises(ConfigError, match=message):
        split_store(DataSplitConfig(store="a", output=str(tmp_path / "out"), **changes))


def test_too_few_documents(tmp_path):
    store = random_store(tmp_path / "a", count=3)
    with pytest.raises(DataError, match="3 documents, too few for parts=4"):
        split_store(config(store, tmp_path / "out", parts=4))
    with pytest.raises(DataError, match=r"fraction=0\.1 draws 0"):
        split_store(config(store, tmp_path / "out", fraction=0.1))
    assert [p.name for p in tmp_path.iterdir()] == ["a"]
