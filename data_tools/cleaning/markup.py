"""Text out of HTML."""

import html
import re
from collections import Counter
from dataclasses import dataclass
from typing import Literal

from megalite.errors import DataError

from .step import Dropped, require_package

_NOT_TEXT = ("script", "style", "noscript", "template", "svg", "math", "iframe", "object", "canvas", "audio", "video")
_PARAGRAPHS = (
    "p",
    "h1",
    "h2",
    "h3",
    "h4",
    "h5",
    "h6",
    "blockquote",
    "pre",
    "table",
    "ul",
    "ol",
    "dl",
    "hr",
    "article",
    "section",
    "header",
    "footer",
    "nav",
    "aside",
    "main",
    "form",
    "figure",
)
_LINES = (
    "div",
    "li",
    "tr",
    "dt",
    "dd",
    "address",
    "figcaption",
    "fieldset",
    "option",
    "details",
    "summary",
    "caption",
    "center",
    "legend",
    "optgroup",
    "search",
    "hgroup",
    "menu",
    "dialog",
    "title",
)
_INLINE = (
    "a",
    "abbr",
    "acronym",
    "b",
    "bdi",
    "bdo",
    "big",
    "button",
    "cite",
    "code",
    "data",
    "del",
    "dfn",
    "em",
    "font",
    "i",
    "img",
    "input",
    "ins",
    "kbd",
    "label",
    "mark",
    "q",
    "rp",
    "rt",
    "ruby",
    "s",
    "samp",
    "select",
    "small",
    "span",
    "strike",
    "strong",
    "sub",
    "sup",
    "textarea",
    "time",
    "tt",
    "u",
    "var",
    "wbr",
)
_PAGE_PARTS = ("html", "head", "body", "tbody", "thead", "tfoot", "td", "th", "br", "meta", "link", "frameset")

# Non-characters (Unicode 23.7): they mark where lines end while runs of white space become one space.
_PARAGRAPH, _LINE, _BREAK, _CELL, _SPACE, _TAB = "\ufdd0\ufdd1\ufdd2\ufdd3\ufdd4\ufdd5"
_MARKS = re.compile("[\ufdd0-\ufdd5]")
_WHITE = re.compile(r"[ \t\n\r\f]+")
_LINE_END = re.compile(f" *[{_PARAGRAPH}{_LINE}{_BREAK}][ {_PARAGRAPH}{_LINE}{_BREAK}]*")
_CELL_END = re.compile(f" *{_CELL} *")
_CDATA = re.compile(r"<!\[CDATA\[(.*?)\]\]>", re.DOTALL)
_ENTITY = re.compile(r"&(?:[A-Za-z][A-Za-z0-9]{1,31}|#[0-9]{1,7}|#[xX][0-9A-Fa-f]{1,6});")


def _tags(*names: str) -> re.Pattern[str]:
    return re.compile(rf"<(?:/?(?:{'|'.join(names)})(?:[\s/][^<>]*)?>|!--|!\[CDATA\[|!doctype\b)", re.IGNORECASE)


_PAGE_TAG = _tags(*_PARAGRAPHS, *_LINES, *_NOT_TEXT, *_PAGE_PARTS)
_INLINE_TAG = _tags(*_INLINE)
_ANY_TAG = re.compile(r"<(/?)([A-Za-z][A-Za-z0-9]*)")
_NEVER_OPEN = frozenset(
    (
        "area",
        "base",
        "br",
        "col",
        "embed",
        "hr",
        "img",
        "input",
        "li",
        "link",
        "meta",
        "option",
        "p",
        "param",
        "source",
        "td",
        "tr",
        "track",
        "wbr",
    )
)
_MANY_TAGS = 5_000
_MAX_DEPTH = 2_000  # browsers stop at 512; the parser's time grows with the square of the depth


@dataclass(frozen=True, kw_only=True)
class Html:
    """Takes the text out of documents that hold HTML; others keep theirs, entities (&amp;) decoded.

    Markup, comments, scripts and styles go. An inline tag never parts a word (`wo<b>rd</b>`), a block always does: by
    one newline, or a blank line around paragraphs, headings, lists and tables; cells are parted by a tab. A document is
    a page when it holds a tag of a block, and its own line breaks then mean no more than blanks; where only inline tags
    stand in plain text, its lines stay. Unknown tags alone (`List<String>`) make no HTML.

    `extractor: trafilatura` (Barbaresi 2021) keeps the main content of a page, without menus and footers.
    """

    extractor: Literal["all", "trafilatura"] = "all"

    def __post_init__(self) -> None:
        require_package("selectolax", "clean")
        if self.extractor == "trafilatura":
            require_package("trafilatura", "trafilatura")

    def apply(self, text: str, language: str, counts: Counter[str]) -> str | Dropped:
        """The text without markup."""
        if "<" in text and _PAGE_TAG.search(text):
            if self.extractor == "trafilatura":
                return _main_content(text)
        elif "<" not in text or not _INLINE_TAG.search(text):
            return html.unescape(text) if "&" in text and _ENTITY.search(text) else text
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
    if "<![CDATA[" in source:
        source = _CDATA.sub(lambda match: html.escape(match[1]), source)
    tree = LexborHTMLParser(_MARKS.sub("", source))
    body = tree.body
    if body is None:  # a frameset
        return ""
    body.strip_tags(list(_NOT_TEXT))
    if not _PAGE_TAG.search(source):
        return str(body.text(separator=""))
    for selector, mark in ((_PARAGRAPHS, _PARAGRAPH), (_LINES, _LINE)):
        for node in body.css(",".join(selector)):
            node.insert_before(mark)
            node.insert_after(mark)
    for node in body.css("br"):
        node.insert_before(_BREAK)
    for node in body.css("td,th"):
        node.insert_after(_CELL)
    for node in body.css("pre,textarea"):
        kept = node.text(separator="").translate({10: _BREAK, 32: _SPACE, 9: _TAB})
        node.replace_with(kept)
    text = _CELL_END.sub("\t", _WHITE.sub(" ", body.text(separator="").replace("\xa0", " ")))
    lines = _LINE_END.sub(_newlines, text).replace(_SPACE, " ").replace(_TAB, "\t").split("\n")
    return "\n".join([line.strip("\t\r\f") if line[:1] != " " else line.rstrip() for line in lines]).strip()


def _newlines(match: re.Match[str]) -> str:
    return "\n\n" if _PARAGRAPH in match[0] or match[0].count(_BREAK) > 1 else "\n"


def _depth(source: str) -> int:
    """How deep elements stand in each other at most; those that are closed silently count as closed."""
    depth = deepest = 0
    for end, name in _ANY_TAG.findall(source):
        if name.lower() not in _NEVER_OPEN:
            depth = max(0, depth - 1) if end else depth + 1
            deepest = max(deepest, depth)
    return deepest


def _main_content(page: str) -> str | Dropped:
    import trafilatura

    text = trafilatura.extract(page, include_comments=False)
    return text if text else Dropped("no main content")
