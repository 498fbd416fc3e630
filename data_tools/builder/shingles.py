"""Word n-grams of documents as 64-bit hashes, whole batches at a time: what near duplicates and leaks are found by.

Words are runs of letters and digits in lower case; what stands between them does not count. Each character of a script
without spaces (Han, kana, Thai, Lao, Khmer, Myanmar) is a word of its own. A document with fewer words than n has one
n-gram: all of its words.

A word's hash is a polynomial in its characters modulo 2^64 (Karp and Rabin 1987), taken as the difference of two
prefix sums, so that a batch of any documents costs a fixed number of vector operations; it is then scattered by the
output function of SplitMix64 (Steele, Lea and Flood 2014).
"""

import functools
import sys
import unicodedata
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

_BASE = 0x9E3779B97F4A7C15  # odd, so that it has an inverse modulo 2^64
_MULTIPLIER = np.uint64(0xBF58476D1CE4E5B9)
_PIECE = 1 << 20  # characters of a document at a time
_POWERS = _PIECE + (1 << 16)  # in a table: as many as a document needs, or many short ones with their ends
_NO_WORD, _LETTER, _WORD = 0, 1, 2  # what a character is: between words, part of one, one by itself
_ALONE = (  # blocks whose scripts write no spaces
    (0x0E00, 0x0E7F, "Thai"), (0x0E80, 0x0EFF, "Lao"), (0x1000, 0x109F, "Myanmar"), (0x1780, 0x17FF, "Khmer"),
    (0x3040, 0x30FF, "kana"), (0x3400, 0x4DBF, "Han"), (0x4E00, 0x9FFF, "Han"), (0xF900, 0xFAFF, "Han"),
    (0x20000, 0x3FFFF, "Han"),
)  # fmt: skip

U64 = NDArray[np.uint64]
I64 = NDArray[np.int64]


def shingle_hashes(texts: Sequence[str], n: int) -> tuple[U64, I64]:
    """Hashes of the word n-grams of `texts`, document after document [shingles], and where each begins [texts + 1].

    An n-gram that a document repeats stands there as often. A document without words has none. A long document is taken
    in pieces, so that memory is bounded; the few n-grams across their seams are left out.
    """
    pieces = [[text[i : i + _PIECE] for i in range(0, max(len(text), 1), _PIECE)] for text in texts]
    if len(pieces) == sum(map(len, pieces)):
        return _batch_hashes(texts, n)
    found = [[_batch_hashes([piece], n)[0] for piece in document] for document in pieces]
    counts = [sum(map(len, document)) for document in found]
    hashes = np.concatenate([np.empty(0, np.uint64), *(part for document in found for part in document)])
    return hashes, np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)


def _batch_hashes(texts: Sequence[str], n: int) -> tuple[U64, I64]:
    words, starts = word_hashes(texts)
    counts = np.diff(starts)
    grams = np.where(counts >= n, counts - n + 1, np.minimum(counts, 1))
    offsets = np.concatenate([[0], np.cumsum(grams)])
    # Of the n words from each word on, a polynomial again; then those that lie in one document are taken.
    padded = np.concatenate([words, np.zeros(n, np.uint64)])
    sums = padded[: len(words)].copy()
    for k in range(1, n):
        sums *= _MULTIPLIER
        sums += padded[k : len(words) + k]
    first = np.repeat(starts[:-1] - offsets[:-1], grams) + np.arange(offsets[-1])
    hashes = sums[first]
    for document in np.flatnonzero((counts > 0) & (counts < n)).tolist():
        few = int(counts[document])  # so that a few words are not n with zeros before them
        for word in words[starts[document] : starts[document + 1]].tolist():
            few = (few * int(_MULTIPLIER) + word) % 2**64
        hashes[offsets[document]] = few
    return scatter(hashes), offsets


def word_hashes(texts: Sequence[str]) -> tuple[U64, I64]:
    """Hashes of the words of `texts`, document after document [words], and where each begins [texts + 1]."""
    kinds, folded = _tables()
    # A newline ends every document, so that no word reaches into the next.
    points = np.frombuffer("\n".join([*texts, ""]).encode("utf-32-le"), np.uint32)
    ends = np.cumsum([len(text) + 1 for text in texts])
    kind = kinds[points]
    letters = kind == _LETTER
    after_letter = np.concatenate([[False], letters[:-1]])
    first = np.flatnonzero((letters & ~after_letter) | (kind == _WORD))
    # A word ends before the first character that does not go on with it.
    stops = np.flatnonzero(after_letter & ~letters)
    last = np.where(kind[first] == _WORD, first + 1, 0)
    last[kind[first] == _LETTER] = stops
    powers, inverses = _powers(len(points) + 1)
    prefix = np.zeros(len(points) + 1, np.uint64)
    np.multiply(folded[points], powers[: len(points)], out=prefix[1:])
    np.cumsum(prefix, out=prefix)
    words = scatter((prefix[last] - prefix[first]) * inverses[first])
    return words, np.concatenate([[0], np.searchsorted(first, ends)])


def scatter(values: U64) -> U64:
    """A bijection of 64 bits whose values look random (SplitMix64)."""
    values = values + np.uint64(_BASE)
    values ^= values >> np.uint64(30)
    values *= np.uint64(0xBF58476D1CE4E5B9)
    values ^= values >> np.uint64(27)
    values *= np.uint64(0x94D049BB133111EB)
    values ^= values >> np.uint64(31)
    return values


@functools.cache
def _tables() -> tuple[NDArray[np.uint8], U64]:
    """What each code point is, and the number after its lower case, by code point."""
    size = sys.maxunicode + 1
    kinds = np.zeros(size, np.uint8)
    folded = np.arange(1, size + 1, dtype=np.uint64)
    for start in range(0, 0x20000, 0x1000):  # beyond are Han, private use and nothing
        for point, character in enumerate(map(chr, range(start, start + 0x1000)), start):
            if character.isalnum() or unicodedata.category(character)[0] == "M":
                kinds[point] = _LETTER
                lower = character.lower()
                folded[point] = (ord(lower) if len(lower) == 1 else point) + 1
    kinds[0x20000:0x40000] = _LETTER
    for start, end, _ in _ALONE:
        block = kinds[start : end + 1]
        block[block == _LETTER] = _WORD
    return kinds, folded


@functools.cache
def _powers_up_to(size: int) -> tuple[U64, U64]:
    inverse = pow(_BASE, -1, 2**64)
    powers = np.cumprod(np.concatenate([[np.uint64(1)], np.full(size - 1, _BASE, np.uint64)]), dtype=np.uint64)
    inverses = np.cumprod(np.concatenate([[np.uint64(1)], np.full(size - 1, inverse, np.uint64)]), dtype=np.uint64)
    return powers, inverses


def _powers(size: int) -> tuple[U64, U64]:
    """The first powers of the base and of its inverse, [at least size] each: most batches share one table."""
    return _powers_up_to(-(-size // _POWERS) * _POWERS)
