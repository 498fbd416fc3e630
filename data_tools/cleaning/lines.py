"""Lines that go by rules of the user's."""

import re
from collections import Counter
from dataclasses import dataclass
from functools import cached_property

from .step import Dropped, require
from .words import View


@dataclass(frozen=True, kw_only=True)
class Lines:
    """Drops lines that are shorter than `min_characters`, or in which one of `patterns` is found (Python's `re`).

    Blank lines stay: they part paragraphs. `(?i)` at the head of a pattern makes it ignore case.
    """

    min_characters: int = 0
    patterns: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        require(self.min_characters > 0 or bool(self.patterns), "patterns: the step needs patterns or min_characters")
        _ = self._compiled

    @cached_property
    def _compiled(self) -> tuple[re.Pattern[str], ...]:
        return compile_patterns(self.patterns)

    def apply(self, view: View, language: str, counts: Counter[str]) -> str | Dropped:
        """The lines that are left."""
        text = view.text
        lines = text.split("\n")
        kept = [line for line in lines if not (stripped := line.strip()) or self._keeps(stripped)]
        if len(kept) == len(lines):
            return text
        counts["lines: lines dropped"] += len(lines) - len(kept)
        return "\n".join(kept)

    def _keeps(self, line: str) -> bool:
        return len(line) >= self.min_characters and not any(pattern.search(line) for pattern in self._compiled)


def compile_patterns(patterns: tuple[str, ...]) -> tuple[re.Pattern[str], ...]:
    """Compile the option `patterns`; one that is no regular expression is a `ValueError`."""
    compiled = []
    for i, pattern in enumerate(patterns):
        try:
            compiled.append(re.compile(pattern))
        except re.error as error:
            raise ValueError(f"patterns[{i}]: {pattern!r} is no regular expression: {error}") from None
    return tuple(compiled)
