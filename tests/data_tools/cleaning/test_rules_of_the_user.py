import pytest

from megalite.errors import ConfigError
from tests.data_tools.cleaning.steps import reason, run


def test_lines():
    text = "Share this page!\n\nA line of text.\n广告：买一送一\nok\nThe end."
    result, counts = run(text, ("lines", {"patterns": ["(?i)^share this", "^广告"], "min_characters": 3}))
    assert result == "\nA line of text.\nThe end."
    assert counts == {"lines: lines dropped": 3, "lines: changed": 1}
    assert run("A line.\n\nAnother.", ("lines", {"min_characters": 3})) == ("A line.\n\nAnother.", {})
    assert reason("short", "lines", min_characters=9) == "nothing left"


URLS = "see https://sub.bad.example/x?y=1, http://good.example/bad.example and www.Spam.cn，谢谢"


def test_urls(tmp_path):
    listed = tmp_path / "list"
    listed.write_text("# denied\nbad.example\n\nspam.cn\n")
    masked = "see <URL> http://good.example/bad.example and <URL>，谢谢"
    for options in ({"domains": ["Bad.example.", "spam.cn"]}, {"domains_file": str(listed)}):
        assert run(URLS, ("urls", {"action": "mask", **options})) == (masked, {"urls: masked": 2, "urls: changed": 1})
        assert run(URLS, ("urls", options)) == (None, {"urls: dropped (denied URL)": 1})
    assert run(URLS, ("urls", {"patterns": ["[?&]y="], "action": "mask"}))[0].startswith("see <URL> http://good")
    assert run(URLS, ("urls", {"domains": ["d.example", "example/x"]})) == (URLS, {}), "no part of a name is meant"
    assert run("http://a@bad.example:80/", ("urls", {"domains": ["bad.example"]}))[0] is None
    assert run("http://bad.example@good.org/", ("urls", {"domains": ["bad.example"]}))[0] is not None
    assert run("no address", ("urls", {"patterns": ["."]})) == ("no address", {})


@pytest.mark.parametrize(
    ("step", "options", "message"),
    [
        ("lines", {}, "patterns: the step needs patterns or min_characters"),
        ("lines", {"patterns": ["ok", "a(b"]}, r"patterns\[1\]: 'a\(b' is no regular expression"),
        ("urls", {}, "domains: the step needs domains, domains_file or patterns"),
        ("urls", {"domains_file": "gone"}, "domains_file: gone cannot be read"),
        ("c4", {"bad_words_file": "gone"}, "bad_words_file: gone cannot be read"),
    ],
)
def test_bad_options(step, options, message):
    with pytest.raises(ConfigError, match=rf"clean\[0\]\.options\.{message}"):
        run("", (step, options))


def test_an_empty_list_is_an_error(tmp_path):
    (tmp_path / "list").write_text("# nothing\n")
    with pytest.raises(ConfigError, match=r"domains_file: .*list holds no line"):
        run("", ("urls", {"domains_file": str(tmp_path / "list")}))
