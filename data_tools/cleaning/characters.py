"""Characters: mended, composed, and without those that nobody sees."""

import re
import unicodedata
from collections import Counter
from dataclasses import dataclass
from functools import cached_property

from .step import Dropped, require, require_package
from .words import View, spans_around

# What ends a line besides \n: CR LF, CR, vertical tab, form feed, next line, line and paragraph separators.
_LINE_END_CHARACTERS = "\r\x0b\x0c\x85\u2028\u2029"
_LINE_ENDS = re.compile(f"\r\n|[{_LINE_END_CHARACTERS}]")
_CONTROLS = "\x00-\x08\x0e-\x1f\x7f-\x84\x86-\x9f\ufff9-\ufffb\ufffe\uffff"
_BOM = "\ufeff"
# Soft hyphen, Mongolian vowel separator, zero width space, word joiner and the invisible operators. The joiners U+200C
# and U+200D stay: Persian, Indic scripts and emoji are spelled with them.
_ZERO_WIDTH = "\u00ad\u180e\u200b\u2060-\u2064"
# Embeddings, overrides and isolates, which make text read otherwise than it is stored (Boucher and Anderson 2021), and
# the marks that only direct display.
_BIDI = "\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069"
_SOUND_ASCII = bytes((*b"\t\n", *range(0x20, 0x7F)))
_RARE_BLANKS = "\r\x0b\x0c\x1c\x1d\x1e\x1f"  # of ASCII, besides space, \t and \n


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
# What ftfy takes for damage is up to seven characters long, one of them outside of ASCII and East Asian scripts.
_DAMAGE_NEEDS = re.compile("[^\x00-\x7f\u3000-\ud7ff\uff00-\uffef]")
_DAMAGE_LENGTH = 8


def _is_damaged(text: str) -> bool:
    """ftfy's `is_bad`, which takes 250 ns a character, asked only of what stands around characters it may be in."""
    from ftfy.badness import is_bad

    # Where a part begins is no beginning of the text, so that the text has the last word.
    parts = spans_around(_DAMAGE_NEEDS.finditer(text), _DAMAGE_LENGTH)
    return any(is_bad(text[start:end]) for start, end in parts) and is_bad(text)


@dataclass(frozen=True, kw_only=True)
class RepairUnicode:
    """Mends text that was decoded wrongly ("cafÃ©", "â€™"), line by line, with ftfy (Speer 2019).

    Only what is damage is touched: quotes, full-width forms (，！（）are Chinese), ligatures and entities stay.
    """

    def __post_init__(self) -> None:
        require_package("ftfy", "clean")

    def apply(self, view: View, language: str, counts: Counter[str]) -> str | Dropped:
        """Text of ASCII is sound, and so is what lacks the characters that damage is made of."""
        text = view.text
        if text.isascii() or not _FIRST_BYTES.search(text):
            return text
        if not _is_damaged(text):
            return text
        import ftfy

        return "\n".join(ftfy.fix_encoding(line) if _is_damaged(line) else line for line in text.split("\n"))


@dataclass(frozen=True, kw_only=True)
class Nfc:
    """Unicode normalisation form C: one spelling for é, and nothing lost that a reader sees (Unicode annex 15)."""

    def apply(self, view: View, language: str, counts: Counter[str]) -> str | Dropped:
        """The composed text."""
        text = view.text
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
    def _unwanted(self) -> str:
        return f"{_CONTROLS}{_BOM}{_ZERO_WIDTH * self.zero_width}{_BIDI * self.bidi}"

    @cached_property
    def _unwanted_runs(self) -> re.Pattern[str]:
        return re.compile(f"[{self._unwanted}]+")

    @cached_property
    def _unwanted_or_line_end(self) -> re.Pattern[str]:
        return re.compile(f"[{self._unwanted}{_LINE_END_CHARACTERS}]")

    def apply(self, view: View, language: str, counts: Counter[str]) -> str | Dropped:
        """One look tells whether there is anything to do."""
        text = view.text
        if text.isascii():
            is_sound = not text.encode().translate(None, _SOUND_ASCII)
        else:
            is_sound = not self._unwanted_or_line_end.search(text)
        return text if is_sound else self._unwanted_runs.sub("", _LINE_ENDS.sub("\n", text))


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

    def apply(self, view: View, language: str, counts: Counter[str]) -> str | Dropped:
        """Linear in the text: a pattern for blanks before a newline would not be."""
        text = view.text
        if _may_have_trailing_blanks(text):
            text = "\n".join([line.rstrip() for line in text.split("\n")])
        text = text.strip("\n")
        if "\n" * (self.max_blank_lines + 2) in text:
            text = self._blank_lines.sub("\n" * (self.max_blank_lines + 1), text)
        if self.collapse_spaces and "  " in text:
            text = _INNER_SPACES.sub(" ", text)
        return text


def _may_have_trailing_blanks(text: str) -> bool:
    """Whether a line may end in blanks; no for certain only of ASCII."""
    if not text.isascii() or text.endswith((" ", "\t")) or " \n" in text or ("\t" in text and "\t\n" in text):
        return True
    return any(map(text.__contains__, _RARE_BLANKS))


_INNER_SPACES = re.compile(r"(?<=\S) {2,}")
