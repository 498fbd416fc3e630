"""Word n-grams as vectors, against words cut one character at a time."""

import random
import unicodedata

import numpy as np
import pytest

from megalite.data_tools.builder import shingles
from megalite.data_tools.builder.shingles import shingle_hashes, word_hashes
from tests.data_tools.corpora import TRICKY, texts

ALONE = ("CJK UNIFIED", "CJK COMPATIBILITY", "HIRAGANA", "KATAKANA", "THAI", "LAO ", "KHMER", "MYANMAR")


def words_of(text: str) -> list[str]:
    """The words, as the rooms' own head defines them."""
    words, word = [], ""
    for character in [*text, " "]:
        alone = unicodedata.name(character, "").startswith(ALONE)
        if not alone and (character.isalnum() or unicodedata.category(character).startswith("M")):
            lower = character.lower()
            word += lower if len(lower) == 1 else character
            continue
        words += [word] if word else []
        words += [character] if alone and (character.isalnum() or unicodedata.category(character)[0] == "M") else []
        word = ""
    return words


def documents() -> list[str]:
    rng = random.Random(0)
    noise = ["".join(chr(rng.choice((rng.randrange(32, 127), rng.randrange(0xA0, 0x2000)))) for _ in range(300))]
    return [*texts(40), "", "one", "ONE, One", "a b", "word\nword", *TRICKY, *noise, "春眠不覺曉 spring 春", ""]


def test_words():
    docs = documents()
    hashes, starts = word_hashes(docs)
    assert (starts[0], starts[-1], len(starts)) == (0, len(hashes), len(docs) + 1)
    known: dict[str, int] = {}
    for document, start, end in zip(docs, starts[:-1], starts[1:], strict=True):
        words = words_of(document)
        assert len(words) == end - start, document[:50]
        for word, value in zip(words, hashes[start:end].tolist(), strict=True):
            assert known.setdefault(word, value) == value
    assert len(set(known.values())) == len(known) > 150


@pytest.mark.parametrize("n", [1, 2, 5])
def test_ngrams(n):
    docs = documents()
    hashes, starts = shingle_hashes(docs, n)
    known: dict[tuple[str, ...], int] = {}
    for document, start, end in zip(docs, starts[:-1], starts[1:], strict=True):
        words = words_of(document)
        grams = [tuple(words[i : i + n]) for i in range(max(len(words) - n + 1, min(len(words), 1)))]
        assert len(grams) == end - start
        for gram, value in zip(grams, hashes[start:end].tolist(), strict=True):
            assert known.setdefault(gram, value) == value
    assert len(set(known.values())) == len(known)


def test_long_documents_are_taken_in_pieces(monkeypatch):
    docs = ["a b c d e f g h", "", "one two", "x y z u v w"]
    whole, starts = shingle_hashes(docs, 2)
    monkeypatch.setattr(shingles, "_PIECE", 8)  # four words of a letter each
    pieces, cut = shingle_hashes(docs, 2)
    assert len(cut) == len(starts)
    for number in range(len(docs)):
        mine = set(pieces[cut[number] : cut[number + 1]].tolist())
        assert mine <= set(whole[starts[number] : starts[number + 1]].tolist())
        assert len(mine) >= starts[number + 1] - starts[number] - 1


def test_a_batch_is_its_documents():
    docs = documents()
    hashes, starts = shingle_hashes(docs, 5)
    alone = [shingle_hashes([document], 5)[0] for document in docs]
    assert np.array_equal(hashes, np.concatenate(alone))
    assert np.diff(starts).tolist() == [len(values) for values in alone]
    assert len(shingle_hashes([], 5)[0]) == 0


def test_a_table_of_powers_serves_short_texts_and_the_longest_pieces():
    assert shingles._powers(1)[0] is shingles._powers(shingles._PIECE + 1024)[0]
