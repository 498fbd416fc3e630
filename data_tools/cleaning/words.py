"""Words, sentences and lines of text in any script, as the published quality rules count them.

Rules written for English count words between blanks. Chinese and Japanese write none, so every Han character and kana
counts as 1 / 1.5 of a word: Chinese words have about 1.5 characters in running text, and thresholds in words then mean
the same amount of text. A document is *unspaced* when at least half of its words come from such characters; rules that
only make sense between blanks (word length) are not asked of it, and n-grams of n words become n-grams of
ceil(1.5 n) characters.
"""

import functools
import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from itertools import islice

import numpy as np
from numpy.typing import NDArray

CHARACTERS_PER_WORD = 1.5
HAN = "\u3005\u3007\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U000323af"
_LAST_HAN = 0x323AF
KANA = "\u3040-\u30ff\u31f0-\u31ff\uff66-\uff9f"

# . ! ? and " are those of Raffel et al. 2020; the others are what ends a sentence or a quotation in Chinese, Japanese,
# and in typeset text.
TERMINAL = (".", "!", "?", '"', "。", "！", "？", "；", "…", "”", "’", "」", "』", "》", "．")
_SENTENCE_END = re.compile(r"""[.!?。！？．]+(?:(?<=[。！？．])|["'”’)\]]*(?=\s|\Z))""")
_LONG = 200  # characters from which looking them up in a table is faster than a pattern
_UNSPACED = re.compile(f"[{HAN}{KANA}]+")
# Punctuation between Han characters is no word of its own.
_UNSPACED_OR_MARK = re.compile(
    f"[{HAN}{KANA}\u3000-\u3004\u3006\u3008-\u303f\uff01-\uff0f\uff1a-\uff20\uff3b-\uff40"
    "\uff5b-\uff65\u2010-\u2027\u00b7]+"
)


@dataclass(frozen=True, slots=True)
class Words:
    """The words of a text: `spaced` stand between blanks, `num_unspaced` characters are of scripts without blanks."""

    spaced: list[str]
    num_unspaced: int

    @property
    def count(self) -> float:
        """Number of words."""
        return len(self.spaced) + self.num_unspaced / CHARACTERS_PER_WORD

    @property
    def is_unspaced(self) -> bool:
        """Whether at least half of the words are written without blanks."""
        return self.num_unspaced > 0 and self.num_unspaced / CHARACTERS_PER_WORD >= len(self.spaced)


class View:
    """A text as words and lines: each is worked out when a step first asks for it, and is there for the others."""

    def __init__(self, text: str):
        self.text = text

    @cached_property
    def words(self) -> Words:
        """The words of the text."""
        return split_words(self.text)

    @cached_property
    def lines(self) -> list[str]:
        """The lines that are not blank, without blanks at both ends."""
        return filled_lines(self.text)

    @cached_property
    def repeated_lines(self) -> tuple[float, int]:
        """See `share_of_repeats`."""
        return share_of_repeats(self.lines)


def split_words(text: str) -> Words:
    """The words of a text, or of a line."""
    if text.isascii() or not (num_unspaced := count_unspaced(text)):
        return Words(text.split(), 0)
    return Words(_UNSPACED_OR_MARK.sub(" ", text).split(), num_unspaced)


def count_unspaced(text: str) -> int:
    """Number of Han and kana characters."""
    if len(text) < _LONG:
        return sum(map(len, _UNSPACED.findall(text)))
    table = _unspaced_by_code_point()
    code_points = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), "<u4")
    return int(np.count_nonzero(table[np.minimum(code_points, len(table) - 1)]))


@functools.cache
def _unspaced_by_code_point() -> NDArray[np.bool_]:
    """Whether each code point up to the last Han character, and one beyond it, is Han or kana."""
    table = np.zeros(_LAST_HAN + 2, np.bool_)
    for run in _UNSPACED.finditer("".join(map(chr, range(len(table))))):
        table[slice(*run.span())] = True
    return table


def count_sentences(text: str, at_most: int) -> int:
    """Number of sentence ends, . ! ? before a blank and 。！？ anywhere; counting stops at `at_most`."""
    return sum(1 for _ in islice(_SENTENCE_END.finditer(text), at_most))


def filled_lines(text: str) -> list[str]:
    """The lines that are not blank, without blanks at both ends."""
    return [line for line in map(str.strip, text.split("\n")) if line]


def spans_around(matches: Iterable[re.Match[str]] | Iterable[re.Match[bytes]], reach: int) -> list[tuple[int, int]]:
    """The parts of a text around what a pattern finds, `reach` characters to both sides, apart from each other."""
    spans: list[tuple[int, int]] = []
    for match in matches:
        start, end = max(0, match.start() - reach), match.end() + reach
        if spans and start <= spans[-1][1]:
            spans[-1] = (spans[-1][0], end)
        else:
            spans.append((start, end))
    return spans


def share_of_repeats(parts: list[str]) -> tuple[float, int]:
    """Share of `parts` that stood before, and the number of their characters; a first occurrence is no repeat."""
    distinct = set(parts)
    if len(distinct) == len(parts):
        return 0.0, 0
    return 1 - len(distinct) / len(parts), sum(map(len, parts)) - sum(map(len, distinct))
