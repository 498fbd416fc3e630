"""Duplicates of every kind are left out, and nothing else: against the true similarity of all pairs."""

import random
from itertools import combinations

import numpy as np
import pytest

from megalite.config.schema_data import DedupConfig
from megalite.data.format import TokenStore
from megalite.data_tools.builder import dedup, shingles, units
from megalite.data_tools.builder.building import build_store
from megalite.data_tools.store_tools.inspection import inspect_documents
from megalite.errors import ConfigError
from tests.data_tools.builder.test_shingles import words_of
from tests.data_tools.corpora import HAN, build_config, make_tokenizer, write_jsonl

pytest.importorskip("rensa")


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return make_tokenizer(tmp_path_factory.mktemp("tokenizer"))


def grams(text: str, n: int = 5) -> set[tuple[str, ...]]:
    words = words_of(text)
    return {tuple(words[i : i + n]) for i in range(max(len(words) - n + 1, 1))}


def jaccard(a: set, b: set) -> float:
    return len(a & b) / len(a | b)


def fresh(rng: random.Random, words: int) -> list[str]:
    """A text that no other is like."""
    if rng.random() < 0.3:
        return [rng.choice(HAN) for _ in range(words)]
    return ["".join(rng.choices("abcdefghij", k=rng.randint(2, 6))) for _ in range(words)]


def spelled(words: list[str]) -> str:
    return ("" if words[0] in HAN else " ").join(words)


def corpus(seed: int) -> list[str]:
    """Documents, and versions of some with words changed: a few, or so many that they are documents of their own."""
    rng = random.Random(seed)
    documents = []
    for _ in range(150):
        words = fresh(rng, rng.randint(30, 250))
        documents.append(spelled(words))
        for _ in range(rng.choice((0, 0, 1, 1, 3))):
            version = list(words)
            for _ in range(rng.choice((0, 1, 2, 4, 8, 16, 40))):
                version[rng.randrange(len(version))] = rng.choice(fresh(rng, 1))
            documents.append(spelled(version))
    rng.shuffle(documents)
    return documents


def build(tmp_path, tokenizer, documents, **changes) -> tuple[set[str], object]:
    """The texts that are left, and the report."""
    half = len(documents) // 2
    sources = [
        write_jsonl(tmp_path / f"{name}.jsonl", [{"text": text} for text in part])
        for name, part in (("a", documents[:half]), ("b", documents[half:]))
    ]
    config = build_config(sources, tmp_path / "out", tokenizer, validation_fraction=0.0, dedup=DedupConfig(**changes))
    report = build_store(config)
    store = TokenStore.open(tmp_path / "out/train/a")
    return {document.text for document in inspect_documents(store, store.num_documents)}, report


def test_near_duplicates_are_found_and_nothing_else_is_dropped(tmp_path, tokenizer, monkeypatch):
    """Recall of pairs from 0.8 on, precision of what is dropped; many small shares and segments."""
    monkeypatch.setattr(dedup, "_RECORDS", 50)
    monkeypatch.setattr(units, "SEGMENT_BYTES", 20_000)
    documents = corpus(seed=1)
    kept, report = build(tmp_path, tokenizer, documents, near=True)
    sets = {text: grams(text) for text in documents}
    similarity = {(a, b): jaccard(sets[a], sets[b]) for a, b in combinations(sets, 2)}
    close = {pair for pair, value in similarity.items() if value >= 0.8}
    assert len(close) > 40
    found = sum(1 for pair in close if not set(pair) <= kept)
    assert found >= 0.98 * len(close)
    # Whatever was dropped is like something that was kept.
    dropped = set(documents) - kept
    for text in dropped:
        like = [pair for pair in similarity if text in pair and similarity[pair] >= 0.75]
        assert any(kept & set(pair) for pair in like)
    assert report.dropped["near"] == len(documents) - len(kept)
    assert 0 < report.compared_pairs < len(documents) ** 2 / 10
    assert {example.similarity >= 0.75 for example in report.duplicates} == {True}


