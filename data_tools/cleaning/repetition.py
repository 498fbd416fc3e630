"""The repetition rules of Gopher: Rae et al. 2021, "Scaling Language Models", A.1.1 and table A1.

"Repeated" means: stood before in the same document; a first occurrence is never counted. n-grams are of words as they
stand between blanks; of a document without blanks, of its letters and digits, ceil(1.5 n) for n words (see `words`).
"""

import math
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import count

import numpy as np
from numpy.typing import NDArray

from .step import Dropped, require_share
from .words import CHARACTERS_PER_WORD, View, share_of_repeats

_PARAGRAPH_END = re.compile(r"\n\s*\n")
_NOT_A_LETTER = re.compile(r"\W+")
_TOP = (2, 3, 4)
_DUPLICATE = (5, 6, 7, 8, 9, 10)


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

    def apply(self, view: View, language: str, counts: Counter[str]) -> str | Dropped:
        """The same text, or why it goes."""
        text = view.text
        lines, characters = view.repeated_lines
        if lines > self.max_duplicate_lines:
            return Dropped("duplicate lines")
        if characters > self.max_duplicate_line_characters * len(text):
            return Dropped("characters in duplicate lines")
        paragraphs, characters = share_of_repeats([p.strip() for p in _PARAGRAPH_END.split(text) if p.strip()])
        if paragraphs > self.max_duplicate_paragraphs:
            return Dropped("duplicate paragraphs")
        if characters > self.max_duplicate_paragraph_characters * len(text):
            return Dropped("characters in duplicate paragraphs")
        reason = self._repeated_ngrams(view)
        return Dropped(reason) if reason else text

    def _repeated_ngrams(self, view: View) -> str:
        ids, lengths, scale = _units(view)
        top = {math.ceil(n * scale): (n, limit) for n, limit in zip(_TOP, self.top_ngrams, strict=True)}
        duplicate = {
            math.ceil(n * scale): (n, limit) for n, limit in zip(_DUPLICATE, self.duplicate_ngrams, strict=True)
        }
        ends = np.concatenate([[0], np.cumsum(lengths)])
        total, largest_top = int(ends[-1]), min(max(top), len(ids))
        longest_top = int((ends[largest_top:] - ends[: len(ends) - largest_top]).max())
        for size, positions, first, occurrences in _repeats(ids, max(duplicate)):
            if size not in top and size not in duplicate:
                continue
            most, again = int(occurrences.max()), positions[~first]
            if size in top:
                n, limit = top[size]
                frequent = positions[occurrences == most]
                if int((ends[frequent + size] - ends[frequent]).max()) * most > limit * total:
                    return f"top {n}-gram"
            at_most = int((ends[again + size] - ends[again]).sum())  # characters in duplicates, some more than once
            if size in duplicate and at_most > duplicate[size][1] * total:
                n, limit = duplicate[size]
                edges = np.bincount(again, minlength=len(ids)) - np.bincount(again + size, minlength=len(ids) + 1)[:-1]
                if lengths[np.cumsum(edges) > 0].sum() > limit * total:
                    return f"duplicate {n}-grams"
            # Larger n-grams occur no more often, and what repeats is inside of what repeats at this size.
            if (size >= max(top) or most * longest_top <= min(self.top_ngrams) * total) and (
                at_most <= min(self.duplicate_ngrams) * total
            ):
                break
        return ""


def _units(view: View) -> tuple[NDArray[np.int64], NDArray[np.int64], float]:
    """What n-grams are made of: a number for each unit, its length in characters, and units by word."""
    words = view.words
    if words.is_unspaced:
        letters = np.frombuffer(_NOT_A_LETTER.sub("", view.text).encode("utf-32-le", "surrogatepass"), "<u4")
        return letters.astype(np.int64), np.ones(len(letters), np.int64), CHARACTERS_PER_WORD
    spaced = view.text.split() if words.num_unspaced else words.spaced
    number = dict(zip(set(spaced), count(), strict=False))  # in any order: only whether two are equal matters
    ids = np.fromiter(map(number.__getitem__, spaced), np.int64, len(spaced))
    return ids, np.fromiter(map(len, number), np.int64, len(number))[ids], 1.0


def _repeats(
    ids: NDArray[np.int64], longest: int
) -> Iterator[tuple[int, NDArray[np.int64], NDArray[np.bool_], NDArray[np.int64]]]:
    """For each size from 2: positions where an n-gram begins that occurs twice or more, whether it is its first
    occurrence, and how often it occurs. Ends with the first size without any.

    An n-gram that occurs twice begins with an (n-1)-gram that does, so each size looks only at what the last one left.
    n-grams are numbered from 0, so that the next size's are told apart by the number and the id of their last unit.
    """
    beyond = int(ids.max(initial=0)) + 1  # an id that ends the n-gram that runs over the end of the text, once a size
    ids = np.append(ids, beyond)
    positions, number = np.arange(len(ids) - 1), ids[:-1]
    for size in range(2, longest + 1):
        keys, positions = _sorted_pairs(number * (beyond + 1) + ids[positions + size - 1], positions, len(ids))
        same = np.zeros(len(keys) + 1, np.bool_)
        np.equal(keys[1:], keys[:-1], out=same[1:-1])
        repeated = same[1:] | same[:-1]
        if not repeated.any():
            return
        first = ~same[:-1][repeated]
        positions = positions[repeated]
        number = np.cumsum(first) - 1
        yield size, positions, first, np.bincount(number)[number]


def _sorted_pairs(
    keys: NDArray[np.int64], positions: NDArray[np.int64], num_positions: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Keys and their positions by key, then by position: in one number each if it has the bits, several times as fast.

    `positions` must ascend where keys are equal.
    """
    bits = num_positions.bit_length()
    if int(keys.max(initial=0)).bit_length() + bits < 64:
        pairs = np.sort(keys << bits | positions)
        return pairs >> bits, pairs & ((1 << bits) - 1)
    order = np.argsort(keys, kind="stable")
    return keys[order], positions[order]
