"""Texts that may be HTML: whether they are, and the tags out of those that are not."""

import html
import re
from collections.abc import Iterator

from .tags import BLOCKS, CELLS, CLOSED_SILENTLY, INLINE, LINES, NOT_TEXT, PARAGRAPHS, REST, VOID, WRITTEN_TAG
from .words import filled_lines

_COMMENTS = r"(?:[\ufeff\s]++|<!--.*?-->|<\?xml\b[^<>]*+>)*+"
# <head> as the first word of a sentence has a word after it.
_DOCUMENT_HEAD = re.compile(
    rf"{_COMMENTS}<(?:!doctype\s++html\b|(?:html|head|body|frameset)(?:\s[^<>]*+)?>(?![ \t]++\w))",
    re.IGNORECASE | re.DOTALL,
)
_FIRST_TAG = re.compile(rf"{_COMMENTS}<(?:{'|'.join(INLINE)}|{BLOCKS}|br|meta|link){REST}", re.IGNORECASE | re.DOTALL)
_DOCUMENT_END = re.compile(r"</(?:html|body)\s*+>\s*+\Z", re.IGNORECASE)
_END_WITHIN = 200  # characters
_STRUCTURE = re.compile(rf"<(/?)({BLOCKS}|html|head|body){REST}", re.IGNORECASE)
# Of Markdown: a fence to its end or that of the text, code within a line, and what tells that it is Markdown.
_FENCE = re.compile(
    r"^[ \t>]*+(`{3,}+|~{3,}+)[^`\n]*+(?:\n(?:.*?^[ \t>]*+\1[`~]*+[ \t]*+$|.*+)|\Z)", re.MULTILINE | re.DOTALL
)
_CODE = re.compile(r"`(?:`[^\n]{1,500}?``|[^`\n]++`)")
_MARKDOWN = re.compile(r"^(?: {0,3}#{1,6} \S|[ \t>]*+(?:```|~~~))", re.MULTILINE)
_COMMENT = re.compile(r"<!--.*?-->", re.DOTALL)
_ENTITY = re.compile(r"&(?:[A-Za-z][A-Za-z0-9]{1,31}|#[0-9]{1,7}|#[xX][0-9A-Fa-f]{1,6});")
_STARTS_CODE = re.compile(r"[({=:\[]")
_ENDS_CODE = (";", "}", ")", "]", ">")
_NEAR = 40  # characters on a side of a tag that are looked at
# Non-characters (Unicode 23.7): a tag, a line break where words would be joined, and what is not looked at.
_MARK, _PARTED, _NOTHING = "\ufdd0\ufdd1\ufdd2"

Cut = tuple[int, int, str]


def is_page(text: str) -> bool:
    """Whether a text is HTML, and not one that has tags in it, speaks of them, or is a program that writes them.

    It is when a doctype, <html>, <head> or <body> heads it, after nothing but comments. Or when it begins with a tag,
    or ends with </html>, most of its lines have tags of blocks or stand within closed ones, and nothing in it is
    Markdown: a fence, or a heading with #. What is between backticks does not count.

    The doubtful are none: a page taken for a text keeps its words, and loses tags in pairs besides, whereas a text
    taken for a page loses all its line breaks, and `List<String>` its half.
    """
    if _DOCUMENT_HEAD.match(text):
        return True
    if not _FIRST_TAG.match(text) and not _DOCUMENT_END.search(text, max(0, len(text) - _END_WITHIN)):
        return False
    if _MARKDOWN.search(text):
        return False
    num_lines, num_loose, is_structured = _lines_outside_blocks(_COMMENT.sub("", _without_code(text)))
    return is_structured and (num_loose <= 1 or 2 * num_loose < num_lines)


def as_page(markup: str) -> str:
    """Markup for which `is_page` holds, whatever it looks like: with a doctype where it needs one."""
    return markup if is_page(markup) else f"<!doctype html>{markup}"


def without_tags(text: str) -> str:
    """A text that is no page without comments, and without the tags that are surely meant as such; entities decoded.

    Known tags that are opened and closed are; not those between backticks or in fences, and not those that a sentence
    names: "the <b> tag, closed by </b>". Of scripts, styles and pictures what is within them goes too, when it is no
    prose; else they stay whole. A tag too many does less harm than a paragraph too few.
    """
    if "<" not in text and "&" not in text:
        return text
    masked = _without_code(text)
    cuts: list[Cut] = []
    if (end := masked.rfind("-->")) >= 0:
        comments = [match.span() for match in _COMMENT.finditer(masked, 0, end + 3) if not _is_operator(match)]
        cuts += [(start, stop, "") for start, stop in comments]
        masked = _blanked(masked, comments)
    if "<" in masked:
        cuts += _cut_tags(masked)
    if "&" in masked:
        # Those that end as they should: `&region=` is none.
        cuts += [(*match.span(), html.unescape(match[0])) for match in _ENTITY.finditer(masked)]
    return _without(text, sorted(cuts)) if cuts else text


def _is_operator(comment: re.Match[str]) -> bool:
    """Whether this is n<!--m, with a word on both sides."""
    before, after = comment.string[max(0, comment.start() - 1) : comment.start()], comment.string[comment.start() + 4]
    return (before.isalnum() or before == "_") and (after.isalnum() or after == "_")


