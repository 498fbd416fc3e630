"""Which texts are HTML, and what goes of those that are not."""

import random

import pytest

from megalite.data_tools.cleaning.fragments import as_page, is_page, without_tags
from tests.data_tools.cleaning.steps import CHINESE, ENGLISH, run

TUTORIAL = """\
# How to add analytics

Place the snippet in the <head> section of your page.

```cpp
std::vector<int> v;
if (a<b && c>d) return;
```

- item 1
- item 2
"""
README = """\
{head}Some text with a line
and another line.

<details>
<summary>More</summary>

```python
def f(a: List[int]) -> "<b>&amp;</b>":
    if a<b and c>d:
        return x
```

</details>

<p align="center"><img src="x.png"></p>

| a | b |
|---|---|
| 1 | 2 |
"""
WITHOUT_TAGS = README.replace("<details>", "").replace("</details>", "")
WITHOUT_TAGS = WITHOUT_TAGS.replace("<summary>More</summary>", "More").replace(
    '<p align="center"><img src="x.png"></p>', ""
)
HEADS = ["# Title\n\n", '<h1 align="center">Title</h1>\n\n', '<p align="center">\n  <a href="x">Title</a>\n</p>\n\n']

PAGES = [
    "<p>Hello</p><p>World</p>",
    "<div>foo<span>bar</span>baz</div>",
    "<p>unclosed <b>bold <p>next",
    "<li>a<li>b",
    "<ul><li>one<li>two</ul>",
    "<dl><dt>T<dd>D</dl>",
    "<h1>T</h1>text<h2>U</h2>text2<hr>z",
    "<img alt='a picture'><p>x</p>",
    "<a href='x'>L</a>\n<p>x</p>",
    "<p>a paragraph of\nmany\nlines\nof the\nsource</p>\n<p>and\nanother</p>",
    "<p>one\nline\n\n<p>two\nlines",
    "<!-- made by hand -->\n<table><tr><td>a</table>",
    "<html>x",
    "\ufeff<!DOCTYPE html>\n<title>x</title>",
    "<?xml version='1.0'?>\n<!-- <p> -->\n<!DOCTYPE html PUBLIC '-//W3C//DTD XHTML 1.0'>\nx\ny",
    '<body class="x">\nplain text line\nplain text line',
    "<head>\n<title>x</title></head>",
    "<frameset><frame src=a></frameset>",
    "HTTP/1.1 200 OK\nServer: x\n\n<html>\n<body>\n<p>one</p>\n# two\n</body>\n</html>\n".replace("# ", "- "),
    "<html><pre>\n```\n# not Markdown\n```\n</pre></html>",
]
TEXTS = [
    "",
    "<br>",
    ENGLISH,
    CHINESE,
    TUTORIAL,
    *(README.format(head=head) for head in HEADS),
    "def page():\n    return '<html>' + body() + '</html>'\n\nfor i in range(3):\n    print(i<4, List<String>)\n",
    'PAGE = """\n<html>\n<body>{}</body>\n</html>\n"""\nprint(PAGE.format(1))\n',
    "<head> is the first element of a page.\nThe second is <body>.\n",
    "The <p> tag marks a paragraph.",
    "<p> marks a paragraph.\n<div> does not.\nThey differ.",
    "<div> and </div> part a page,\nand <p> and </p>\ndo so\ntoo.\nSee?\nNo.",
    "We say a <p> b. if a<p>b then c>d\nx = vector<int>()\n",
    "x <- c(1,2)\ny <br> z\nList<String> a; Map<K,V> b;\n",
    "```html\n<div>\n  <p>hi</p>\n</div>\n```\n\nExplain: the code.\n",
    "<p>\n```\nx\n```\n</p>",
    "~~~\n<html>\n</html>\n~~~",
    "`<html>` begins,\n`</html>`",
    "Dear all,\n<john@x.com> wrote:\n> quoted\n> <p>hi</p>\n\nBest",
    "I <3 you </div>",
    "template <typename T, class U> struct pair { T a; U b; };\n#include <iostream>\nstd::cout << a << b >> c;\n",
]


@pytest.mark.parametrize("text", PAGES)
def test_pages(text):
    assert is_page(text)
    assert as_page(text) == text


