"""A file cut into spans gives the rows that it gives whole, with the same numbers."""

import json
import random

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from megalite.config.schema_data import ReaderConfig
from megalite.data_tools.builder.building import build_store
from megalite.data_tools.formats import WHOLE, spans
from megalite.data_tools.readers import ReadReport, iter_file_documents, spans_of
from tests.data_tools.builder.test_building import stores_of
from tests.data_tools.corpora import build_config, english, make_tokenizer


def jsonl(path, texts):
    # Blank lines, CRLF, a last line without its end.
    path.write_bytes(b"\r\n\n".join(json.dumps({"text": text}).encode() for text in texts))


def lines(path, texts):
    path.write_bytes(b"\xef\xbb\xbf" + "\n\n".join(text.replace("\n", " ") for text in texts).encode())


def parquet(path, texts):
    pq.write_table(pa.table({"text": texts}), path, row_group_size=7)


@pytest.mark.parametrize(
    ("name", "write", "document"),
    [("a.jsonl", jsonl, "file"), ("a.txt", lines, "line"), ("a.parquet", parquet, "file")],
)
@pytest.mark.parametrize("size", [1, 300, 5000, 10**6])
def test_spans_are_the_whole(tmp_path, monkeypatch, name, write, document, size):
    monkeypatch.setattr(spans, "SPAN_BYTES", size)
    monkeypatch.setattr(spans, "_BLOCK", 64)
    rng = random.Random(0)
    write(tmp_path / name, [english(rng, rng.randint(1, 5)) for _ in range(60)])
    config = ReaderConfig(document=document)
    parts = spans_of(tmp_path / name, config)
    assert (parts == [WHOLE]) == (size == 10**6)
    assert size > 300 or len(parts) > 5
    whole = list(iter_file_documents(tmp_path / name, config, "s", ReadReport()))
    report = ReadReport()
    cut = [d for part in parts for d in iter_file_documents(tmp_path / name, config, "s", report, part)]
    assert len(whole) == 60
    assert cut == whole  # ids, which hold the numbers of lines and rows, too


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.txt", "a.json"])
def test_what_cannot_be_cut_is_whole(tmp_path, monkeypatch, name):
    monkeypatch.setattr(spans, "SPAN_BYTES", 1)
    (tmp_path / name).write_bytes(b'[{"text": "a"}]\n\n[]')
    assert spans_of(tmp_path / name, ReaderConfig()) == [WHOLE]


def test_a_build_of_one_large_file(tmp_path, monkeypatch):
    rng = random.Random(1)
    jsonl(tmp_path / "in.jsonl", [english(rng, 3) for _ in range(50)])
    tokenizer = make_tokenizer(tmp_path)
    build_store(build_config([tmp_path / "in.jsonl"], tmp_path / "whole", tokenizer))
    monkeypatch.setattr(spans, "SPAN_BYTES", 500)
    report = build_store(build_config([tmp_path / "in.jsonl"], tmp_path / "cut", tokenizer))
    assert report.files == 1
    assert stores_of(tmp_path / "cut") == stores_of(tmp_path / "whole")
