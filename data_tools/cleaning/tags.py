"""Names of HTML elements by what they do to text, and patterns of their tags."""

import re

NOT_TEXT = (
    "script", "style", "noscript", "template", "svg", "math", "iframe", "object", "canvas", "audio", "video",
)  # fmt: skip
PARAGRAPHS = (
    "p", "h1", "h2", "h3", "h4", "h5", "h6", "blockquote", "pre", "table", "ul", "ol", "dl", "hr", "article",
    "section", "header", "footer", "nav", "aside", "main", "form", "figure",
)  # fmt: skip
LINES = (
    "div", "li", "tr", "dt", "dd", "address", "figcaption", "fieldset", "option", "details", "summary", "caption",
    "center", "legend", "optgroup", "search", "hgroup", "menu", "dialog", "title",
)  # fmt: skip
CELLS = ("td", "th", "tbody", "thead", "tfoot")
INLINE = (
    "a", "abbr", "acronym", "b", "bdi", "bdo", "big", "button", "cite", "code", "data", "del", "dfn", "em", "font",
    "i", "img", "input", "ins", "kbd", "label", "mark", "q", "rp", "rt", "ruby", "s", "samp", "select", "small",
    "span", "strike", "strong", "sub", "sup", "textarea", "time", "tt", "u", "var", "wbr",
)  # fmt: skip
DOCUMENT = ("html", "head", "body")
PAGE_PARTS = (*DOCUMENT, *CELLS, "br", "meta", "link", "frameset")
# Those that the next of their kind closes, or whatever holds them.
CLOSED_SILENTLY = (
    "p", "li", "dt", "dd", "td", "th", "tr", "tbody", "thead", "tfoot", "option", "optgroup", "rp", "rt",
)  # fmt: skip
VOID = (
    "area", "base", "br", "col", "embed", "hr", "img", "input", "link", "meta", "param", "source", "track", "wbr",
)  # fmt: skip

BLOCKS = "|".join((*PARAGRAPHS, *LINES, *CELLS))
REST = r"(?:[\s/][^<>]*+)?>"  # of a tag, after its name
# Attributes as they are really written, so that `if (a<b && c>d)` has none. Possessive: nothing is read twice.
_VALUE = r"""(?:"[^"]*+"|'[^']*+'|[^\s"'<>=`]++)"""
_ATTRIBUTES = rf"(?:\s++[A-Za-z_:@][\w:.@-]*+(?:\s*+=\s*+{_VALUE})?+)*+\s*+"
WRITTEN_TAG = re.compile(
    rf"<(?P<end>/?)(?P<name>{'|'.join((*INLINE, *NOT_TEXT, *VOID))}|{BLOCKS})(?P<attributes>{_ATTRIBUTES})/?>",
    re.IGNORECASE,
)
