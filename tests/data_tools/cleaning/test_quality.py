import random
from collections import Counter

import numpy as np
import pytest

from megalite.data_tools.cleaning.repetition import _sorted_pairs
from megalite.data_tools.cleaning.words import (
    count_sentences,
    count_unspaced,
    filled_lines,
    share_of_repeats,
    split_words,
)
from tests.data_tools.cleaning.steps import CHINESE, ENGLISH, reason, run

# Words --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "spaced", "unspaced", "is_unspaced"),
    [
        ("two words, three", ["two", "words,", "three"], 0, False),
        ("café naïve", ["café", "naïve"], 0, False),
        ("春眠不覺曉，處處聞啼鳥。", [], 10, True),
        ("今天我们用 PyTorch 的 DataLoader。", ["PyTorch", "DataLoader"], 6, True),
        ("the word 猫 means cat", ["the", "word", "means", "cat"], 1, False),
        ("こんにちは、世界", [], 7, True),
        ("안녕 세상", ["안녕", "세상"], 0, False),
        ("", [], 0, False),
    ],
)
def test_words(text, spaced, unspaced, is_unspaced):
    words = split_words(text)
    assert (words.spaced, words.num_unspaced, words.is_unspaced) == (spaced, unspaced, is_unspaced)
    assert words.count == len(spaced) + unspaced / 1.5


def test_characters_of_long_texts_are_counted_as_those_of_short_ones():
    everything = "".join(map(chr, (*range(0xD800), *range(0xE000, 0x33000))))
    assert count_unspaced(everything) == sum(count_unspaced(everything[i : i + 99]) for i in range(0, 0x33000, 99))
    assert count_unspaced(everything) > 90_000
    assert count_unspaced("\U0010ffff\U000323af" * 200) == 200


def test_sentences():
    assert count_sentences('One. "Two!" Three 1.5 e.g.x (Four?) 一。二！？三', 99) == 5
    assert count_sentences("a. " * 50, 3) == 3


# Documents that every rule lets through, and one for each rule that it does not --------------------------------------

GOOD = {"en": ENGLISH, "zh": CHINESE, "zh-Hant": CHINESE.replace("来", "來").replace("个", "個")}


@pytest.mark.parametrize("name", ["gopher_quality", "gopher_repetition", "c4", "fineweb", "code_quality"])
@pytest.mark.parametrize("language", GOOD)
def test_prose_passes(name, language):
    options = {"max_mean_line_length": 999} if name == "code_quality" else {}
    text = (
        GOOD[language]
        if name != "c4" or language != "en"
        else ENGLISH.replace("\n\n", "|").replace("\n", " ").replace("|", "\n\n")
    )
    assert reason(text, name, **options) is None
    assert reason(text, name, language=language, **options) is None


def words_of(text: str, count: int) -> str:
    return " ".join(text.split()[:count]) if text.isascii() else text.replace("\n", "")[: int(count * 1.5)]


@pytest.mark.parametrize("text", [ENGLISH, CHINESE])
@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (lambda text: words_of(text, 40), "too few words"),
        (lambda text: text * 1400, "too many words"),
        (lambda text: text + "#" * 40, "too many number signs"),
        (lambda text: text + "..." + "… a " * 40, "too many ellipses"),
        (lambda text: "\n".join("• " + text for text in text.split("\n")), "too many bullet lines"),
        (
            lambda text: "\n".join(f"{line[:20]}…" for line in filled_lines(text * 4)),
            "too many lines end in an ellipsis",
        ),
        (lambda text: text + "1234 5678.9 ----- " * 60, "too few alphabetic words"),
    ],
)
def test_gopher_quality(text, make, expected):
    options = {"max_symbol_ratio": 0.5} if "ellipsis" in expected else {}
    assert reason(make(text), "gopher_quality", **options) == expected