@pytest.mark.parametrize("text", TEXTS)
def test_texts(text):
    assert not is_page(text)
    assert is_page(as_page(text))
    assert as_page(text).endswith(text)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("plain text\n\n  with lines", None),
        ("a < b, c > d, <3 and List<String> and <unk> stay", None),
        ("fish &amp; chips &lt;b&gt; &amp;lt; AT&T &c", "fish & chips <b> &lt; AT&T &c"),
        ("first line\nsecond wo<b>rd</b>\n\nthird", "first line\nsecond word\n\nthird"),
        ("first line\nsecond<br>line<br/>\nthird<br />", "first line\nsecond\nline\nthird"),
        ("x<!-- y -->z", "xz"),
        ("if (a<b && c>d) new Foo<a>();\n#include <map>\nif a <b and c> d", None),
        (
            "# Title\n\n<!-- toc -->\n\n```\nList<String> x;\n```\n\n<p align='center'>hi</p>\n\n- one\n- two",
            "# Title\n\n\n\n```\nList<String> x;\n```\n\nhi\n\n- one\n- two",
        ),
        ("a &amp; ?x=1&region=us&section=3&copy=2", "a & ?x=1&region=us&section=3&copy=2"),
        ("one\ntwo\n<script>var a = '<div>';</script>\nthree\nfour", "one\ntwo\n\nthree\nfour"),
        ("say <b>it <i>twice</b> now</i> </b> <!-- never closed", "say it twice now </b> <!-- never closed"),
        ("Intro.<p>First</p><p>Second</p> # <p>third</p>.", "Intro.\nFirst\nSecond # third\n."),
        ("Type <b> to go back, then </b>.", None),
        ("Use <a href> and </a>, <img>, <br> and <input>.", None),
        ("so <b>bold</b> it <wbr>is<img src='x'>", "so bold it is"),
        ("The <script> tag is good.\nLots of text.\nClose it with </script> always.", None),
        ("The <script>-tag is good.\nLots of text.\nClose it with</script> always.", None),
        ("see <style> a lot of\ntext\nthat <style> matters </style> end", None),
        ("The <svg>-tag, <b>bold</b></svg>-tag", "The <svg>-tag, bold</svg>-tag"),
        ("<svg><text>hi</text></svg> plain\n<style>p { x: y }</style>z", " plain\nz"),
        ("a <script src='x'></script>b <script></script>c", "a b <script></script>c"),
        ("x <script>f(1); <script>g(2);</script> y </script>", "x <script>f(1);  y </script>"),
        ("use `<!-- c -->`, `<b>x</b>`, ``<i>`</i>`` <i>y</i>", "use `<!-- c -->`, `<b>x</b>`, ``<i>`</i>`` y"),
        ("`&amp;` is &amp;", "`&amp;` is &"),
        ("> ~~~\n> <b>x</b>\n> ~~~\n<b>y</b>\n````\n```\n<b>z</b>", "> ~~~\n> <b>x</b>\n> ~~~\ny\n````\n```\n<b>z</b>"),
        ("while (n<!--m) { x--> 0 }", None),
        ("A <!-- <b> --> B</b>", "A  B</b>"),
        (TUTORIAL, None),
        *((README.format(head=head), WITHOUT_TAGS.format(head=bare)) for head, bare in zip(
            HEADS, ["# Title\n\n", "Title\n\n", "\n  Title\n\n\n"], strict=True)),
    ],
)  # fmt: skip
def test_what_is_no_page_keeps_its_lines(text, expected):
    result, counts = run(text, "html")
    assert result == (text if expected is None else expected)
    assert counts == ({} if expected is None else {"html: changed": 1})


def test_random_texts_keep_every_word_and_code():
    rng = random.Random(5)
    for _ in range(200):
        words = [rng.choice(("alpha", "βήτα", "春眠", "x<y", "a&&b")) + str(i) for i in range(12)]
        tagged = [rng.choice(("{}", "<b>{}</b>", "<p>{}</p>", "{}<br>", "<i x='1'>{}</i>")).format(w) for w in words]
        lines = "".join(word + rng.choice((" ", "\n", "\n\n")) for word in tagged)
        code = f"```\n{lines}```\n"
        assert without_tags(f"text\n{lines}").split() == ["text", *words]
        assert without_tags(f"text\n{lines}\n{code}").endswith(code)
