"""Rules for source code: Chen et al. 2021, "Evaluating Large Language Models Trained on Code", 3.1."""

import math
import string
from collections import Counter
from dataclasses import dataclass
from itertools import islice

from .step import Dropped, require_share
from .words import View

_ALPHANUMERIC = (string.ascii_letters + string.digits).encode()


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

    def apply(self, view: View, language: str, counts: Counter[str]) -> str | Dropped:
        """The same text, or why it goes."""
        text, newlines = view.text, view.text.count("\n")
        if _has_line_above(text, self.max_line_length):
            return Dropped("a long line")
        if len(text) - newlines > self.max_mean_line_length * (newlines + 1):
            return Dropped("long lines")
        if not _has_alphanumeric(text, math.ceil(self.min_alphanumeric * len(text))):
            return Dropped("few letters and digits")
        return text


def _has_line_above(text: str, length: int) -> bool:
    """Whether a line is longer than `length`: goes from a line's start to the last that begins within reach."""
    start = 0
    while len(text) - start > length:
        end = text.rfind("\n", start, start + length + 1)
        if end < 0:
            return True
        start = end + 1
    return False


def _has_alphanumeric(text: str, number: int) -> bool:
    """Whether a text has that many letters and digits; those of ASCII are counted at once."""
    data = text.encode("ascii", "ignore")
    for part in (data[: 2 * number], data):  # the half of most files has enough
        if len(part) - len(part.translate(None, _ALPHANUMERIC)) >= number:
            return True
    return not text.isascii() and next(islice(filter(str.isalnum, text), number - 1, None), None) is not None
