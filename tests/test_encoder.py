"""The fast engine gives the reference's ids, or is not used."""

import random
import weakref

import numpy as np
import pytest

from megalite.errors import ConfigError, DataError
from megalite.tokenizer import load_tokenizer
from megalite.tokenizer.encoder import Encoder
from tests.data_tools.corpora import TRICKY, make_tokenizer, texts

pytest.importorskip("gigatoken")


@pytest.fixture(scope="module")
def byte_level(tmp_path_factory):
    """A tokenizer.json of byte-level pair encoding, with a special token and one that is not."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=500, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(texts(), trainer)
    tokenizer.add_special_tokens(["<|endoftext|>", "<s>"])
    tokenizer.add_tokens([AddedToken("river", normalized=False)])
    path = tmp_path_factory.mktemp("byte_level") / "tokenizer.json"
    tokenizer.save(str(path))
    return load_tokenizer(path)


@pytest.fixture(scope="module")
def sentencepiece(tmp_path_factory):
    return load_tokenizer(make_tokenizer(tmp_path_factory.mktemp("sentencepiece")))


@pytest.mark.parametrize("kind", ["byte_level", "sentencepiece"])
def test_ids_are_those_of_the_reference(request, kind):
    tokenizer = request.getfixturevalue(kind)
    encoder = Encoder(tokenizer)
    assert encoder.engine == "gigatoken"
    rng = random.Random(0)
    noise = ["".join(chr(rng.choice((rng.randrange(1, 0xD800), rng.randrange(32, 127)))) for _ in range(200))]
    documents = ["", *texts(80), "a river of <|endoftext|>", *noise * 3, *TRICKY, "", " "]
    for batch in (documents, documents[:1], documents[5:6], [text for text in documents if "▁" not in text], []):
        ids, counts = encoder.encode(batch)
        rows = np.split(ids, np.cumsum(counts)[:-1]) if batch else []
        assert [row.tolist() for row in rows] == tokenizer.encode_batch(batch)
        assert (ids.dtype, counts.dtype) == (np.uint32, np.int64)


def test_no_engine_reads_special_or_added_tokens(byte_level):
    """`river` was added to the vocabulary, and is not marked special."""
    assert set(byte_level.special_tokens) == {"<|endoftext|>", "<s>", "river"}
    for engine in ("gigatoken", "reference"):
        encoder = Encoder(byte_level, engine)
        for token, i in byte_level.special_tokens.items():
            ids, _ = encoder.encode([token, f"a {token} b", f"a{token}{token}b"])
            assert i not in ids
            assert byte_level.decode(ids.tolist()) == f"{token}a {token} ba{token}{token}b"


def test_the_reference_by_name(byte_level):
    encoder = Encoder(byte_level, "reference")
    assert encoder.engine == "reference"
    ids, counts = encoder.encode(texts())
    again, counts_again = Encoder(byte_level, "gigatoken").encode(texts())
    assert ids.tolist() == again.tolist()
    assert counts.tolist() == counts_again.tolist()


def test_forgetting_gives_memory_back_and_changes_no_id(byte_level):
    encoder = Encoder(byte_level)
    before = encoder.encode(texts())[0].tolist()
    engine = weakref.ref(encoder._fast)
    encoder.forget()
    assert engine() is None, "the engine and its words are still there"
    assert encoder.encode(texts())[0].tolist() == before
    reference = Encoder(byte_level, "reference")
    reference.forget()  # has nothing to forget
    assert reference.encode(texts())[0].tolist() == before


def test_a_tokenizer_that_the_engine_does_not_know(tmp_path):
    tokenizer = load_tokenizer(make_tokenizer(tmp_path, 550, type="sp_unigram"))
    assert Encoder(tokenizer).engine == "reference"
    with pytest.raises(ConfigError, match=r"tokenizer\.engine: gigatoken cannot serve here: .* no pair encoding"):
        Encoder(tokenizer, "gigatoken")


def test_an_engine_that_is_wrong_from_the_start_is_not_used(byte_level, monkeypatch):
    monkeypatch.setattr(type(byte_level), "encode", lambda self, text: [1])
    assert Encoder(byte_level).engine == "reference"


def test_an_engine_that_turns_out_wrong_stops_the_build(byte_level, monkeypatch):
    encoder = Encoder(byte_level)
    monkeypatch.setattr(type(byte_level), "encode", lambda self, text: [1])
    with pytest.raises(DataError, match=r"disagree on a text of 1 characters .* tokenizer\.engine=reference"):
        encoder.encode(["a", "b"])


def test_text_that_is_not_unicode_is_refused(byte_level):
    for engine in ("auto", "reference"):
        with pytest.raises(DataError, match="not valid Unicode"):
            Encoder(byte_level, engine).encode(["\ud800"])
