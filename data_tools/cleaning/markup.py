"""Text out of HTML."""

import html
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from megalite.errors import DataError

from .fragments import is_page, without_tags
from .step import Dropped, require_package
from .tags import BLOCKS, CLOSED_SILENTLY, LINES, NOT_TEXT, PAGE_PARTS, PARAGRAPHS, VOID
from .words import HAN, KANA, View

if TYPE_CHECKING:
    from selectolax.lexbor import LexborNode

# Non-characters (Unicode 23.7): they mark where lines end while runs of white space become one space.
_PARAGRAPH, _LINE, _BREAK, _CELL, _SPACE, _TAB, _NEWLINE = "\ufdd0\ufdd1\ufdd2\ufdd3\ufdd4\ufdd5\ufdd6"
_MARKS = re.compile("[\ufdd0-\ufdd6]")
_PREFORMATTED = str.maketrans({"\n": _NEWLINE, " ": _SPACE, "\xa0": _SPACE, "\t": _TAB})
_LINE_END = re.compile(f"[{_PARAGRAPH}{_LINE}{_BREAK}][ {_PARAGRAPH}{_LINE}{_BREAK}]*")
_CELL_END = re.compile(f" *{_CELL} *")
# Where a line of Chinese or Japanese goes on in the next one of the source; quotation marks may be anybody's.
_UNSPACED = f"{HAN}{KANA}\u3001-\u303f\uff01-\uff65"
_WRAP = re.compile(
    rf"\n(?:(?<=[{_UNSPACED}]\n)[ \t\f\n]*+(?=[{_UNSPACED}“‘…—])|(?<=[”’…—]\n)[ \t\f\n]*+(?=[{_UNSPACED}]))"
)
_CDATA = re.compile(r"<!\[CDATA\[(.*?)\]\]>", re.DOTALL)
_PAGE_TAG = re.compile(
    rf"<(?:/?(?:{BLOCKS}|{'|'.join((*NOT_TEXT, *PAGE_PARTS))})(?:[\s/][^<>]*+)?>|!--|!\[CDATA\[|!doctype\b)",
    re.IGNORECASE,
)
_ANY_TAG = re.compile(r"<(/?)([A-Za-z][A-Za-z0-9]*+)([^<>]*+)>")
_RAW = re.compile(r"<(script|style|svg)\b", re.IGNORECASE)
_RAW_END = {name: re.compile(rf"</{name}\s*+>", re.IGNORECASE) for name in ("script", "style", "svg")}
_NEVER_OPEN = frozenset((*CLOSED_SILENTLY, *VOID))
_MANY_TAGS = 5_000
_MAX_DEPTH = 2_000  # browsers stop at 512; the parser's time grows with the square of the depth


@dataclass(frozen=True, kw_only=True)
class Html:
    """Takes the text out of documents that are HTML; others keep theirs, without the tags that stand in pairs.

    Markup, comments, scripts and styles of a page go. An inline tag never parts a word (`wo<b>rd</b>`), a block always
    does: by one newline, or a blank line around paragraphs, headings, lists and tables; cells are parted by a tab. The
    line breaks of its source mean no more than blanks, between Chinese characters nothing; those of <pre> stay. What
    came from a .html file is a page, and so is what `is_page` says. Other texts, Markdown and source code among them,
    keep their lines, and what only looks like a tag (`a<b && c>d`, `List<String>`): see `without_tags`. Entities
    (&amp;) are decoded in both, once.

    `extractor: trafilatura` (Barbaresi 2021) keeps the main content of a page, without menus and footers.
    """

    extractor: Literal["all", "trafilatura"] = "all"

    def __post_init__(self) -> None:
        require_package("selectolax", "clean")
        if self.extractor == "trafilatura":
            require_package("trafilatura", "trafilatura")

    def apply(self, view: View, language: str, counts: Counter[str]) -> str | Dropped:
        """The text without markup."""
        text = view.text
        if "<" not in text or not is_page(text):
            return without_tags(text)
        if self.extractor == "trafilatura":
            return _main_content(text)
        try:
            return html_to_text(text)
        except ValueError as error:
            return Dropped(str(error))


