"""The rules of C4: Raffel et al. 2020, "Exploring the Limits of Transfer Learning", 2.2."""

import math
import re
from collections import Counter
from dataclasses import dataclass
from functools import cached_property

from .step import Dropped, read_list, require
from .words import CHARACTERS_PER_WORD, TERMINAL, View, count_sentences, count_unspaced, split_words

_CITATION = re.compile(r"\[(?:\d+|edit|citation needed)\]")
_BLANK_LINES = re.compile(r"\n{3,}")
_POLICY = ("terms of use", "privacy policy", "cookie policy", "uses cookies", "use of cookies", "use cookies")


@dataclass(frozen=True, kw_only=True)
class C4:
    """Keeps the lines that look like sentences, and the documents that have enough of them.

    Defaults are the paper's. Its list of bad words is not ours to ship: `bad_words_file` names one, a word or phrase a
    line, and a document that holds any of them is dropped. Removing repeated three-sentence spans, which the paper does
    too, is deduplication. See `words` for what a word and a terminal mark is in Chinese.
    """

    terminal_punctuation: bool = True  # a line must end in . ! ? " or their like, and not in ...
    min_words_per_line: int = 5
    min_sentences: int = 3
    max_word_length: int = 1000  # of a line's words; the authors' own program has this rule
    javascript_lines: bool = True  # drop lines that speak of Javascript
    policy_lines: bool = True  # drop lines on cookies, privacy and terms of use
    citations: bool = True  # remove [1], [edit] and [citation needed]
    lorem_ipsum: bool = True  # drop documents that hold it
    curly_bracket: bool = True  # drop documents that hold one: code
    bad_words_file: str | None = None

    def __post_init__(self) -> None:
        require(self.max_word_length >= 1, f"max_word_length: found {self.max_word_length}, allowed: 1 or more")
        _ = self._bad_words  # an unreadable file is said now

    @cached_property
    def _bad_words(self) -> tuple[frozenset[str], tuple[str, ...]]:
        """Single words, and what is looked for anywhere: phrases, and words of scripts without blanks."""
        listed = [] if self.bad_words_file is None else read_list("bad_words_file", self.bad_words_file)
        lowered = [entry.lower() for entry in listed]
        anywhere = tuple(entry for entry in lowered if " " in entry or count_unspaced(entry))
        return frozenset(lowered) - set(anywhere), anywhere

    def apply(self, view: View, language: str, counts: Counter[str]) -> str | Dropped:
        """The lines that are kept, or why none is."""
        text = view.text
        lowered = text.lower()
        if self.curly_bracket and "{" in text:
            return Dropped("curly bracket")
        if self.lorem_ipsum and "lorem ipsum" in lowered:
            return Dropped("lorem ipsum")
        if self._has_bad_word(lowered):
            return Dropped("bad word")
        if self.citations and "[" in text:
            text = _CITATION.sub("", text)
        unwanted = self._unwanted(lowered)
        spaced = not view.words.num_unspaced
        kept = []
        for line in map(str.strip, text.split("\n")):
            if line and (reason := self._fault(line, spaced, unwanted)):
                counts[f"c4: lines without {reason}" if reason in _WANTED else f"c4: lines with {reason}"] += 1
            else:
                kept.append(line)
        result = "\n".join(kept).strip("\n")
        if "\n\n\n" in result:
            result = _BLANK_LINES.sub("\n\n", result)
        if count_sentences(result, self.min_sentences) < self.min_sentences:
            return Dropped("too few sentences")
        return result

    def _has_bad_word(self, lowered: str) -> bool:
        words, anywhere = self._bad_words
        if words and not words.isdisjoint(re.findall(r"[\w'-]+", lowered)):
            return True
        return any(entry in lowered for entry in anywhere)

    def _unwanted(self, lowered: str) -> tuple[str, ...]:
        """What a line must not hold, of all that the document does."""
        wanted = ("javascript",) * self.javascript_lines + _POLICY * self.policy_lines
        return tuple(entry for entry in wanted if entry in lowered)

    def _fault(self, line: str, spaced: bool, unwanted: tuple[str, ...]) -> str:
        if self.terminal_punctuation and (not line.endswith(TERMINAL) or line.endswith("...")):
            return "terminal punctuation"
        if not _has_words(line, self.min_words_per_line, spaced):
            return "enough words"
        if len(line) > self.max_word_length and any(len(word) > self.max_word_length for word in line.split()):
            return "a long word"
        if unwanted:
            lowered = line.lower()
            return next((entry for entry in unwanted if entry in lowered), "")
        return ""


def _has_words(line: str, number: int, spaced: bool) -> bool:
    """Whether a line has that many words; `spaced`: none of its characters is of a script without blanks."""
    if spaced:
        return len(line.split(None, number)) >= number
    wanted = number * CHARACTERS_PER_WORD
    # The head of most lines has enough.
    return count_unspaced(line[: 4 * math.ceil(wanted)]) >= wanted or split_words(line).count >= number


_WANTED = ("terminal punctuation", "enough words")
