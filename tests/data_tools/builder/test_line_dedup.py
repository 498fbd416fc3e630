"""Lines that stand earlier are left out, in any split of the input over files, segments and workers."""

import random

import pytest

from megalite.config.schema_data import CleanStepConfig, DedupConfig
from megalite.data.format import TokenStore
from megalite.data_tools.builder import building, line_dedup, units
from megalite.data_tools.builder import work as room
from megalite.data_tools.builder.building import build_store
from megalite.data_tools.store_tools.inspection import inspect_documents
from megalite.errors import ConfigError
from megalite.tokenizer import load_tokenizer
from tests.data_tools.builder.test_building import fork_build, stores_of
from tests.data_tools.corpora import build_config, make_tokenizer, write_jsonl


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return make_tokenizer(tmp_path_factory.mktemp("tokenizer"))


def corpus(seed: int) -> list[str]:
    """Documents of lines, some of which many have; every fifth has nothing else; short and blank lines between."""
    rng = random.Random(seed)
    common = [f"{letter * 3}: all rights are reserved by {letter}" for letter in "abcdefgh"]
    documents = []
    for number in range(60):
        own = [f"a line of document {number}, number {i}, said once" for i in range(rng.randint(1, 6))]
        shared = [rng.choice(["", "  "]) + rng.choice(common) + rng.choice(["", " "]) for _ in range(rng.randint(0, 4))]
        lines = shared + (own if number % 5 else []) + rng.choices(["", "Home", "Next"], k=2)
        rng.shuffle(lines)
        documents.append("\n".join(lines))
    return [text for text in documents if text.strip()]


def wanted(documents: list[str], min_characters: int = 20) -> list[str]:
    seen: set[str] = set()
    left = []
    for text in documents:
        lines = []
        for line in text.split("\n"):
            key = line.strip()
            if len(key) >= min_characters and key in seen:
                continue
            seen.add(key)
            lines.append(line)
        left.append("\n".join(lines))
    return [text for text in left if text.strip()]


def config_of(tmp_path, tokenizer, documents, files=3, **changes):
    size = -(-len(documents) // files)
    parts = [documents[i : i + size] for i in range(0, len(documents), size)]
    (tmp_path / "in").mkdir(exist_ok=True)
    for number, part in enumerate(parts):
        write_jsonl(tmp_path / "in" / f"{number}.jsonl", [{"text": text} for text in part])
    given = {"validation_fraction": 0.0, "dedup": DedupConfig(lines=True)} | changes
    return build_config([tmp_path / "in"], tmp_path / "out", tokenizer, **given)


def texts_of(path) -> list[str]:
    store = TokenStore.open(path / "train/in")
    return [document.text for document in inspect_documents(store, store.num_documents)]


@pytest.mark.parametrize("min_characters", [1, 20, 100])
def test_lines_that_stand_earlier_are_left_out(tmp_path, tokenizer, monkeypatch, min_characters):
    monkeypatch.setattr(line_dedup, "_RECORDS", 20)
    monkeypatch.setattr(units, "SEGMENT_BYTES", 500)
    documents = corpus(0)
    dedup = DedupConfig(lines=True, min_line_characters=min_characters)
    report = build_store(config_of(tmp_path, tokenizer, documents, dedup=dedup))
    found = texts_of(tmp_path / "out")
    assert found == wanted(documents, min_characters)
    assert report.dropped.get("lines", 0) == len(documents) - len(found)
    assert (min_characters == 100) == (found == documents)
    left_out = sum(map(len, (text.split("\n") for text in documents))) - sum(len(t.split("\n")) for t in found)
    assert report.cleaning.get("lines: left out", 0) <= left_out


def test_workers_and_kills_change_nothing(tmp_path, tokenizer, monkeypatch):
    monkeypatch.setattr(units, "SEGMENT_BYTES", 2000)
    config = config_of(tmp_path, tokenizer, corpus(1))
    build_store(config)
    whole = stores_of(tmp_path / "out")
    (tmp_path / "out").rename(tmp_path / "whole")
    rng, kills = random.Random(1), 0
    while fork_build(config, deadly=rng.randint(1, 12)):
        kills += 1
    assert kills > 3
    assert stores_of(tmp_path / "out") == whole
    (tmp_path / "out").rename(tmp_path / "killed")
    monkeypatch.undo()
    monkeypatch.setattr(room, "_TOGETHER_FILES", 1)
    build_store(config_of(tmp_path, tokenizer, corpus(1), workers=2))
    assert stores_of(tmp_path / "out") == whole


@pytest.mark.parametrize("lines", [False, True])
def test_a_file_that_changed_begins_the_work_anew(tmp_path, tokenizer, lines):
    """What is left of the other files depends on it; without `lines` they are kept."""
    config = config_of(tmp_path, tokenizer, corpus(2), dedup=DedupConfig(lines=lines))
    files = sorted((tmp_path / "in").iterdir())
    before = building._digest(config, load_tokenizer(tokenizer), files)
    files[0].write_text(files[0].read_text() + "\n")
    assert (building._digest(config, load_tokenizer(tokenizer), files) == before) == (not lines)


def test_lines_are_those_of_cleaned_text(tmp_path, tokenizer):
    """What a step drops is in no line that counts as said."""
    line = "the same line stands in both of them"
    documents = [f"{line}\nhttp://spam.example/x", f"{line}\nand more"]
    step = CleanStepConfig(step="urls", options={"domains": ["spam.example"]})
    build_store(config_of(tmp_path, tokenizer, documents, files=1, clean=(step,)))
    assert texts_of(tmp_path / "out") == [documents[1]]


def test_a_length_out_of_range(tmp_path, tokenizer):
    with pytest.raises(ConfigError, match=r"dedup\.min_line_characters: found 0"):
        build_store(config_of(tmp_path, tokenizer, ["a"], dedup=DedupConfig(lines=True, min_line_characters=0)))