def html_to_text(source: str) -> str:
    """The text of a page or a fragment of HTML; see `Html`.

    Raises `ValueError` when elements are nested too deep to be read, `DataError` without the package selectolax.
    """
    try:
        from selectolax.lexbor import LexborHTMLParser
    except ModuleNotFoundError:
        raise DataError("reading HTML needs one more package: pip install 'megalite[clean]'") from None
    if source.count("<") > _MANY_TAGS and _depth(source) > _MAX_DEPTH:
        raise ValueError(f"elements nested deeper than {_MAX_DEPTH}")
    if (end := source.rfind("]]>")) >= 0 and "<![CDATA[" in source:
        source = _CDATA.sub(lambda match: html.escape(match[1]), source[: end + 3]) + source[end + 3 :]
    tree = LexborHTMLParser(_MARKS.sub("", source))
    body = tree.body
    if body is None:  # a frameset
        return ""
    body.strip_tags(list(NOT_TEXT))
    if not _PAGE_TAG.search(source):
        return str(body.text(separator=""))
    for selector, mark in ((PARAGRAPHS, _PARAGRAPH), (LINES, _LINE)):
        for node in body.css(",".join(selector)):
            node.insert_before(mark)
            node.insert_after(mark)
    for node in body.css("br"):
        node.insert_before(_BREAK)
    for node in body.css("td,th"):
        node.insert_after(_CELL)
    for node in _outermost(body, "pre,textarea"):
        node.replace_with(node.text(separator="").strip("\n").translate(_PREFORMATTED))
    text = body.text(separator="")
    text = _CELL_END.sub("\t", _one_space((text if text.isascii() else _WRAP.sub("", text)).replace("\xa0", " ")))
    # Blanks of the layout go before those of <pre> come back.
    lines = [line.strip(" \t\r\f") for line in _LINE_END.sub(_newlines, text).split("\n")]
    text = "\n".join(lines).replace(_SPACE, " ").replace(_TAB, "\t").replace(_NEWLINE, "\n")
    return "\n".join(line.rstrip() for line in text.split("\n")).strip("\n")


def _outermost(body: "LexborNode", selector: str) -> "Iterator[LexborNode]":
    """The nodes that do not stand in another one, each before what is in it."""
    inner: set[int] = set()
    for node in body.css(selector):
        if node.mem_id not in inner:
            inner.update(within.mem_id for within in node.css(selector))
            yield node


def _one_space(text: str) -> str:
    """One space for each run of white space."""
    for white in "\t\n\r\f":
        text = text.replace(white, " ")
    while "  " in text:
        text = text.replace("  ", " ")
    return text


def _newlines(match: re.Match[str]) -> str:
    return "\n\n" if _PARAGRAPH in match[0] or match[0].count(_BREAK) > 1 else "\n"


def _depth(source: str) -> int:
    """How deep elements stand in each other at most; those that are closed silently count as closed."""
    depth = deepest = 0
    for end, name, rest in _ANY_TAG.findall(_without_raw(source)):
        if name.lower() not in _NEVER_OPEN and not rest.endswith("/"):
            depth = max(0, depth - 1) if end else depth + 1
            deepest = max(deepest, depth)
    return deepest


def _without_raw(source: str) -> str:
    """The source without scripts, styles and pictures that are closed."""
    kept, place, endless = [], 0, set()
    for tag in _RAW.finditer(source):
        name = tag[1].lower()
        if tag.start() < place or name in endless:
            continue
        if (end := _RAW_END[name].search(source, tag.end())) is None:
            endless.add(name)  # nor will it be found after the next one
            continue
        kept.append(source[place : tag.start()])
        place = end.end()
    return "".join([*kept, source[place:]])


def _main_content(page: str) -> str | Dropped:
    import trafilatura

    text = trafilatura.extract(page, include_comments=False)
    return text if text else Dropped("no main content")