def _cut_tags(text: str) -> Iterator[Cut]:
    opened: dict[str, list[re.Match[str]]] = {}
    for tag in WRITTEN_TAG.finditer(text):
        name = tag["name"].lower()
        if name in VOID:
            yield from _cut_void(tag, name)
        elif not tag["end"]:
            opened.setdefault(name, []).append(tag)
        elif opened.get(name):
            first = opened[name].pop()
            if name in NOT_TEXT:
                opened[name].clear()  # nothing opens within a script
            if _are_named(first, tag):
                continue
            if name not in NOT_TEXT:
                instead = _PARTED if name in (*PARAGRAPHS, *LINES, *CELLS) else ""
                yield first.start(), first.end(), instead
                yield tag.start(), tag.end(), instead
            elif _is_markup(first, tag):
                yield first.start(), tag.end(), ""


def _cut_void(tag: re.Match[str], name: str) -> Iterator[Cut]:
    """<br> and <img src=…>: those that stand between blanks may be named only, and <img> alone is nothing."""
    if name in ("br", "hr"):
        around = tag.string[max(0, tag.start() - 1) : tag.start()] + tag.string[tag.end() : tag.end() + 2]
        if not (len(around) == 3 and around[0] in " \t" and around[1] in " \t" and not around[2].isspace()):
            yield tag.start(), tag.end(), "\n"
    elif name == "wbr" or tag["attributes"].strip():
        yield tag.start(), tag.end(), ""


def _are_named(first: re.Match[str], last: re.Match[str]) -> bool:
    """Whether a pair is named, as in "the <b> tag, closed by </b>": blanks within it, and words before it."""
    text = first.string
    if text[first.end()] not in " \t" or text[last.start() - 1] not in " \t":
        return False
    before = text[max(0, first.start() - _NEAR) : first.start()].rstrip(" \t")
    return bool(before) and before[-1] not in "\n>"


def _is_markup(first: re.Match[str], last: re.Match[str]) -> bool:
    """Whether a script, a style or a picture holds what it should, and no prose."""
    text, start, stop = first.string, first.end(), last.start()
    head = text[start : min(start + _NEAR, stop)].lstrip()
    tail = text[max(stop - _NEAR, start) : stop].rstrip()
    if first["name"].lower() in ("script", "style"):
        if not head and not tail:
            return bool(first["attributes"].strip())
        return tail.endswith(_ENDS_CODE) and _STARTS_CODE.search(text, start, stop) is not None
    return (not head or head[0] == "<") and (not tail or tail[-1] == ">")


def _without(text: str, cuts: list[Cut]) -> str:
    """A text without the parts that are cut, of two that overlap the first; no two words or lines become one."""
    kept: list[str] = []
    place, last = 0, "\n"
    for start, stop, instead in cuts:
        if start >= place:
            last = text[start - 1] if start > place else last
            follows = text[stop : stop + _NEAR]
            if instead == _PARTED:
                instead = "\n" if follows and not follows[0].isspace() and not last.isspace() else ""
            elif instead == "\n" and (last == "\n" or follows.lstrip(" \t")[:1] in ("", "\n")):
                instead = ""
            kept += [text[place:start], instead]
            last = (instead or last)[-1]
        place = max(place, stop)
    return "".join([*kept, text[place:]])


def _without_code(text: str) -> str:
    """A text of the same length with nothing to find in its fences, and between its backticks."""
    if "```" in text or "~~~" in text:
        text = _blanked(text, [match.span() for match in _FENCE.finditer(text)])
    return _blanked(text, [match.span() for match in _CODE.finditer(text)]) if "`" in text else text


def _blanked(text: str, spans: list[tuple[int, int]]) -> str:
    parts, place = [], 0
    for start, stop in spans:
        parts += [text[place:start], _NOTHING * (stop - start)]
        place = stop
    return "".join([*parts, text[place:]])


def _lines_outside_blocks(text: str) -> tuple[int, int, bool]:
    """Lines, those without a block or a part of one, and whether there are blocks, closed or following each other."""
    opened: dict[str, list[int]] = {}
    spans: list[tuple[int, int]] = []
    tags = list(_STRUCTURE.finditer(text))
    pairs = followed = 0
    for i, tag in enumerate(tags):
        name = tag[2].lower()
        spans.append(tag.span())
        if tag[1]:
            if opened.get(name):
                spans.append((opened[name].pop(), tag.end()))
                pairs += 1
            continue
        opened.setdefault(name, []).append(tag.start())
        if name in CLOSED_SILENTLY:
            stop = tags[i + 1].start() if i + 1 < len(tags) else len(text)
            blank = text.find("\n\n", tag.end(), stop)
            spans.append((tag.start(), stop if blank < 0 else blank))
            followed += not text[tag.end() : tag.end() + 1].isspace()
    outside, place = [], 0
    for start, stop in sorted(spans):
        if start >= place:
            outside += [text[place:start], _MARK]
        place = max(place, stop)
    outside.append(text[place:])
    num_loose = sum(1 for line in filled_lines("".join(outside)) if _MARK not in line)
    return len(filled_lines(text)), num_loose, pairs > 0 or followed > 1
