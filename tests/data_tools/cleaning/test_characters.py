import random
import unicodedata
from collections import Counter

import ftfy
import pytest
from ftfy.badness import is_bad

from megalite.config.schema_data import CleanStepConfig
from megalite.data_tools.cleaning import build_cleaner
from megalite.data_tools.cleaning.characters import _FIRST_BYTES, _is_damaged
from tests.data_tools.cleaning.steps import CHINESE, ENGLISH, run
from tests.data_tools.corpora import TRICKY


@pytest.mark.parametrize(
    ("step", "text", "expected"),
    [
        ("repair_unicode", "a cafÃ© and itâ€™s fine\nnaïve Ünder", "a café and it’s fine\nnaïve Ünder"),
        ("repair_unicode", "ä½\xa0å¥½ sound\n世界 café", "你好 sound\n世界 café"),
        ("repair_unicode", "“你好”，（Ａ１）！ ﬁ …… &amp;", "“你好”，（Ａ１）！ ﬁ …… &amp;"),
        ("nfc", "e\u0301 \u1100\u1161 ﬁ Ａ", "é 가 ﬁ Ａ"),
        ("control_characters", "a\x00b\x1b[c\x7f\x85d\r\ne\rf\tg\u2028h\ufffe\ufeff", "ab[c\nd\ne\nf\tg\nh"),
        ("control_characters", "a\u200bb\u00adc\u202ed\u2066e\u200ff", "abcdef"),
        ("control_characters", "می\u200cخواهم 👩\u200d👧 क्\u200dष", "می\u200cخواهم 👩\u200d👧 क्\u200dष"),
        ("whitespace", "\n\n  a \t\n\u3000\n\n\n\nb\u3000\u3000\n\n\nc  d\n", "  a\n\n\nb\n\n\nc  d"),
    ],
)
def test_characters(step, text, expected):
    result, counts = run(text, step)
    assert result == expected
    assert counts == ({f"{step}: changed": 1} if expected != text else {})
    assert run(expected, step) == (expected, {}), "a step changes nothing twice"


def test_options_of_characters():
    assert run("a\u200bb\u202ec", ("control_characters", {"zero_width": False}))[0] == "a\u200bbc"
    assert run("a\u200bb\u202ec", ("control_characters", {"bidi": False}))[0] == "ab\u202ec"
    assert run("a\n\n\nb", ("whitespace", {"max_blank_lines": 0}))[0] == "a\nb"
    assert run("  a  b   c\n d", ("whitespace", {"collapse_spaces": True}))[0] == "  a b c\n d"


@pytest.mark.parametrize("text", [ENGLISH, CHINESE, "ελληνικά, русский, العربية, 한국어, ไทย", *TRICKY])
def test_sound_text_needs_no_repair(text):
    assert run(text, "repair_unicode") == (text, {})


def test_the_quick_look_misses_no_damage_of_common_kinds():
    """Whatever ftfy would mend holds a character that the step looks for."""
    rng = random.Random(0)
    for sound in (
        "café über naïve",
        "Привет, мир",
        "Ελλάδα",
        "你好世界",
        "日本語",
        "it’s “fine” — 10 €",
        "İstanbul žlutý",
    ):
        for encoding in ("latin-1", "cp1252", "cp1251", "cp1250"):
            damaged = sound.encode().decode(encoding, "replace")
            line = f"{rng.random()} {damaged}"
            if ftfy.fix_encoding(line) != line:
                assert _FIRST_BYTES.search(line), (sound, encoding)
                assert run(line, "repair_unicode")[0] == ftfy.fix_encoding(line)


def test_damage_is_what_ftfy_takes_for_damage():
    """Looking at parts of a text finds the same as looking at all of it."""
    rng = random.Random(2)
    marks = [
        c.encode().decode(name, "ignore") for c in "é’—Яж€ñ，好" for name in ("cp1252", "cp1251", "mac-roman", "cp437")
    ]
    pieces = [
        *marks,
        *"éÂÃàœŒØ×°°·“”’—½€╗ГВ\xa0\x85\ufffd",
        "ГўВЂВ",
        "a",
        "b ",
        " ",
        "\n",
        "好",
        "，",
        "ﾊ",
        "한",
        "plain words " * 3,
    ]
    found = 0
    for _ in range(2000):
        text = "".join(rng.choices(pieces, k=rng.randrange(1, 9)))
        assert _is_damaged(text) == is_bad(text), text
        found += is_bad(text)
    assert 500 < found < 1900
    # No character that is passed over can be damage by itself or with its like.
    passed_over = [chr(i) for i in (*range(0x80), *range(0x3000, 0xD800), *range(0xFF00, 0xFFF0))]
    assert not is_bad("".join(passed_over))
    for other in "aAé " + "".join(rng.choices(passed_over, k=4)):
        assert not is_bad(other.join(passed_over).replace("é", ""))


def test_every_character_is_kept_or_removed_whatever_stands_around_it():
    """Quick ways through sound text, and through ASCII, see what the slow ones see."""
    controls, whitespace = (
        build_cleaner([CleanStepConfig(step=name)]) for name in ("control_characters", "whitespace")
    )
    for character in map(chr, (*range(0x3100), 0xFEFF, 0xFFF9, 0xFFFD, 0xFFFE, 0xFFFF, 0x1F600)):
        in_ascii, in_chinese = (controls.clean(f"{a}{character}\nb", "", Counter()) for a in ("a", "é好"))
        assert in_ascii.replace("a", "é好", 1) == in_chinese, hex(ord(character))
        stripped = "a\n" if character == "\n" else f"a{character}".rstrip()
        assert whitespace.clean(f"a{character}\nb", "", Counter()) == f"{stripped}\nb", hex(ord(character))
        assert whitespace.clean(f"\na\tb{character}", "", Counter()) == f"a\tb{character}".rstrip(), hex(ord(character))


def test_composing_agrees_with_the_standard_library_on_random_characters():
    rng = random.Random(1)
    for _ in range(200):
        text = "".join(
            chr(rng.choice((0x41, 0xE9, 0x301, 0x323, 0xAC00, 0x1100, 0x1161, 0x2126, 0x4E00))) for _ in range(9)
        )
        assert run(text, "nfc")[0] == unicodedata.normalize("NFC", text)


def test_a_text_of_nothing_else_is_dropped():
    assert run("\u200b\x00\ufeff", "control_characters") == (None, {"control_characters: dropped (nothing left)": 1})
    assert run(" \n\t ", "whitespace") == (None, {"whitespace: dropped (nothing left)": 1})


def test_long_runs_take_linear_time():
    text = "x" + " " * 300_000 + "y" + "\n" * 300_000 + "z"
    assert run(text, "whitespace", "control_characters")[0] == "x" + " " * 300_000 + "y\n\n\nz"