def test_the_first_of_equal_documents_stays(tmp_path, tokenizer):
    rng = random.Random(2)
    documents = [spelled(fresh(rng, 20)) for _ in range(30)]
    again = rng.choices(documents, k=40)
    kept, report = build(tmp_path, tokenizer, documents + again, exact=True)
    assert kept == set(documents)
    assert report.dropped == {"exact": 40}
    assert report.stages == [("exact", 70, 30)]
    pair = report.duplicates[0]
    assert pair.kept == pair.dropped
    assert pair.similarity == 1.0
    store = TokenStore.open(tmp_path / "out/train/a")
    in_order = [document.text for document in inspect_documents(store, store.num_documents)]
    assert in_order == documents


def test_exact_duplicates_are_not_compared_again(tmp_path, tokenizer):
    text = spelled(fresh(random.Random(3), 60))
    kept, report = build(tmp_path, tokenizer, [text] * 50 + [text + " more"], exact=True, near=True)
    assert kept == {text}
    assert report.dropped == {"exact": 49, "near": 1}
    assert report.compared_pairs == 1


@pytest.mark.parametrize("threshold", [0.5, 0.95])
def test_the_threshold(tmp_path, tokenizer, threshold):
    words = fresh(random.Random(4), 100)
    documents = [spelled(words), spelled(words[:92] + fresh(random.Random(5), 8))]
    assert 0.8 < jaccard(*map(grams, documents)) < 0.95
    kept, _ = build(tmp_path, tokenizer, documents, near=True, threshold=threshold)
    assert len(kept) == (1 if threshold == 0.5 else 2)


@pytest.mark.parametrize("ngram", [1, 5])
def test_the_length_of_ngrams(tmp_path, tokenizer, ngram):
    """The same words in another order are the same set of words, and no 5-gram in common."""
    words = fresh(random.Random(6), 80)
    documents = [spelled(words), spelled(words[::-1])]
    kept, _ = build(tmp_path, tokenizer, documents, near=True, ngram=ngram)
    assert len(kept) == ngram // 5 + 1


def test_long_documents_are_compared_whole(tmp_path, tokenizer, monkeypatch):
    """The same beginning is not the same document."""
    monkeypatch.setattr(shingles, "_PIECE", 200)
    rng = random.Random(7)
    start = fresh(rng, 150)
    documents = [spelled(start + fresh(rng, 600)), spelled(start + fresh(rng, 600))]
    long = spelled(fresh(rng, 900))
    kept, _ = build(tmp_path, tokenizer, [*documents, long, long + " and more"], near=True)
    assert kept == {*documents, long}


def test_near_duplicates_have_examples_beside_exact_ones(tmp_path, tokenizer):
    rng = random.Random(8)
    documents = [spelled(fresh(rng, 60)) for _ in range(20)]
    changed = [f"{text} {spelled(fresh(rng, 2))}" for text in documents]
    _, report = build(tmp_path, tokenizer, [*documents, *documents, *changed], exact=True, near=True)
    assert report.dropped == {"exact": 20, "near": 20}
    similarities = [example.similarity for example in report.duplicates]
    assert similarities.count(1.0) == 5
    assert len([value for value in similarities if value < 1]) == 5


def test_documents_without_words_are_not_alike(tmp_path, tokenizer):
    kept, _ = build(tmp_path, tokenizer, ["!!!", "...", "?", "a b c"], near=True)
    assert kept == {"!!!", "...", "?", "a b c"}


@pytest.mark.parametrize(("changes", "key"), [({"threshold": 0.0}, "threshold"), ({"ngram": 0}, "ngram")])
def test_values_out_of_range(tmp_path, tokenizer, changes, key):
    with pytest.raises(ConfigError, match=rf"dedup\.{key}: found"):
        build(tmp_path, tokenizer, ["a", "b"], near=True, **changes)


def test_jaccard_of_sets():
    rng = np.random.default_rng(0)
    for _ in range(50):
        a, b = (np.unique(rng.integers(0, 60, rng.integers(1, 50)).astype(np.uint32)) for _ in range(2))
        wanted = len(set(a.tolist()) & set(b.tolist())) / len(set(a.tolist()) | set(b.tolist()))
        assert dedup._jaccard(a, b) == wanted
