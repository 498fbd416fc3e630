"""Characters: mended, composed, and without those that nobody sees."""

import re
import unicodedata
from collections import Counter
from dataclasses import dataclass
from functools import cached_property

from .step import Dropped, require, require_package

# What ends a line besides \n: CR LF, CR, vertical tab, form feed, next line, line and paragraph separators.
_LINE_ENDS = re.compile("\r\n|[\r\x0b\x0c\x85\u2028\u2029]")
_CONTROLS = "\x00-\x08\x0e-\x1f\x7f-\x84\x86-\x9f\ufff9-\ufffb\ufffe\uffff"
_BOM = "\ufeff"
# Soft hyphen, Mongolian vowel separator, zero width space, word joiner and the invisible operators. The joiners U+200C
# and U+200D stay: Persian, Indic scripts and emoji are spelled with them.
_ZERO_WIDTH = "\u00ad\u180e\u200b\u2060-\u2064"
# Embeddings, overrides and isolates, which make text read otherwise than it is stored (Boucher and Anderson 2021), and
# the marks that only direct display.
_BIDI = "\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069"


def _characters_of_first_bytes() -> str:
    """What the first bytes of UTF-8 sequences become under the encodings that text is wrongly decoded with.

    Mac Roman's quotes and dashes are left out: Chinese is full of them, Cyrillic read as Mac Roman is rare.
    """
    first = bytes(range(0xC2, 0xF5))
    encodings = (
        "latin-1",
        "cp1250",
        "cp1251",
        "cp1252",
        "cp1253",
        "cp1254",
        "cp1257",
        "iso8859-2",
        "mac-roman",
        "cp437",
    )
    return "".join(sorted(set("".join(first.decode(name, "ignore") for name in encodings)) - set("–—“”‘’…")))


_FIRST_BYTES = re.compile(f"[{re.escape(_characters_of_first_bytes())}]")


@dataclass(frozen=True, kw_only=True)
class RepairUnicode:
    """Mends text that was decoded wrongly ("cafÃ©", "â€™"), line by line, with ftfy (Speer 2019).

    Only what is damage is touched: quotes, full-width forms (，！（）are Chinese), ligatures and entities stay.
    """

    def __post_init__(self) -> None:
        require_package("ftfy", "clean")

    def apply(self, text: str, language: str, counts: Counter[str]) -> str | Dropped:
        """Text of ASCII is sound, and so is what lacks the characters that damage is made of."""
        if text.isascii():
            return text
        if not _FIRST_BYTES.search(text):
            return text
        import ftfy
        from ftfy.badness import is_bad

        if is_bad(text):
            text = "\n".join(ftfy.fix_encoding(line) if is_bad(line) else line for line in text.split("\n"))
        return text


@dataclass(frozen=True, kw_only=True)
class Nfc:
    """Unicode normalisation form C: one spelling for é, and nothing lost that a reader sees (Unicode annex 15)."""

    def apply(self, text: str, language: str, counts: Counter[str]) -> str | Dropped:
        """The composed text."""
        if text.isascii() or unicodedata.is_normalized("NFC", text):
            return text
        return unicodedata.normalize("NFC", text)


@dataclass(frozen=True, kw_only=True)
class ControlCharacters:
    """Removes control characters but tab and newline, byte order marks and non-characters; every line ends in newline.

    `zero_width` removes soft hyphens and zero width spaces, `bidi` what reorders text on the screen.
    """

    zero_width: bool = True
    bidi: bool = True

    @cached_property
    def _unwanted(self) -> re.Pattern[str]:
        return re.compile(f"[{_CONTROLS}{_BOM}{_ZERO_WIDTH * self.zero_width}{_BIDI * self.bidi}]+")

    def apply(self, text: str, language: str, counts: Counter[str]) -> str | Dropped:
        """What is printable, in one look, is not searched."""
        if text.isascii() and text.replace("\n", "").replace("\t", "").isprintable():
            return text
        return self._unwanted.sub("", _LINE_ENDS.sub("\n", text))


@dataclass(frozen=True, kw_only=True)
class Whitespace:
    """Removes blanks at the ends of lines, blank lines at both ends of the text, and all but a few between lines.

    `max_blank_lines` stay side by side; `collapse_spaces` makes one space of several inside a line, indentation kept.
    """

    max_blank_lines: int = 2
    collapse_spaces: bool = False

    def __post_init__(self) -> None:
        require(self.max_blank_lines >= 0, f"max_blank_lines: found {self.max_blank_lines}, allowed: 0 or more")

    @cached_property
    def _blank_lines(self) -> re.Pattern[str]:
        return re.compile(f"\n{{{self.max_blank_lines + 2},}}")

    def apply(self, text: str, language: str, counts: Counter[str]) -> str | Dropped:
        """Linear in the text: a pattern for blanks before a newline would not be."""
        text = "\n".join([line.rstrip() for line in text.split("\n")]).strip("\n")
        if "\n" * (self.max_blank_lines + 2) in text:
            text = self._blank_lines.sub("\n" * (self.max_blank_lines + 1), text)
        if self.collapse_spaces and "  " in text:
            text = _INNER_SPACES.sub(" ", text)
        return text


_INNER_SPACES = re.compile(r"(?<=\S) {2,}")
