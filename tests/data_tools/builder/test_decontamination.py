"""Documents that hold text of an evaluation set are left out."""

import random

import pytest

from megalite.config.schema_data import DecontaminateConfig
from megalite.data.format import TokenStore
from megalite.data_tools.builder.building import build_store
from megalite.data_tools.store_tools.inspection import inspect_documents
from megalite.errors import ConfigError, DataError
from tests.data_tools.corpora import HAN, build_config, make_tokenizer, write_jsonl


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return make_tokenizer(tmp_path_factory.mktemp("tokenizer"))


def sentence(rng: random.Random, words: int) -> str:
    return " ".join("".join(rng.choices("abcdefgh", k=rng.randint(3, 6))) for _ in range(words))


def build(tmp_path, tokenizer, documents, tests, **changes):
    source = write_jsonl(tmp_path / "in.jsonl", [{"text": text} for text in documents])
    given = {"input": (str(write_jsonl(tmp_path / "tests.jsonl", tests)),), "ngram": 8} | changes
    config = build_config(
        [source], tmp_path / "out", tokenizer, validation_fraction=0.0, decontaminate=DecontaminateConfig(**given)
    )
    report = build_store(config)
    store = TokenStore.open(tmp_path / "out/train/in")
    return [document.text for document in inspect_documents(store, store.num_documents)], report


def test_leaks_are_left_out(tmp_path, tokenizer):
    rng = random.Random(0)
    question, poem = sentence(rng, 20), "".join(rng.choices(HAN, k=20))
    clean = [sentence(rng, 60) for _ in range(20)]
    leaks = [
        f"{sentence(rng, 30)} {question} {sentence(rng, 5)}",
        question.upper().replace(" ", ", "),  # another case, other marks
        f"an old poem: {poem[:10]}，{poem[10:]}",
        " ".join(question.split()[3:12]),  # nine words of it
    ]
    almost = [" ".join(question.split()[:7]), f"{question[:30]} {sentence(rng, 20)}"]
    kept, report = build(tmp_path, tokenizer, clean + leaks + almost, [{"text": question}, {"text": poem}])
    assert kept == clean + almost
    assert report.dropped == {"decontamination": 4}
    assert report.stages == [("decontamination", 26, 22)]
    assert report.examples["decontamination"][0].startswith(leaks[0][:50])


def test_all_columns_that_are_named_are_looked_at(tmp_path, tokenizer):
    rng = random.Random(1)
    question, answer, clean = (sentence(rng, 20) for _ in range(3))
    tests = [{"question": question, "answer": answer}]
    kept, _ = build(tmp_path, tokenizer, [question, answer, clean], tests, text_columns=("question", "answer"))
    assert kept == [clean]


@pytest.mark.parametrize(("least", "left"), [(1, 0), (3, 0), (4, 1)])
def test_how_much_must_overlap(tmp_path, tokenizer, least, left):
    """Ten words in common are three n-grams of eight."""
    rng = random.Random(2)
    question = sentence(rng, 30)
    document = f"{' '.join(question.split()[5:15])} {sentence(rng, 30)}"
    kept, _ = build(tmp_path, tokenizer, [document, sentence(rng, 30)], [{"text": question}], min_overlap=least)
    assert len(kept) == 1 + left


def test_some_evaluation_texts_are_too_short(tmp_path, tokenizer, caplog):
    rng = random.Random(4)
    build(tmp_path, tokenizer, [sentence(rng, 20)], [{"text": sentence(rng, 20)}, {"text": "What is it?"}])
    assert "1 of 2 evaluation texts have fewer than decontaminate.ngram=8 words" in caplog.text


def test_evaluation_texts_that_are_too_short(tmp_path, tokenizer):
    with pytest.raises(ConfigError, match=r"none of 1 texts has 8 words; set a smaller decontaminate\.ngram"):
        build(tmp_path, tokenizer, ["a b c"], [{"text": "a b c"}])


def test_evaluation_files_that_are_not_there(tmp_path, tokenizer):
    with pytest.raises(DataError, match="does not exist"):
        build(tmp_path, tokenizer, ["a b c"], [{"text": "a"}], input=(str(tmp_path / "gone.jsonl"),))


@pytest.mark.parametrize("key", ["ngram", "min_overlap"])
def test_values_out_of_range(tmp_path, tokenizer, key):
    with pytest.raises(ConfigError, match=rf"decontaminate\.{key}: found 0"):
        build(tmp_path, tokenizer, ["a b c"], [{"text": "a"}], **{key: 0})