def test_word_length_is_not_asked_of_chinese():
    assert reason("a b c d e f " * 20, "gopher_quality") == "words too short"
    assert reason("incomprehensibilities " * 60, "gopher_quality") == "words too long"
    assert reason(CHINESE, "gopher_quality", min_mean_word_length=3.5) is None


def test_stop_words():
    latin = "lorem ipsum dolor sit amet consectetur adipiscing elit " * 8
    assert reason(latin, "gopher_quality") == "too few stop words"
    assert reason(latin, "gopher_quality", language="la") is None, "there is no list for Latin"
    assert reason(latin, "gopher_quality", language="la", stop_words=["et", "non"]) == "too few stop words"
    assert reason(latin, "gopher_quality", language="la", stop_words=["sit", "elit"]) is None
    assert reason(ENGLISH.upper(), "gopher_quality") is None
    nouns = "春江花月夜山水雲霞松柏梅蘭竹菊風雨雪霜" * 8
    assert reason(nouns, "gopher_quality") == "too few stop words"
    assert reason(nouns, "gopher_quality", language="zh") == "too few stop words"
    assert reason(nouns, "gopher_quality", language="ja") is None
    assert reason(nouns, "gopher_quality", min_stop_words=0) is None


# Repetition ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("\n".join([*(f"this is line {i}" for i in range(7)), *["same"] * 5]), "duplicate lines"),
        ("\n".join([*(f"{i}" for i in range(9)), *["the same long line again"] * 2]), "characters in duplicate lines"),
        ("\n\n".join(f"p{i}\nq{i}" for i in (1, 2, 3, 4, 4, 4)), "duplicate paragraphs"),
        ("the cat " * 30, "top 2-gram"),
        ("猫狗" * 30, "top 2-gram"),
    ],
)
def test_gopher_repetition(text, expected):
    options = {"max_duplicate_lines": 1.0, "max_duplicate_line_characters": 1.0} if "paragraph" in expected else {}
    assert reason(text, "gopher_repetition", **options) == expected


def test_a_repeated_passage():
    passage = "the tired patience of someone who has come"
    assert reason(ENGLISH + f" {passage}" * 3, "gopher_repetition") in [f"duplicate {n}-grams" for n in range(5, 9)]
    assert reason(CHINESE + "走廊里的男人夹着一个小木盒子" * 4, "gopher_repetition", top_ngrams=[1, 1, 1]) is not None
    once = (0.0,) * 6
    assert (
        reason("a b c d e f g h a b c d x e f g h", "gopher_repetition", duplicate_ngrams=once, top_ngrams=[1, 1, 1])
        is None
    )
    assert (
        reason("a b c d e f g h a b c d e", "gopher_repetition", duplicate_ngrams=once, top_ngrams=[1, 1, 1])
        == "duplicate 5-grams"
    )


def repeated_ngrams(words: list[str], top: tuple, duplicate: tuple) -> str | None:
    """The rules by their definition, n-gram by n-gram."""
    total = sum(map(len, words))
    for n in range(2, 11):
        grams = [tuple(words[i : i + n]) for i in range(len(words) - n + 1)]
        often = Counter(grams)
        most = max(often.values(), default=0)
        if n <= 4 and most > 1:
            longest = max(sum(map(len, gram)) for gram, times in often.items() if times == most)
            if longest * most > top[n - 2] * total:
                return f"top {n}-gram"
        if n >= 5:
            seen, covered = set(), set()
            for i, gram in enumerate(grams):
                covered |= set(range(i, i + n)) if gram in seen else set()
                seen.add(gram)
            if sum(len(words[i]) for i in covered) > duplicate[n - 5] * total:
                return f"duplicate {n}-grams"
    return None


