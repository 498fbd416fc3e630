import gc
import random
import sys
import time
from collections import Counter

import pytest

from megalite.data_tools.cleaning import markup
from megalite.data_tools.cleaning.markup import html_to_text
from megalite.data_tools.cleaning.words import View
from megalite.errors import ConfigError, DataError
from tests.data_tools.cleaning.steps import run

PAGES = [
    ("<p>wo<b>rd</b> and wo<span class='x'>r<i>d</i></span>s</p>", "word and words"),
    ("<p>你<b>好</b>，世<em>界</em></p>", "你好，世界"),
    ("<p>one</p><p>two</p>", "one\n\ntwo"),
    ("<div>one<div>two</div></div>three", "one\ntwo\nthree"),
    ("one<br>two<br/><br>three", "one\ntwo\n\nthree"),
    ("<h1>Title</h1>text\n  over\n lines<ul><li>a<li>b</ul>", "Title\n\ntext over lines\n\na\nb"),
    ("<table><tr><td>a</td><td>b</td></tr><tr><th>c<th>d</table>", "a\tb\nc\td"),
    ("<pre>if x:\n    y\tz\n\n</pre><p>q</p>", "if x:\n    y\tz\n\nq"),
    ("<p>a</p><pre>\n\n x = 1\n\n\n\ny =\xa0\xa02<br>z</pre><p>b</p>", "a\n\n x = 1\n\n\n\ny =  2\nz\n\nb"),
    ("<pre>a\n\n\n<pre>b\n c</pre><textarea> d</textarea></pre>e", "a\n\n\n\n\nb\n c\n\n d\n\ne"),
    ("<p>中文\n换行，\n\t<b>再</b>\n换\n“行”\n了ab\n中\nc", "中文换行，再换“行”了ab 中 c"),
    ("<p>「日本\r\n語」</p>\n<p>中\n文 字</p>한국\n어", "「日本語」\n\n中文 字\n\n한국 어"),
    ("<p>a<!-- hidden <p> --> b<script>var x = '<p>no</p>'</script><style>p{}</style></p>", "a b"),
    ("<p>a<!-- outer <!-- inner --> b", "a b"),
    ("<p>unclosed <i>tags <b>everywhere", "unclosed tags everywhere"),
    ("<p>a <![CDATA[1 < 2 & <b>x</b>]]> b</p>", "a 1 < 2 & <b>x</b> b"),
    ("<p>&lt;b&gt; &amp;amp; &#233;&#x4F60;&nbsp;&unknown; &copy</p>", "<b> &amp; é你 &unknown; ©"),
    ("<html><head><title>T</title><meta name='d' content='no'></head><body>yes</body></html>", "yes"),
    ("<p>a</p><noscript>no</noscript><svg><text>no</text></svg><template>no</template>", "a"),
    ("<frameset><frame src='a'></frameset>", ""),
    ("", ""),
]


@pytest.mark.parametrize(("page", "text"), PAGES)
def test_pages(page, text):
    assert html_to_text(page) == text


@pytest.mark.parametrize(
    "deep",
    ["<dl>" + "<dt>a<dd>b" * 3000 + "</dl>", "<table><tr>" + "<th>x" * 6000,
     "<svg>" + "<path d='x'/>" * 6000 + "</svg>", "<script>" + "x='<div>';" * 6000 + "</script>"],
    ids=["dl", "th", "svg", "script"],
)  # fmt: skip
def test_many_elements_side_by_side_are_not_deep(deep):
    text, _ = run(f"<html><body><p>told</p>{deep}</body></html>", "html")
    assert text.startswith("told")


def test_indentation_of_preformatted_text_stays():
    page = "<html><body><p>make:</p><pre>a:\n\tb\n    c\n</pre><p>end</p></body></html>"
    assert run(page, "html")[0] == "make:\n\na:\n\tb\n    c\n\nend"


def test_only_markup_is_dropped():
    for page in ("<div><p></p></div>", "<script>x()</script>", "<!-- <p>a</p> -->"):
        assert run(page, "html") == (None, {"html: dropped (nothing left)": 1})


GROWING = [
    *("<![CDATA[", "<![CDATA[a]]>", "<script x>", "<style><svg>", "<script></script>", "<aaaaaaaaaaaaa", "<"),
    *("<!-- ", "<?xml ", "<p> \n\n", "<br> x ", "中 \n", "<pre>\n a</pre>", "<li>", " \xa0"),
]


