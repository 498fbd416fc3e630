import random
import sys

import pytest

from megalite.data_tools.cleaning.markup import html_to_text
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
    ("text", "expected"),
    [
        ("plain text\n\n  with lines", None),
        ("a < b, c > d, <3 and List<String> and <unk> stay", None),
        ("fish &amp; chips &lt;b&gt; AT&T &c", "fish & chips <b> AT&T &c"),
        ("first line\nsecond wo<b>rd</b>\n\nthird", "first line\nsecond word\n\nthird"),
        ("first line\nsecond<br>line", "first line second\nline"),
        ("x<!-- y -->z", "xz"),
        ("if (a<b && c>d) new Foo<a>();\n#include <map>\nif a <b and c> d", None),
        (
            "# Title\n\n<!-- toc -->\n\n```\nList<String> x;\n```\n\n<p align='center'>hi</p>\n\n- one\n- two",
            "# Title\n\n\n\n```\nList<String> x;\n```\n\nhi\n\n- one\n- two",
        ),
        ("a &amp; ?x=1&region=us&section=3&copy=2", "a & ?x=1&region=us&section=3&copy=2"),
        ("one\ntwo\n<script>var a = '<div>';</script>\nthree\nfour", "one\ntwo\n\nthree\nfour"),
        ("say <b>it <i>twice</b> now</i> </b> <!-- never closed", "say it twice now </b> <!-- never closed"),
    ],
)
def test_what_is_no_page_keeps_its_lines(text, expected):
    result, counts = run(text, "html")
    assert result == (text if expected is None else expected)
    assert counts == ({} if expected is None else {"html: changed": 1})


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
