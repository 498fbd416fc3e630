"""Words, sentences and lines of text in any script, as the published quality rules count them.

Rules written for English count words between blanks. Chinese and Japanese write none, so every Han character and kana
counts as 1 / 1.5 of a word: Chinese words have about 1.5 characters in running text, and thresholds in words then mean
the same amount of text. A document is *unspaced* when at least half of its words come from such characters; rules that
only make sense between blanks (word length) are not asked of it, and n-grams of n words become n-grams of
ceil(1.5 n) characters.
"""

import re
from dataclasses import dataclass
from itertools import islice

CHARACTERS_PER_WORD = 1.5
HAN = "\u3005\u3007\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U000323af"
KANA = "\u3040-\u30ff\u31f0-\u31ff\uff66-\uff9f"

# . ! ? and " are those of Raffel et al. 2020; the others are what ends a sentence or a quotation in Chinese, Japanese,
# and in typeset text.
TERMINAL = (".", "!", "?", '"', "。", "！", "？", "；", "…", "”", "’", "」", "』", "》", "．")
_SENTENCE_END = re.compile(r"""[.!?。！？．]+(?:(?<=[。！？．])|["'”’)\]]*(?=\s|\Z))""")
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


def split_words(text: str) -> Words:
    """The words of a text, or of a line."""
    if text.isascii() or not (num_unspaced := count_unspaced(text)):
        return Words(text.split(), 0)
    return Words(_UNSPACED_OR_MARK.sub(" ", text).split(), num_unspaced)


def count_unspaced(text: str) -> int:
    """Number of Han and kana characters."""
    return sum(map(len, _UNSPACED.findall(text)))


def count_sentences(text: str, at_most: int) -> int:
    """Number of sentence ends, . ! ? before a blank and 。！？ anywhere; counting stops at `at_most`."""
    return sum(1 for _ in islice(_SENTENCE_END.finditer(text), at_most))


def filled_lines(text: str) -> list[str]:
    """The lines that are not blank, without blanks at both ends."""
    return [line for line in map(str.strip, text.split("\n")) if line]


def share_of_repeats(parts: list[str]) -> tuple[float, int]:
    """Share of `parts` that stood before, and the number of their characters; a first occurrence is no repeat."""
    distinct = set(parts)
    if len(distinct) == len(parts):
        return 0.0, 0
    return 1 - len(distinct) / len(parts), sum(map(len, parts)) - sum(map(len, distinct))