def work(text) -> float:
    """CPU time of the step in seconds."""
    gc.disable()  # what it walks over is that of the other tests
    try:
        start = time.process_time()
        markup.Html().apply(View(text), "", Counter())
        return time.process_time() - start
    finally:
        gc.enable()


@pytest.mark.parametrize("head", ["<html>", ""])
def test_work_grows_with_the_text(head):
    """Four times the text takes four times as long; it was sixteen times, and 4 s for 70 kB."""
    work("<p>warm</p>")
    for part in GROWING:
        repeats = 10_000 // len(part)
        assert work(head + part * 4 * repeats) < 10 * work(head + part * repeats) + 0.1, part


def test_only_the_outermost_of_preformatted_elements_are_read(monkeypatch):
    """Each costs as much as there is text in it."""
    from selectolax.lexbor import LexborHTMLParser

    texts = []

    class Node:
        def __init__(self, node):
            self._node = node

        def __getattr__(self, name):
            return getattr(self._node, name)

        def text(self, **options):
            texts.append(self._node.text(**options))
            return texts[-1]

    honest = markup._outermost
    monkeypatch.setattr(markup, "_outermost", lambda *options: map(Node, honest(*options)))
    assert html_to_text("<pre>" * 300 + "x " * 100).split() == ["x"] * 100
    assert len(texts) == 1
    body = LexborHTMLParser("<pre>1<pre>2</pre></pre><p><pre>3<textarea>4</textarea></pre>").body
    assert [node.text() for node in honest(body, "pre,textarea")] == ["12", "34"]


@pytest.mark.parametrize("tag", ["<div>", "<b>", "<table><tr><td>", "<ul><li>"])
def test_elements_nested_without_end_take_no_time(tag):
    page = "<body>" + tag * 10_000 + "x"
    assert run(page, "html") == (None, {"html: dropped (elements nested deeper than 2000)": 1})
    assert html_to_text("<p>a" * 9_000).count("a") == 9_000, "these are beside each other"


def test_random_markup_never_splits_or_joins_words():
    rng = random.Random(3)
    inline, block = ("b", "i", "span", "a", "em", "font"), ("p", "div", "li", "h2", "dd", "section")
    for _ in range(60):
        words = [rng.choice(("alpha", "βήτα", "春眠", "Δx")) + str(i) for i in range(8)]
        page = ""
        for word in words:
            at, tag = rng.randrange(len(word)), rng.choice(inline)
            word = f"{word[:at]}<{tag} x='1'>{word[at:]}</{tag}>"
            tag = rng.choice(block)
            page += rng.choice(
                (f"<{tag}>{word}</{tag}>", f"<{tag}>{word} ", f"{word}<br>", f"{word} \n", f"<{tag}/>{word} ")
            )
        assert html_to_text(page).split() == words, page


def test_the_main_content():
    body = "".join(
        f"<p>{f'This is a long sentence of the article, number {i}, with words. ' * 3}</p>" for i in range(9)
    )
    menu = "<nav><a href='/'>Home</a> <a href='/x'>Menu entry</a></nav>"
    page = f"<html><body>{menu}<article>{body}</article></body></html>"
    everything, main = run(page, "html")[0], run(page, ("html", {"extractor": "trafilatura"}))[0]
    assert "Menu entry" in everything
    assert "Menu entry" not in main
    assert "article, number 8" in main
    nothing = run("<div></div>", ("html", {"extractor": "trafilatura"}))
    assert nothing == (None, {"html: dropped (no main content)": 1})
    assert run("wo<b>rd</b>", ("html", {"extractor": "trafilatura"}))[0] == "word", "no page"


def test_without_the_packages(monkeypatch):
    monkeypatch.setitem(sys.modules, "trafilatura", None)
    with pytest.raises(
        ConfigError, match=r"clean\[0\]: the step html needs .* trafilatura: pip install 'megalite\[traf"
    ):
        run("", ("html", {"extractor": "trafilatura"}))
    monkeypatch.setitem(sys.modules, "selectolax", None)
    monkeypatch.setitem(sys.modules, "selectolax.lexbor", None)
    with pytest.raises(ConfigError, match=r"clean\[0\]: the step html needs one more package, selectolax"):
        run("", "html")
    with pytest.raises(DataError, match=r"pip install 'megalite\[clean\]'"):
        html_to_text("x")
