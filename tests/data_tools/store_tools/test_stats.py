import json
from collections import Counter
from dataclasses import asdict

import numpy as np
import pytest

from megalite.config.schema_data import DataStatsConfig
from megalite.data.writer import StoreWriter
from megalite.data_tools.store_tools import documents, stats
from megalite.data_tools.store_tools.stats import collect_stats, store_stats
from megalite.errors import ConfigError, DataError
from tests.data_tools.store_tools.stores import contents, random_store, text_store


@pytest.mark.parametrize("counted", [8, 1 << 20])
def test_the_numbers_are_those_of_plain_counting(tmp_path, monkeypatch, counted):
    monkeypatch.setattr(documents, "BLOCK_TOKENS", 100)
    monkeypatch.setattr(stats, "_LENGTHS_COUNTED", counted)
    store = random_store(tmp_path / "a", count=101, shard_tokens=400, tokenizer=None)
    lengths = sorted(len(ids) for ids, _ in contents(store))
    tokens = Counter(i for ids, _ in contents(store) for i in ids)
    found = store_stats(store, top=5)
    assert (found.documents, found.tokens, found.shards) == (101, sum(lengths), store.num_shards)
    assert found.bytes == sum(range(101))
    assert found.bytes_per_token == pytest.approx(found.bytes / found.tokens)
    assert found.mean_length == pytest.approx(np.mean(lengths))
    assert (found.median_length, found.p90_length, found.max_length) == (lengths[50], lengths[90], lengths[-1])
    bins = Counter(int(np.log2(length)) for length in lengths)
    assert {bound: count for bound, count in found.histogram if count} == {1 << i: n for i, n in bins.items()}
    assert [bound for bound, _ in found.histogram] == [1 << i for i in range(min(bins), max(bins) + 1)]
    assert (found.vocab_size, found.vocab_used, found.vocab_share) == (300, len(tokens), len(tokens) / 300)
    expected = sorted(tokens.items(), key=lambda item: (-item[1], item[0]))[:5]
    assert [(top.id, top.count) for top in found.top_tokens] == expected
    assert found.top_tokens[0].share == expected[0][1] / sum(lengths)
    assert (found.unknown_tokens, found.unknown_share, found.top_tokens[0].text) == (None, None, None)


def test_tokens_as_text_and_unknown_ones(tmp_path, tokenizer_path):
    store, _ = text_store(tmp_path / "a", tokenizer_path)
    found = store_stats(store, top=400)
    assert " the" in [top.text for top in found.top_tokens]
    assert found.unknown_share == 0
    tokenizer = documents.open_whole(store.path).manifest.tokenizer
    assert tokenizer is not None
    ids = np.concatenate([store.document(i) for i in range(3)])
    ids[:2] = 0  # the unknown piece
    lengths = np.diff(store.offsets_of_documents(0, 3))
    with StoreWriter(tmp_path / "b", vocab_size=400, end_of_document=int(ids[-1])) as writer:
        writer.add_documents(ids, lengths, lengths)
        documents.copy_tokenizer(store.path, store.manifest, writer)
    assert store_stats(documents.open_whole(tmp_path / "b"), top=1).unknown_tokens == 2


def test_several_stores_and_json(tmp_path):
    random_store(tmp_path / "in/a", tokenizer=None)
    random_store(tmp_path / "in/b", count=0, tokenizer=None)
    config = DataStatsConfig(store=str(tmp_path / "in"), output=str(tmp_path / "new/stats.json"), top=3)
    found = collect_stats(config)
    assert [path.rpartition("/")[2] for path in found] == ["a", "b"]
    assert [p.name for p in (tmp_path / "new").iterdir()] == ["stats.json"]
    written = json.loads((tmp_path / "new/stats.json").read_text())
    assert list(written) == list(found)
    for path, one in found.items():
        expected = asdict(one) | {"vocab_share": one.vocab_share, "unknown_share": None}
        assert written[path] == json.loads(json.dumps(expected))
    empty = found[f"{tmp_path}/in/b"]
    assert (empty.histogram, empty.median_length, empty.mean_length, empty.top_tokens) == ([], 0, 0, [])
    with pytest.raises(DataError, match=r"stats\.json exists already"):
        collect_stats(config)
    with pytest.raises(ConfigError, match="top: found 0"):
        collect_stats(DataStatsConfig(store="a", top=0))


def test_damaged_stores(tmp_path):
    store = random_store(tmp_path / "a", vocab_size=300, tokenizer=None)
    np.full(store.num_tokens, 300, "<u2").tofile(store.path / store.manifest.shards[0].tokens.file)
    with pytest.raises(DataError, match="token id 300 outside the vocabulary of 300"):
        store_stats(store, 1)
    np.zeros(store.num_documents + 1, "<u8").tofile(store.path / store.manifest.shards[0].document_offsets.file)
    with pytest.raises(DataError, match=r"is damaged: .*`megalite data repair` mends it"):
        store_stats(store, 1)