def test_repeated_ngrams_are_those_of_the_definition():
    rng = random.Random(5)
    reasons = Counter()
    for _ in range(500):
        vocabulary = ["a", "bb", "ccc", "dddd", "é", "ffffff", *(f"w{i}" for i in range(rng.choice((0, 20, 200))))]
        words = rng.choices(vocabulary, k=rng.randrange(1, 90))
        if rng.random() < 0.5:
            at, size = rng.randrange(len(words)), rng.randrange(5, 15)
            words += [*words[at : at + size], "end", *words[at : at + size]]
        top = tuple(rng.uniform(0.1, 0.9) for _ in range(3))
        duplicate = tuple(rng.uniform(0, 0.9) for _ in range(6))
        expected = repeated_ngrams(words, top, duplicate)
        free = dict(max_duplicate_lines=1, max_duplicate_line_characters=1, max_duplicate_paragraphs=1)
        got = reason(
            " ".join(words), "gopher_repetition", top_ngrams=list(top), duplicate_ngrams=list(duplicate), **free
        )
        assert got == expected, words
        reasons[got] += 1
    assert len(reasons) == 10, "each of the nine rules, and none"


@pytest.mark.parametrize("largest", [9, 2**61])
def test_sorted_pairs(largest):
    """By key, then by position, whether or not both fit in one number."""
    rng = np.random.default_rng(0)
    keys = rng.integers(0, 10, 300) * (largest // 9)
    expected = sorted(zip(keys.tolist(), range(300), strict=True))
    got = _sorted_pairs(keys, np.arange(300), 300)
    assert list(zip(*(part.tolist() for part in got), strict=True)) == expected


def test_shares_of_repeats():
    assert share_of_repeats(["a", "bb", "a", "a", "bb"]) == (0.6, 4)
    assert share_of_repeats(["a", "b"]) == (0.0, 0)
    assert share_of_repeats([]) == (0.0, 0)


# C4 ------------------------------------------------------------------------------------------------------------------

KEPT = "This line is long enough to stay.\nSo is this other line here!\nIs the third line not, too?"
KEPT_ZH = "这一行足够长，应该留下来。\n这也是足够长的一行吧！\n第三行难道不是这样的吗？"


@pytest.mark.parametrize(("kept", "good_end"), [(KEPT, "."), (KEPT_ZH, "。")])
@pytest.mark.parametrize(
    ("line", "count"),
    [
        ("A line without an end that is long enough", "lines without terminal punctuation"),
        ("这一行没有结束的标点符号所以不要", "lines without terminal punctuation"),
        ("This line trails off and off and off...", "lines without terminal punctuation"),
        ("Too short.", "lines without enough words"),
        ("太短了。", "lines without enough words"),
        ("Please enable JavaScript to see this nice page.", "lines with javascript"),
        ("We have a Cookie Policy that you must read.", "lines with cookie policy"),
        (f"There is one very {'long' * 300} word in this line.", "lines with a long word"),
    ],
)
def test_lines_of_c4(kept, good_end, line, count):
    first, rest = kept.split("\n", 1)
    result, counts = run(f"{first}\n{line}\n{rest}", "c4")
    assert result == kept
    assert counts == {f"c4: {count}": 1, "c4: changed": 1}
    assert run(kept, "c4") == (kept, {})


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (KEPT + "\nfunction() { return }", "curly bracket"),
        (KEPT + "\nLorem ipsum dolor sit amet is here.", "lorem ipsum"),
        (KEPT.rsplit("\n", 1)[0], "too few sentences"),
        (KEPT_ZH.rsplit("\n", 1)[0], "too few sentences"),
        ("just\nmenus\nhere", "nothing left"),
    ],
)
def test_documents_of_c4(text, expected):
    assert reason(text, "c4", **({"min_sentences": 0} if expected == "nothing left" else {})) == expected


