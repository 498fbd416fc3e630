import sys

import pytest

from megalite.data_tools.cleaning.language import LANGUAGES, _identifier, identify_language
from megalite.errors import ConfigError
from tests.data_tools.cleaning.steps import CHINESE, ENGLISH, reason

TEXTS = [
    ("en", ENGLISH),
    ("zh", CHINESE),
    ("zh", "子曰學而時習之不亦說乎有朋自遠方來不亦樂乎"),
    ("zh", "今天我们使用 PyTorch 的 DataLoader 来读取数据，然后训练模型。"),
    ("ja", "私たちは今日公園に行きました。とても楽しかったです。"),
    ("ko", "우리는 오늘 공원에 갔습니다. 정말 즐거웠어요."),
    ("de", "Der Hafen war ruhig, als das letzte Boot hereinkam, und die Männer waren schon nach Hause gegangen."),
    ("fr", "Le port était calme quand le dernier bateau est rentré, et les hommes étaient déjà chez eux."),
    ("es", "El puerto estaba tranquilo cuando llegó el último barco, y los hombres ya se habían ido a casa."),
    ("ru", "В порту было тихо, когда вернулась последняя лодка, и люди уже разошлись по домам."),
]


@pytest.mark.parametrize(("language", "text"), TEXTS)
def test_languages(language, text):
    found, confidence = identify_language(text)
    assert found == language
    assert 0.65 <= confidence <= 1
    assert reason(text, "language", keep=[language]) is None
    others = [other for other in ("en", "zh") if other != language]
    assert reason(text, "language", keep=others) == f"language {language}"


def test_the_sample_is_of_head_and_middle():
    menu = "Startseite Anmelden Warenkorb Kontakt über uns " * 3
    text = menu + ENGLISH * 3
    assert reason(text, "language", keep=["en"], sample_characters=100_000) is None
    assert reason(text, "language", keep=["de"], sample_characters=100_000) == "language en"
    assert reason(CHINESE * 2 + ENGLISH, "language", keep=["en"], sample_characters=100) == "language zh"


def test_confidence():
    assert reason("ok 12 go 7", "language", keep=list(LANGUAGES), min_confidence=1.0) == "language unsure"
    assert reason("ok 12 go 7", "language", keep=list(LANGUAGES), min_confidence=0.0) is None


def test_the_list_is_what_the_package_tells():
    assert set(LANGUAGES) == set(map(str, _identifier().labels))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, r"clean\[0\]\.options\.keep is required"),
        ({"keep": []}, r"clean\[0\]\.options\.keep: name at least one"),
        ({"keep": ["cn"]}, r"clean\[0\]\.options\.keep: 'cn' is not among .* zh "),
        ({"keep": ["en"], "sample_characters": 9}, r"clean\[0\]\.options\.sample_characters"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ConfigError, match=message):
        reason("", "language", **options)


def test_without_the_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "py3langid", None)
    with pytest.raises(ConfigError, match=r"the step language needs one more package, py3langid"):
        reason("", "language", keep=["en"])
