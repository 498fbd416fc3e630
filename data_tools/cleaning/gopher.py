"""The quality rules of Gopher: Rae et al. 2021, "Scaling Language Models: Methods, Analysis & Insights", A.1.1."""

from collections import Counter
from dataclasses import dataclass
from itertools import filterfalse

from .step import Dropped, require, require_share
from .words import View, Words

ENGLISH_STOP_WORDS = frozenset(("the", "be", "to", "of", "and", "that", "have", "with"))  # Rae et al. 2021
# The list of FineWeb2 for Chinese (Penedo et al. 2025, cmn_Hani), without its "·".
CHINESE_STOP_WORDS = frozenset("的年在月是和日了於為有被人中为他與後也而由")
_BULLETS = ("•", "-", "*", "‣", "·", "◦", "●", "○", "■", "◆", "▪", "※")


@dataclass(frozen=True, kw_only=True)
class GopherQuality:
    """Drops documents by the length of their words and lines, by symbols, bullets, ellipses and missing stop words.

    Defaults are the paper's. Stop words are English ones, or Chinese ones for a document without blanks; a document
    whose `language` is told and is neither is not asked for them unless `stop_words` gives some. See `words` for what
    a word is.
    """

    min_words: int = 50
    max_words: int = 100_000
    min_mean_word_length: float = 3.0  # characters; not asked of documents without blanks
    max_mean_word_length: float = 10.0
    max_symbol_ratio: float = 0.1  # number signs, and ellipses, by words
    max_bullet_lines: float = 0.9
    max_ellipsis_lines: float = 0.3
    min_alphabetic_words: float = 0.8
    min_stop_words: int = 2  # different ones
    stop_words: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        require(self.min_words <= self.max_words, f"min_words: found {self.min_words}, above max_words")
        require(
            self.min_mean_word_length <= self.max_mean_word_length,
            f"min_mean_word_length: found {self.min_mean_word_length}, above max_mean_word_length",
        )
        require_share(self, "max_bullet_lines", "max_ellipsis_lines", "min_alphabetic_words")

    def apply(self, view: View, language: str, counts: Counter[str]) -> str | Dropped:
        """The same text, or why it goes."""
        words = view.words
        if words.count < self.min_words:
            return Dropped("too few words")
        if words.count > self.max_words:
            return Dropped("too many words")
        if reason := self._bad_words(words) or self._bad_lines(view):
            return Dropped(reason)
        if self._num_stop_words(view.text, words, language) < self.min_stop_words:
            return Dropped("too few stop words")
        return view.text

    def _bad_words(self, words: Words) -> str:
        if not words.is_unspaced and words.spaced:
            mean = sum(map(len, words.spaced)) / len(words.spaced)
            if mean < self.min_mean_word_length:
                return "words too short"
            if mean > self.max_mean_word_length:
                return "words too long"
        mixed = filterfalse(str.isalpha, words.spaced)
        without = sum(not any(map(str.isalpha, word)) for word in mixed if not word[0].isalpha())
        return "too few alphabetic words" if without > (1 - self.min_alphabetic_words) * words.count else ""

    def _bad_lines(self, view: View) -> str:
        text, lines, num_words = view.text, view.lines, view.words.count
        if text.count("#") > self.max_symbol_ratio * num_words:
            return "too many number signs"
        # …… is how Chinese writes one ellipsis.
        ellipses = text.count("...") + text.count("…") - text.count("……")
        if ellipses > self.max_symbol_ratio * num_words:
            return "too many ellipses"
        if sum(line.startswith(_BULLETS) for line in lines) > self.max_bullet_lines * len(lines):
            return "too many bullet lines"
        if ellipses and sum(line.endswith(("...", "…")) for line in lines) > self.max_ellipsis_lines * len(lines):
            return "too many lines end in an ellipsis"
        return ""

    def _num_stop_words(self, text: str, words: Words, language: str) -> int:
        if self.stop_words is None and not (words.is_unspaced and language[:2] in ("", "zh")):
            if language[:2] not in ("", "en"):
                return self.min_stop_words
            wanted = ENGLISH_STOP_WORDS
        else:
            wanted = CHINESE_STOP_WORDS if self.stop_words is None else frozenset(self.stop_words)
        if words.is_unspaced:
            return sum(word in text for word in wanted)
        found = wanted.intersection(words.spaced)
        return len(found) if len(found) >= self.min_stop_words else len(wanted.intersection(text.lower().split()))
