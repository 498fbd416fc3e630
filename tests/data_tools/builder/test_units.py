"""A worker's memory does not grow with its input."""

import dataclasses
import random
import tracemalloc
from itertools import count

import numpy as np
import pytest

from megalite.config.schema_data import DedupConfig
from megalite.data_tools.builder import shingles, units, work
from megalite.data_tools.readers import Document
from tests.data_tools.corpora import build_config, make_tokenizer, write_jsonl

pytest.importorskip("rensa")


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return make_tokenizer(tmp_path_factory.mktemp("tokenizer"))


def run_worker(folder, tokenizer, documents: int) -> tuple[int, units.Unit]:
    """The most memory in use by Python and NumPy, and the unit that was done."""
    folder.mkdir()
    rng = random.Random(0)
    rows = [{"text": "".join(rng.choices("abcde ", k=1000))} for _ in range(documents)]
    config = build_config([write_jsonl(folder / "in.jsonl", rows)], folder / "out", tokenizer)
    config = dataclasses.replace(config, dedup=DedupConfig(near=True))
    (unit,) = work.units_of(config, [folder / "in.jsonl"], folder)
    worker = units.Worker(config, None)
    tracemalloc.start()
    try:
        worker.run(unit)
        return tracemalloc.get_traced_memory()[1], unit
    finally:
        tracemalloc.stop()


def test_a_segment_is_written_as_it_comes(tmp_path, tokenizer, monkeypatch):
    monkeypatch.setattr(units, "_CHUNK_BYTES", 5000)
    shingles.shingle_hashes(["a"], 5)  # makes its tables
    small, _ = run_worker(tmp_path / "small", tokenizer, 20)
    large, unit = run_worker(tmp_path / "large", tokenizer, 400)
    (tokens,) = unit.folder.glob("*.tokens")
    assert large - small < tokens.stat().st_size / 2


def test_the_encoder_forgets_when_the_process_has_grown(tmp_path, tokenizer, monkeypatch):
    """Each time by so much: what it did not give back was not its own."""
    sizes = count(step=units._GROWTH // 2)  # looked at once at the start, after each chunk, and after forgetting
    monkeypatch.setattr(units, "_anonymous_bytes", lambda: next(sizes))
    assert times_forgotten(tmp_path, tokenizer, monkeypatch) == 12 // 3


def test_the_encoder_forgets_after_so_much_text(tmp_path, tokenizer, monkeypatch):
    monkeypatch.setattr(units, "_anonymous_bytes", lambda: 0)
    monkeypatch.setattr(units, "_FORGET_BYTES", 35_000)
    assert times_forgotten(tmp_path, tokenizer, monkeypatch) == 12 // 4


def times_forgotten(tmp_path, tokenizer, monkeypatch) -> int:
    """Of a worker that does 12 chunks of 10,000 bytes."""
    forgotten = []
    monkeypatch.setattr(units.Encoder, "forget", lambda self: forgotten.append(self))
    monkeypatch.setattr(units, "_CHUNK_BYTES", 10_000)
    run_worker(tmp_path / "in", tokenizer, 120)
    return len(forgotten)


def test_anonymous_memory_is_measured():
    before = units._anonymous_bytes()
    array = np.ones(1 << 25, np.uint8)
    assert abs(units._anonymous_bytes() - before - array.nbytes) < 1 << 23


def test_freed_memory_goes_back_to_the_system():
    rng = np.random.default_rng(0)
    before = units._anonymous_bytes()
    arrays = [rng.random(rng.integers(1000, 4000)) for _ in range(4000)]  # 80 MB, too small to be mapped
    pins = [bytes(2000) for _ in range(100)]
    del arrays
    units._trim()
    assert units._anonymous_bytes() - before < 1 << 24
    del pins


def test_chunks_and_segments_are_bounded(monkeypatch):
    monkeypatch.setattr(units, "_CHUNK_BYTES", 100)
    monkeypatch.setattr(units, "_CHUNK_DOCUMENTS", 5)
    monkeypatch.setattr(units, "_SEGMENT_DOCUMENTS", 40)
    monkeypatch.setattr(units, "SEGMENT_BYTES", 2000)
    rng = random.Random(0)
    sizes = [rng.choice((1, 20, 60, 300)) for _ in range(500)] + [1] * 100
    documents = [Document("", size, str(i), "", "", None) for i, size in enumerate(sizes)]
    segments = [list(chunks) for chunks in units._segments(iter(documents))]
    assert [document for chunks in segments for chunk in chunks for document in chunk] == documents
    for chunks in segments:
        assert sum(map(len, chunks)) <= 40
        assert sum(document.num_bytes for chunk in chunks[:-1] for document in chunk) < 2000
        for chunk in chunks:
            assert len(chunk) == 1 or (len(chunk) <= 5 and sum(document.num_bytes for document in chunk) <= 100)
