from collections import Counter
from pathlib import Path

import pyarrow.parquet as pq
import pytest

import megalite.data_tools.sample_corpus as sample_corpus
from megalite.config.compose import compose_config
from megalite.config.schema_data import DataBuildConfig, ReaderConfig, TokenizerTrainConfig
from megalite.data_tools.builder.building import build_store
from megalite.data_tools.readers import ReadReport, iter_documents
from megalite.data_tools.sample_corpus.make import shakespeare_documents, shakespeare_rows, tang_rows, write
from megalite.data_tools.tokenizer_training import train_tokenizer

CORPUS = Path(sample_corpus.__path__[0]) / "corpus.parquet"
READER = ["reader.id_column=id", "reader.source_column=source", "reader.language_column=language"]
READER += ["reader.split_column=split"]


@pytest.fixture(scope="module")
def rows() -> list[dict[str, str]]:
    return pq.read_table(CORPUS, page_checksum_verification=True).to_pylist()


def test_size_columns_and_splits(rows):
    assert CORPUS.stat().st_size <= 2_500_000
    assert list(rows[0]) == ["id", "source", "language", "text", "split"]
    assert len({row["id"] for row in rows}) == len(rows)
    assert {(row["source"], row["language"]) for row in rows} == {("shakespeare", "en"), ("tang", "zh")}
    poems = [row for row in rows if row["source"] == "tang"]
    assert len(poems) == 16_008
    assert [i for i, row in enumerate(poems, start=1) if row["split"] == "validation"] == list(range(10, 16_009, 10))
    plays = [row for row in rows if row["source"] == "shakespeare"]
    splits = [row["split"] for row in plays]
    assert splits == sorted(splits), "validation is the end"
    characters = Counter()
    for row in plays:
        characters[row["split"]] += len(row["text"])
    assert sum(characters.values()) == 1_115_394
    assert 0.1 <= characters["validation"] / 1_115_394 < 0.102
    sizes = [len(row["text"].encode()) for row in plays]
    assert 1500 < sum(sizes) / len(sizes) < 2000


def test_documents_joined_are_the_text(rows):
    text = "".join(row["text"] for row in rows if row["source"] == "shakespeare")
    assert shakespeare_documents(text) == [row["text"] for row in rows if row["source"] == "shakespeare"]
    assert all(document.endswith("\n\n") for document in shakespeare_documents(text)[:-1])


def test_the_script_makes_this_very_file(rows, tmp_path):
    text = "".join(row["text"] for row in rows if row["source"] == "shakespeare")
    poems = [row for row in rows if row["source"] == "tang"]
    import json

    lines = [json.dumps({"id": row["id"], "text": row["text"]}) for row in poems]
    assert shakespeare_rows(text) + tang_rows(lines) == rows
    write(rows[:3], tmp_path / "x.parquet")
    assert pq.read_table(tmp_path / "x.parquet").to_pylist() == rows[:3]


def test_a_flipped_bit_is_noticed(tmp_path):
    from megalite.errors import DataError

    data = bytearray(CORPUS.read_bytes())
    data[len(data) // 2] ^= 1
    (tmp_path / "corpus.parquet").write_bytes(data)
    with pytest.raises(DataError, match=r"corpus\.parquet: damaged"):
        list(iter_documents([str(tmp_path / "corpus.parquet")], ReaderConfig(), ReadReport()))


def test_commands_turn_it_into_stores(tmp_path):
    """Tokenizer and stores by the composed configuration, on a part of the text, to be quick."""
    table = pq.read_table(CORPUS)
    part = tmp_path / "corpus.parquet"
    pq.write_table(table.slice(500, 400), part)
    train = [f"input={part}", f"output={tmp_path}/tokenizer", "split=train", "tokenizer.vocab_size=2048"]
    train += ["tokenizer.character_coverage=0.9", "tokenizer.language_balance=1.0"]
    path = train_tokenizer(compose_config("tokenizer_train", TokenizerTrainConfig, [*train, *READER]))
    build = [f"input={part}", f"output={tmp_path}/stores", f"tokenizer.path={path}", "workers=1", *READER]
    report = build_store(compose_config("data_build", DataBuildConfig, build))
    assert sorted(report.stores) == ["train/shakespeare", "train/tang", "validation/shakespeare", "validation/tang"]
    assert sum(store.documents for store in report.stores.values()) == 400
    assert report.stores["validation/shakespeare"].bytes_per_token > 2
