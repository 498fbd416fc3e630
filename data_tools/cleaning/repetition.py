"""The repetition rules of Gopher: Rae et al. 2021, "Scaling Language Models", A.1.1 and table A1.

"Repeated" means: stood before in the same document; a first occurrence is never counted. n-grams are of words as they
stand between blanks; of a document without blanks, of its letters and digits, ceil(1.5 n) for n words (see `words`).
"""

import math
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from .step import Dropped, require_share
from .words import CHARACTERS_PER_WORD, filled_lines, share_of_repeats, split_words

_PARAGRAPH_END = re.compile(r"\n\s*\n")
_NOT_A_LETTER = re.compile(r"\W+")
_TOP = (2, 3, 4)
_DUPLICATE = (5, 6, 7, 8, 9, 10)
_MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)  # odd, 2^64 / golden ratio: Knuth's multiplicative hash


@dataclass(frozen=True, kw_only=True)
class GopherRepetition:
    """Drops documents that repeat themselves, by lines, paragraphs and n-grams of words.

    Defaults are the paper's. `top_ngrams`: share of the characters of words inside the most frequent 2-, 3- and 4-gram,
    counted where it occurs at least twice. `duplicate_ngrams`: share inside repeated 5- to 10-grams, a character that
    several of them cover counted once.
    """

    max_duplicate_lines: float = 0.30
    max_duplicate_paragraphs: float = 0.30
    max_duplicate_line_characters: float = 0.20
    max_duplicate_paragraph_characters: float = 0.20
    top_ngrams: tuple[float, float, float] = (0.20, 0.18, 0.16)
    duplicate_ngrams: tuple[float, float, float, float, float, float] = (0.15, 0.14, 0.13, 0.12, 0.11, 0.10)

    def __post_init__(self) -> None:
        require_share(self, "max_duplicate_lines", "max_duplicate_paragraphs", "top_ngrams", "duplicate_ngrams")
        require_share(self, "max_duplicate_line_characters", "max_duplicate_paragraph_characters")

    def apply(self, text: str, language: str, counts: Counter[str]) -> str | Dropped:
        """The same text, or why it goes."""
        lines, characters = share_of_repeats(filled_lines(text))
        if lines > self.max_duplicate_lines:
            return Dropped("duplicate lines")
        if characters > self.max_duplicate_line_characters * len(text):
            return Dropped("characters in duplicate lines")
        paragraphs, characters = share_of_repeats([p.strip() for p in _PARAGRAPH_END.split(text) if p.strip()])
        if paragraphs > self.max_duplicate_paragraphs:
            return Dropped("duplicate paragraphs")
        if characters > self.max_duplicate_paragraph_characters * len(text):
            return Dropped("characters in duplicate paragraphs")
        reason = self._repeated_ngrams(text)
        return Dropped(reason) if reason else text

    def _repeated_ngrams(self, text: str) -> str:
        ids, lengths, scale = _units(text)
        top = {math.ceil(n * scale): (n, limit) for n, limit in zip(_TOP, self.top_ngrams, strict=True)}
        duplicate = {
            math.ceil(n * scale): (n, limit) for n, limit in zip(_DUPLICATE, self.duplicate_ngrams, strict=True)
        }
        ends = np.concatenate([[0], np.cumsum(lengths)])
        for size, positions, first, occurrences in _repeats(ids, max(duplicate)):
            if size in top:
                n, limit = top[size]
                frequent = positions[occurrences == occurrences.max()]
                characters = int((ends[frequent + size] - ends[frequent]).max() * occurrences.max())
                if characters > limit * ends[-1]:
                    return f"top {n}-gram"
            if size in duplicate:
                n, limit = duplicate[size]
                edges = np.zeros(len(ids) + 1, np.int64)
                edges[positions[~first]] += 1
                edges[positions[~first] + size] -= 1
                if lengths[np.cumsum(edges[:-1]) > 0].sum() > limit * ends[-1]:
                    return f"duplicate {n}-grams"
        return ""


def _units(text: str) -> tuple[NDArray[np.uint64], NDArray[np.int64], float]:
    """What n-grams are made of: a number for each unit, its length in characters, and units by word."""
    words = split_words(text)
    if words.is_unspaced:
        letters = np.frombuffer(_NOT_A_LETTER.sub("", text).encode("utf-32-le", "surrogatepass"), np.uint32)
        return letters.astype(np.uint64), np.ones(len(letters), np.int64), CHARACTERS_PER_WORD
    spaced = text.split() if words.num_unspaced else words.spaced
    # Only whether two are equal matters, so that Python's hash, another in every process, gives the same answer.
    ids = np.fromiter(map(hash, spaced), np.int64, len(spaced)).view(np.uint64)
    return ids, np.fromiter(map(len, spaced), np.int64, len(spaced)), 1.0


def _repeats(
    ids: NDArray[np.uint64], longest: int
) -> Iterator[tuple[int, NDArray[np.int64], NDArray[np.bool_], NDArray[np.int64]]]:
    """For each size from 2: positions where an n-gram begins that occurs twice or more, whether it is its first
    occurrence, and how often it occurs. Ends with the first size without any.

    An n-gram that occurs twice begins with an (n-1)-gram that does, so each size looks only at what the last one left.
    n-grams are compared by 64-bit polynomial hashes.
    """
    positions = np.arange(len(ids))
    hashes = ids
    for size in range(2, longest + 1):
        inside = positions + size <= len(ids)
        positions = positions[inside]
        hashes = hashes[inside] * _MULTIPLIER + ids[positions + size - 1]
        # Stable: positions ascend inside a group of equal n-grams, and did so inside the group of their beginning.
        order = np.argsort(hashes, kind="stable")
        positions, hashes = positions[order], hashes[order]
        again = np.zeros(len(hashes) + 1, np.bool_)
        np.equal(hashes[1:], hashes[:-1], out=again[1:-1])
        repeated = again[1:] | again[:-1]
        if not repeated.any():
            return
        first = ~again[:-1][repeated]
        positions, hashes = positions[repeated], hashes[repeated]
        group = np.cumsum(first) - 1
        yield size, positions, first, np.bincount(group)[group]