def test_options_of_c4(tmp_path):
    assert run(KEPT + " [1][edit]x[citation needed]", ("c4", {"terminal_punctuation": False}))[0] == KEPT + " x"
    text = KEPT + " {x} [1]\nshort lorem ipsum\nuse cookies"
    off = ("citations", "lorem_ipsum", "curly_bracket", "policy_lines", "terminal_punctuation")
    assert run(text, ("c4", {**dict.fromkeys(off, False), "min_words_per_line": 1}))[0] == text
    words = tmp_path / "bad words.txt"
    words.write_text("# a comment\nDarn\nheck no\n坏词\n", encoding="utf-8")
    for bad in ("darn it", "Well, heck NO.", "这是坏词吗"):
        assert reason(f"{KEPT}\n{bad}", "c4", bad_words_file=str(words)) == "bad word"
    for fine in ("darning socks", "heck", "好词"):
        assert reason(f"{KEPT}\n{fine}", "c4", bad_words_file=str(words)) is None


# FineWeb and code ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("\n".join(["a line without any end to it, long enough"] * 9 + ["one."]), "lines without punctuation"),
        ("\n".join(f"short line {i}." for i in range(9)), "short lines"),
        ("\n".join(f"短行第{i}。" for i in range(9)), "short lines"),
        (ENGLISH + ENGLISH[:200], "duplicate lines"),
        (CHINESE + CHINESE[:60], "duplicate lines"),
        (
            "A long line of text it is, with an end.\n" + "\n" * 9 + "Another one of the lines of text, longer still.",
            "newlines",
        ),
    ],
)
def test_fineweb(text, expected):
    assert reason(text, "fineweb") == expected


def test_lines_of_chinese_are_short_at_another_length():
    text = "\n".join(f"这一行有十几个汉字而已第{i}行。" for i in range(9))
    assert reason(text, "fineweb", max_newlines_per_word=1.0) is None
    assert reason(text, "fineweb", short_unspaced_line_length=30) == "short lines"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("x = 1\n" * 9 + "y" * 1001, "a long line"),
        (("y" * 150 + "\n") * 3, "long lines"),
        ("+-*/ = <> {}\n" * 9 + "x", "few letters and digits"),
        ("def f(x):\n    return x\n", None),
    ],
)
def test_code(text, expected):
    assert reason(text, "code_quality") == expected


def test_code_by_the_definition():
    rng = random.Random(3)
    reasons = Counter()
    for _ in range(1000):
        lines = [
            "".join(rng.choices("ab é好+-", k=rng.randrange(rng.choice((1, 30))))) for _ in range(rng.randrange(1, 30))
        ]
        limits = {"max_line_length": rng.randrange(40), "max_mean_line_length": rng.uniform(0, 20)}
        share = rng.random()
        text = (
            "\n".join(lines)
            .replace(*rng.choice((("é", "e"), ("+", "-"))))
            .replace(*rng.choice((("好", "x"), ("+", "-"))))
        )
        if not text.strip():
            continue
        lengths = [len(line) for line in text.split("\n")]
        expected = None
        if sum(map(str.isalnum, text)) < share * len(text):
            expected = "few letters and digits"
        if sum(lengths) / len(lengths) > limits["max_mean_line_length"]:
            expected = "long lines"
        if max(lengths) > limits["max_line_length"]:
            expected = "a long line"
        assert reason(text, "code_quality", min_alphanumeric=share, **limits) == expected, text
        reasons[expected] += 1
    assert len(reasons) == 4
    assert min(reasons.values()) > 50


def test_a_step_sees_the_text_that_the_one_before_it_left():
    """What is known of a text (its lines, its words) goes when the text changes."""
    lines = [f"This is line number {i} of the page, and it is a long one." for i in range(9)]
    text = "\n".join([*lines, *["again"] * 20])
    free = {"max_duplicate_lines": 1.0, "max_duplicate_line_characters": 1.0}
    assert reason(text, "fineweb") == "short lines"
    seen = [("gopher_repetition", {**free, "top_ngrams": [1, 1, 1], "duplicate_ngrams": [1] * 6}), "c4", "fineweb"]
    assert run(text, *seen)[0] == "\n".join(lines)
