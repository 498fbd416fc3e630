"""The rules that FineWeb adds to Gopher's and C4's: Penedo et al. 2024, "The FineWeb Datasets", 3.6."""

from collections import Counter
from dataclasses import dataclass

from .step import Dropped, require_share
from .words import TERMINAL, View


@dataclass(frozen=True, kw_only=True)
class FineWeb:
    """Drops lists and menus: few lines with punctuation, many short lines, repeated lines, many newlines.

    Defaults are the paper's; its program (datatrove) drops at 0.01 duplicate characters where the paper says 0.1, and
    has the newline rule besides. A line without blanks is short below `short_unspaced_line_length`: 30 English
    characters are about five words, as are 8 Han characters.
    """

    min_lines_with_punctuation: float = 0.12
    max_short_lines: float = 0.67
    short_line_length: int = 30
    short_unspaced_line_length: int = 8
    max_duplicate_line_characters: float = 0.1
    max_newlines_per_word: float = 0.3

    def __post_init__(self) -> None:
        require_share(self, "min_lines_with_punctuation", "max_short_lines", "max_duplicate_line_characters")

    def apply(self, view: View, language: str, counts: Counter[str]) -> str | Dropped:
        """The same text, or why it goes."""
        lines = view.lines
        if sum(line.endswith(TERMINAL) for line in lines) < self.min_lines_with_punctuation * len(lines):
            return Dropped("lines without punctuation")
        short = self.short_unspaced_line_length if view.words.is_unspaced else self.short_line_length
        if sum(len(line) <= short for line in lines) > self.max_short_lines * len(lines):
            return Dropped("short lines")
        if view.repeated_lines[1] > self.max_duplicate_line_characters * len(view.text):
            return Dropped("duplicate lines")
        if view.text.count("\n") > self.max_newlines_per_word * view.words.count:
            return Dropped("newlines")
        return view.text
