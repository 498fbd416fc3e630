"""Text out of HTML."""

import html
import re
from collections import Counter
from dataclasses import dataclass
from typing import Literal

from megalite.errors import DataError

from .step import Dropped, require_package
from .words import View

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
_LINE_END = re.compile(f"[{_PARAGRAPH}{_LINE}{_BREAK}][ {_PARAGRAPH}{_LINE}{_BREAK}]*")
_CELL_END = re.compile(f" *{_CELL} *")
_CDATA = re.compile(r"<!\[CDATA\[(.*?)\]\]>", re.DOTALL)
_ENTITY = re.compile(r"&(?:[A-Za-z][A-Za-z0-9]{1,31}|#[0-9]{1,7}|#[xX][0-9A-Fa-f]{1,6});")


def _tags(*names: str) -> re.Pattern[str]:
    return re.compile(rf"<(?:/?(?:{'|'.join(names)})(?:[\s/][^<>]*)?>|!--|!\[CDATA\[|!doctype\b)", re.IGNORECASE)


_PAGE_TAG = _tags(*_PARAGRAPHS, *_LINES, *_NOT_TEXT, *_PAGE_PARTS)
_INLINE_TAG = _tags(*_INLINE)
# What makes a text a page: a document's own tags, or blocks that are closed, on a good part of its lines.
_DOCUMENT_TAG = re.compile(r"<(?:!doctype\s+html|html|head|body)\b[^<>]*>", re.IGNORECASE)
_BLOCK = "|".join((*_PARAGRAPHS, *_LINES, "td", "th", "tbody", "thead", "tfoot"))
_BLOCK_TAG = re.compile(rf"</?(?:{_BLOCK}|br)(?:[\s/][^<>]*)?>", re.IGNORECASE)
_CLOSED_BLOCK = re.compile(rf"</(?:{_BLOCK})\s*>|<(?:br|hr)\s*/?>|<p>", re.IGNORECASE)
_LINES_TO_A_TAG = 3
_ATTRIBUTES = r"""(?:\s+[A-Za-z_:@][\w:.@-]*(?:\s*=\s*(?:"[^"]*"|'[^']*'|[^\s"'<>=`]+))?)*\s*"""
_KNOWN_TAG = re.compile(
    rf"<(/?)({'|'.join((*_INLINE, *_NOT_TEXT))}|{_BLOCK})({_ATTRIBUTES})/?>", re.IGNORECASE
)  # fmt: skip
_VOID = {"br": "\n", "hr": "\n", "img": "", "input": "", "wbr": ""}
_COMMENT = re.compile(r"<!--.*?-->", re.DOTALL)
_ANY_TAG = re.compile(r"<(/?)([A-Za-z][A-Za-z0-9]*)([^<>]*)>")
_RAW = re.compile(r"<(script|style|svg)\b.*?</\1\s*>", re.IGNORECASE | re.DOTALL)
_NEVER_OPEN = frozenset(
    (
        "dd",
        "dt",
        "optgroup",
        "rp",
        "rt",
        "tbody",
        "tfoot",
        "th",
        "thead",
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
    """Takes the text out of documents that are HTML; others keep theirs, without the tags that stand in pairs.

    Markup, comments, scripts and styles of a page go. An inline tag never parts a word (`wo<b>rd</b>`), a block always
    does: by one newline, or a blank line around paragraphs, headings, lists and tables; cells are parted by a tab. A
    document is a page when it has <html>, <head> or <body>, or closed blocks on a third of its lines; its own line
    breaks then mean no more than blanks. Other texts, Markdown and source code among them, keep their lines, and what
    only looks like a tag (`a<b && c>d`, `List<String>`); comments, and known tags that are opened and closed, go.
    Entities (&amp;) are decoded in both.

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
        if "<" not in text:
            return _decoded(text)
        if not is_page(text):
            return _decoded(_without_pairs(text))
        if self.extractor == "trafilatura":
            return _main_content(text)
        try:
            return html_to_text(text)
        except ValueError as error:
            return Dropped(str(error))


def is_page(text: str) -> bool:
    """Whether a text is HTML, not one with a tag in it; see `Html`."""
    if _DOCUMENT_TAG.search(text):
        return True
    if not _CLOSED_BLOCK.search(text):
        return False
    lines = sum(1 for line in text.split("\n") if line.strip())
    return _LINES_TO_A_TAG * len(_BLOCK_TAG.findall(text)) >= lines


def _decoded(text: str) -> str:
    """Entities that end as they should: `&region=` is none."""
    return _ENTITY.sub(lambda match: html.unescape(match[0]), text) if "&" in text else text


def _without_pairs(text: str) -> str:
    """A text without comments, and without the known tags that are opened and closed."""
    if (end := text.rfind("-->")) >= 0:
        text = _COMMENT.sub("", text[: end + 3]) + text[end + 3 :]
    opened: dict[str, list[re.Match[str]]] = {}
    cuts: list[tuple[int, int, str]] = []
    for tag in _KNOWN_TAG.finditer(text):
        name = tag[2].lower()
        if name in _VOID:
            cuts.append((tag.start(), tag.end(), _VOID[name]))
        elif not tag[1]:
            opened.setdefault(name, []).append(tag)
        elif opened.get(name):
            first = opened[name].pop()
            if name in _NOT_TEXT:
                cuts.append((first.start(), tag.end(), ""))
            else:
                cuts += [(first.start(), first.end(), ""), (tag.start(), tag.end(), "")]
    kept, place = [], 0
    for start, stop, instead in sorted(cuts):
        if start >= place:
            kept += [text[place:start], instead]
        place = max(place, stop)
    return "".join([*kept, text[place:]])


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
    text = _CELL_END.sub("\t", _one_space(body.text(separator="").replace("\xa0", " ")))
    # Blanks of the layout go before those of <pre> come back.
    lines = [line.strip(" \t\r\f") for line in _LINE_END.sub(_newlines, text).split("\n")]
    return "\n".join(line.replace(_SPACE, " ").replace(_TAB, "\t").rstrip() for line in lines).strip("\n")


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
    for end, name, rest in _ANY_TAG.findall(_RAW.sub("", source)):
        if name.lower() not in _NEVER_OPEN and not rest.endswith("/"):
            depth = max(0, depth - 1) if end else depth + 1
            deepest = max(deepest, depth)
    return deepest


def _main_content(page: str) -> str | Dropped:
    import trafilatura

    text = trafilatura.extract(page, include_comments=False)
    return text if text else Dropped("no main content")
