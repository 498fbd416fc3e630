import pickle
from collections import Counter

import pytest

from megalite.config.compose import compose_config, group_choices
from megalite.config.loader import load_config
from megalite.config.schema_data import CleanStepConfig, DataBuildConfig
from megalite.data_tools.cleaning import STEPS, build_cleaner
from megalite.errors import ConfigError
from tests.data_tools.cleaning.steps import CHINESE, ENGLISH, run
from tests.data_tools.corpora import texts

REQUIRED = ["input=in", "output=out", "tokenizer.path=tok"]
PRESETS = group_choices(DataBuildConfig)["clean"]


def steps_of(*overrides: str) -> tuple[CleanStepConfig, ...]:
    return compose_config("data_build", DataBuildConfig, [*REQUIRED, *overrides]).clean


def test_nothing_is_cleaned_unasked():
    assert steps_of() == ()
    counts: Counter[str] = Counter()
    for text in texts():
        assert build_cleaner(()).clean(text, "", counts) is text
    assert not counts


def test_lists_on_the_command_line():
    assert steps_of("clean=[nfc,whitespace]") == (CleanStepConfig(step="nfc"), CleanStepConfig(step="whitespace"))
    given = steps_of("clean=web", "clean=[{step:gopher_quality,options:{min_words:9}},nfc]")
    assert given == (CleanStepConfig(step="gopher_quality", options={"min_words": 9}), CleanStepConfig(step="nfc"))
    assert steps_of("clean=[]") == ()


def step(name: str, **options) -> dict:
    return {"step": name, "options": options}


@pytest.mark.parametrize(
    ("steps", "message"),
    [
        (["nfx"], r"clean\[0\]\.step: found 'nfx'.*Did you mean nfc"),
        (["nfc", [1]], r"clean\[1\]: expected a group of keys"),
        ([{"options": {}}], r"clean\[0\]\.step is required"),
        (
            ["nfc", step("gopher_quality", min_wordz=9)],
            r"clean\[1\]\.options\.min_wordz.*clean\[1\]\.options\.min_words",
        ),
        ([step("gopher_quality", min_words="x")], r"clean\[0\]\.options\.min_words: expected a whole number"),
        ([step("gopher_quality", min_words=9, max_words=1)], r"clean\[0\]\.options\.min_words: found 9"),
        ([step("gopher_quality", min_mean_word_length=99)], r"clean\[0\]\.options\.min_mean_word_length: found 99"),
        ([step("fineweb", max_short_lines=2)], r"clean\[0\]\.options\.max_short_lines: found 2.0, allowed: 0 to 1"),
        ([step("gopher_repetition", top_ngrams=[1, 2, 3])], r"clean\[0\]\.options\.top_ngrams"),
        ([step("pii", kinds=["mail"])], r"clean\[0\]\.options\.kinds\[0\]: found 'mail'.*Did you mean email"),
        ([step("pii", kinds=[])], r"clean\[0\]\.options\.kinds: name at least one"),
        ([step("whitespace", max_blank_lines=-1)], r"clean\[0\]\.options\.max_blank_lines"),
        ([step("c4", max_word_length=0)], r"clean\[0\]\.options\.max_word_length"),
        ([step("html", extractor="al")], r"clean\[0\]\.options\.extractor"),
    ],
)
def test_bad_lists(steps, message):
    values = {"input": "in", "output": "out", "tokenizer": "tok", "reader": {}, "clean": steps}
    with pytest.raises(ConfigError, match=message):
        build_cleaner(load_config(DataBuildConfig, values).clean)


def test_bad_names_on_the_command_line():
    for override, message in (
        ("clean=wbe", "clean: found 'wbe', allowed: chinese_web, code, none, web. Did you mean web?"),
        ("+clean=[nfc]", "neither added"),
        ("clean=[nfx]", r"clean\[0\]\.step"),
    ):
        with pytest.raises(ConfigError, match=message):
            steps_of(override)


@pytest.mark.parametrize("preset", PRESETS)
def test_presets(preset):
    cleaner, counts = build_cleaner(steps_of(f"clean={preset}")), Counter()
    dirty = "<p>caf&eacute; â€™tis\u200b {}</p>\n\n\n\n\n"
    for text, language in ((ENGLISH, "en"), (CHINESE, "zh")):
        page = "".join(f"<p>{' '.join(p.split())}</p>" for p in text.split("\n\n")) if "web" in preset else text
        result = cleaner.clean(page, "", counts)
        if preset == "none":
            assert result == text
        elif preset == "code":
            assert result is None or result == text.strip()
        else:
            wanted = {"web": "en", "chinese_web": "zh"}[preset]
            assert result == (
                "\n\n".join(" ".join(p.split()) for p in text.split("\n\n")) if language == wanted else None
            )
    assert preset == "none" or sum(counts.values()) > 0
    assert preset in ("none", "code") or cleaner.clean(dirty, "", counts) is None


def test_steps_run_in_order_and_are_counted():
    text = "cafe\u0301\x07 \n\n\n\n\n<b>a</b>@example.com"
    result, counts = run(text, "html", "control_characters", "nfc", "whitespace", "pii")
    assert result == "café\n\n\n<EMAIL>"
    changed = {f"{name}: changed": 1 for name in ("html", "control_characters", "nfc", "whitespace", "pii")}
    assert counts == {**changed, "pii: masked email": 1}
    # Cut first, there would be nothing to find for the second.
    assert run("<b>a</b>@example.com", "pii", "html")[0] == "a@example.com"
    assert run("x", ("gopher_quality", {}), "nfc") == (None, {"gopher_quality: dropped (too few words)": 1})


def test_a_cleaner_is_the_same_after_a_trip_to_another_process():
    options = {"language": {"keep": ["en"]}, "lines": {"patterns": ["x"]}, "urls": {"domains": ["a.b"]}}
    for name in STEPS:
        cleaner = build_cleaner([CleanStepConfig(step=name, options=options.get(name, {}))])
        first, second, third = Counter(), Counter(), Counter()
        used = [cleaner.clean(text, "", first) for text in (ENGLISH, CHINESE, *texts(6))]
        travelled = pickle.loads(pickle.dumps(cleaner))  # noqa: S301
        assert [travelled.clean(text, "", second) for text in (ENGLISH, CHINESE, *texts(6))] == used
        backwards = [cleaner.clean(text, "", third) for text in reversed((ENGLISH, CHINESE, *texts(6)))]
        assert backwards[::-1] == used, f"{name} remembers documents"
        assert first == second == third


@pytest.mark.parametrize("name", STEPS)
def test_no_step_fails_on_tricky_text(name):
    options = {
        "language": {"keep": ["en"]},
        "lines": {"patterns": ["x"]},
        "urls": {"patterns": ["x"], "action": "mask"},
    }
    cleaner, counts = build_cleaner([CleanStepConfig(step=name, options=options.get(name, {}))]), Counter()
    for text in (
        *texts(4),
        "x",
        "a" * 20_000,
        "。" * 50,
        "<",
        "&#xD800;&#0;<p>",
        "\ud7ff\ue000",
        "<p>" + "\U0010ffff" * 9,
    ):
        result = cleaner.clean(text, "", counts)
        assert result is None or (result.strip() and result.encode())
