"""Rules for source code: Chen et al. 2021, "Evaluating Large Language Models Trained on Code", 3.1."""

from collections import Counter
from dataclasses import dataclass

from .step import Dropped, require_share


@dataclass(frozen=True, kw_only=True)
class CodeQuality:
    """Drops files that no person wrote: long lines, or few letters and digits.

    Line lengths are those of Chen et al. 2021; the share of letters and digits, which they do not give, is that of The
    Stack (Kocetkov et al. 2022).
    """

    max_mean_line_length: float = 100.0
    max_line_length: int = 1000
    min_alphanumeric: float = 0.25

    def __post_init__(self) -> None:
        require_share(self, "min_alphanumeric")

    def apply(self, text: str, language: str, counts: Counter[str]) -> str | Dropped:
        """The same text, or why it goes."""
        lengths = list(map(len, text.split("\n")))
        if max(lengths) > self.max_line_length:
            return Dropped("a long line")
        if sum(lengths) > self.max_mean_line_length * len(lengths):
            return Dropped("long lines")
        if sum(map(str.isalnum, text)) < self.min_alphanumeric * len(text):
            return Dropped("few letters and digits")
        return text
