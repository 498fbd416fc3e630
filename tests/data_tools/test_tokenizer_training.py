import hashlib
import json
import random
from dataclasses import replace
from pathlib import Path

import pytest

from megalite.config.schema_data import ReaderConfig, TokenizerConfig, TokenizerTrainConfig
from megalite.data_tools.tokenizer_training import train_tokenizer
from megalite.data_tools.tokenizer_training.sample import TrainingSample
from megalite.errors import ConfigError, DataError, ResourceError
from megalite.tokenizer import load_tokenizer
from tests.data_tools.corpora import TRICKY, chinese, english, texts, write_jsonl

COLUMNS = ReaderConfig(language_column="lang", split_column="part")


def mixed(num_english: int = 40, num_chinese: int = 120) -> list[dict[str, str]]:
    rng = random.Random(3)
    rows = [{"text": english(rng), "lang": "en", "part": "train"} for _ in range(num_english)]
    rows += [{"text": chinese(rng), "lang": "zh", "part": "train"} for _ in range(num_chinese)]
    return [*rows, {"text": "龘 only in validation 龘", "lang": "zh", "part": "validation"}]


def config(tmp_path: Path, rows=None, reader: ReaderConfig = COLUMNS, split="train", name="out", **tokenizer):
    source = write_jsonl(tmp_path / "in.jsonl", mixed() if rows is None else rows)
    return TokenizerTrainConfig(
        input=(str(source),),
        output=str(tmp_path / name),
        split=split,
        tokenizer=TokenizerConfig(**({"vocab_size": 400} | tokenizer)),
        reader=reader,
    )


def plain(tmp_path: Path, rows: list[str], **tokenizer) -> TokenizerTrainConfig:
    return config(tmp_path, [{"text": text} for text in rows], ReaderConfig(), None, **tokenizer)


def pieces(path: Path) -> list[str]:
    from sentencepiece import SentencePieceProcessor

    model = SentencePieceProcessor(str(path / "tokenizer.model"))
    return [model.id_to_piece(i) for i in range(model.get_piece_size())]


@pytest.mark.parametrize("type_", ["sp_bpe", "sp_unigram"])
def test_training_writes_a_folder_that_loads(tmp_path, type_):
    path = train_tokenizer(config(tmp_path, type=type_))
    assert sorted(p.name for p in path.iterdir()) == ["tokenizer.model", "tokenizer_config.json"]
    tokenizer = load_tokenizer(path)
    assert (tokenizer.name, tokenizer.vocab_size, tokenizer.end_of_document) == ("out", 400, 2)
    settings = json.loads((path / "tokenizer_config.json").read_text())["training"]
    assert settings["type"] == type_
    for text in [*TRICKY, *texts(5)]:
        assert tokenizer.decode(tokenizer.encode(text)) == text
    assert pieces(path)[:4] == ["<unk>", "<s>", "</s>", "<pad>"]
    assert any("\n" in piece and len(piece) > 1 for piece in pieces(path)), "newlines join pieces"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["in.jsonl", "out"]


@pytest.mark.parametrize(
    ("type_", "end", "lossless"),
    [("bpe_bytelevel", "<|endoftext|>", True), ("unigram", "<|endoftext|>", True), ("wordpiece", "[SEP]", False)],
)
def test_types_of_the_tokenizers_library(tmp_path, type_, end, lossless):
    path = train_tokenizer(plain(tmp_path, texts(), type=type_, vocab_size=350))
    assert sorted(p.name for p in path.iterdir()) == ["tokenizer.json", "tokenizer_config.json"]
    tokenizer = load_tokenizer(path)
    assert (tokenizer.name, tokenizer.vocab_size, tokenizer.end_of_document_text) == ("out", 350, end)
    assert (tokenizer.unknown is None) == lossless
    for text in [*TRICKY, *texts(5)]:
        ids = tokenizer.encode(text)
        assert tokenizer.end_of_document not in ids
        assert not lossless or tokenizer.decode(ids) == text
    assert len(tokenizer.encode("the king of night and day")) <= 25, "no characters were joined"


@pytest.mark.parametrize(("type_", "size", "message"), [
    ("bpe_bytelevel", 100, "the characters alone need 257"),
    ("wordpiece", 30_000, r"this text yields \d+; set that"),
])  # fmt: skip
def test_vocabularies_of_the_library_that_do_not_fit(tmp_path, type_, size, message):
    with pytest.raises(ConfigError, match=message):
        train_tokenizer(plain(tmp_path, texts(), type=type_, vocab_size=size))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("type_", ["sp_bpe", "bpe_bytelevel"])
def test_the_same_input_gives_the_same_file(tmp_path, type_):
    digests = set()
    for name in ("a", "b"):
        path = train_tokenizer(config(tmp_path, name=name, type=type_, vocab_size=400 if type_ == "sp_bpe" else 300))
        (model,) = (p for p in path.iterdir() if p.name != "tokenizer_config.json")
        digests.add(hashlib.sha256(model.read_bytes()).hexdigest())
    assert len(digests) == 1


def test_only_the_split_is_seen(tmp_path):
    assert not any("龘" in piece for piece in pieces(train_tokenizer(config(tmp_path, character_coverage=1.0))))
    everything = config(tmp_path, name="all", split=None, character_coverage=1.0)
    assert any("龘" in piece for piece in pieces(train_tokenizer(everything)))


def test_long_documents_are_trained_on_in_full(tmp_path):
    """SentencePiece would drop these: each is one document of more than 4192 bytes, one has no place to cut."""
    unbroken = "\u4e2d\u6587" * 4000
    rows = [(" early" * 2000) + (" middle" * 2000) + (" ending" * 2000), unbroken]
    configured = plain(tmp_path, rows, vocab_size=310)
    sentences = list(TrainingSample(configured))
    assert "".join(sentences) == "".join(rows)
    assert max(len(sentence.encode()) for sentence in sentences) <= 4096
    found = pieces(train_tokenizer(configured))
    assert {"▁early", "▁middle", "▁ending"} <= set(found)
    assert "\u4e2d\u6587" * 2 in found


def test_sentences_are_cut_behind_newlines(tmp_path):
    text = "\n".join(f"line {i} of a long text" for i in range(1000))
    sentences = list(TrainingSample(plain(tmp_path, [text])))
    assert "".join(sentences) == text
    assert all(sentence.endswith("\n") for sentence in sentences[:-1])


def test_text_with_reserved_characters_is_not_dropped(tmp_path):
    rows = [f"\x00 alpha {i}▅beta▁gamma" for i in range(50)]
    found = "".join(pieces(train_tokenizer(plain(tmp_path, rows, vocab_size=300))))
    assert all(word in found for word in ("alpha", "beta", "gamma"))


def test_character_coverage(tmp_path):
    """The rarest characters lose their pieces and are spelled in bytes, below SentencePiece's own limit of 0.98."""
    rows = ["一" * 600 + "二" * 300 + "三" * 90 + "四" * 9 + "z"]
    for coverage, covered in [
        (0.6, "一"),
        (0.61, "一二"),
        (0.9, "一二"),
        (0.95, "一二三"),
        (0.99, "一二三"),
        (1.0, "一二三四"),
    ]:
        sentences = list(TrainingSample(plain(tmp_path, rows, character_coverage=coverage)))
        assert set("".join(sentences)) == {*covered, "z"}, "ASCII always stays"
    path = train_tokenizer(plain(tmp_path, rows, vocab_size=270, character_coverage=0.9))
    assert not {"三", "四"} & set(pieces(path))
    tokenizer = load_tokenizer(path)
    assert tokenizer.decode(tokenizer.encode("一二三四")) == "一二三四"
    assert len(tokenizer.encode("三四")) == 6


def test_byte_fallback(tmp_path):
    def encode_unseen(fallback: bool, name: str) -> list[int]:
        tokenizer = load_tokenizer(train_tokenizer(config(tmp_path, name=name, byte_fallback=fallback)))
        return tokenizer.encode("龘")

    assert len(encode_unseen(True, "with")) == 3
    assert encode_unseen(False, "without") == [0], "the unknown id"


@pytest.mark.parametrize(("balance", "share"), [(0.0, None), (0.5, None), (1.0, 0.5)])
def test_language_balance(tmp_path, balance, share):
    rows = mixed(150, 450)
    num_bytes = {
        lang: sum(len(r["text"].encode()) for r in rows if r["lang"] == lang and r["part"] == "train")
        for lang in ("en", "zh")
    }
    total = sum(num_bytes.values())
    smoothed = {lang: (size / total) ** (1 - balance) for lang, size in num_bytes.items()}
    expected = smoothed["en"] / sum(smoothed.values())
    assert share is None or expected == share
    sample = TrainingSample(config(tmp_path, rows, language_balance=balance))
    english_bytes = chinese_bytes = 0
    for sentence in sample:
        if sentence[0].isascii():
            english_bytes += len(sentence.encode())
        else:
            chinese_bytes += len(sentence.encode())
    assert english_bytes / (english_bytes + chinese_bytes) == pytest.approx(expected, abs=0.04)
    assert english_bytes + chinese_bytes == pytest.approx(total, rel=0.05)
    assert sample.sampled_bytes["en"] == pytest.approx(expected * total, abs=1)


def test_language_balance_changes_the_vocabulary(tmp_path):
    rows = mixed(num_english=10, num_chinese=400)
    lengths = []
    for balance in (0.0, 1.0):
        path = train_tokenizer(config(tmp_path, rows, name=f"b{balance}", language_balance=balance, vocab_size=450))
        lengths.append(len(load_tokenizer(path).encode(english(random.Random(9), 50))))
    assert lengths[1] < 0.9 * lengths[0]


def test_sample_bytes_bounds_the_text(tmp_path):
    rows = mixed()
    whole = sum(len(s.encode()) for s in TrainingSample(config(tmp_path, rows, character_coverage=1.0)))
    limited = TrainingSample(config(tmp_path, rows, character_coverage=1.0, sample_bytes=whole // 3))
    assert sum(len(s.encode()) for s in limited) == pytest.approx(whole / 3, rel=0.15)
    assert list(limited) == list(limited), "a second reading gives the same"


def test_vocabulary_that_does_not_fit(tmp_path):
    with pytest.raises(ConfigError, match=r"tokenizer.vocab_size 9000: this text yields \d+ pieces at most"):
        train_tokenizer(config(tmp_path, vocab_size=9000))
    with pytest.raises(ConfigError, match=r"tokenizer.vocab_size 270: the characters alone need \d+.*coverage"):
        train_tokenizer(config(tmp_path, vocab_size=270))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["in.jsonl"]


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("vocab_size", 0),
        ("character_coverage", 0.0),
        ("character_coverage", 1.1),
        ("language_balance", -0.1),
        ("language_balance", 1.5),
        ("sample_bytes", 0),
        ("num_threads", 0),
    ],
)
def test_values_out_of_range(tmp_path, key, value):
    with pytest.raises(ConfigError, match=f"tokenizer.{key}: found {value}, allowed"):
        train_tokenizer(config(tmp_path, **{key: value}))


def test_keys_that_need_a_column(tmp_path):
    with pytest.raises(ConfigError, match=r"split=train needs reader\.split_column"):
        train_tokenizer(config(tmp_path, reader=ReaderConfig(language_column="lang")))
    with pytest.raises(ConfigError, match=r"language_balance needs reader\.language_column"):
        train_tokenizer(config(tmp_path, reader=ReaderConfig(split_column="part"), language_balance=0.5))


def test_nothing_to_train_on(tmp_path):
    rows = [{"text": "x", "lang": "en", "part": "validation"}]
    with pytest.raises(DataError, match="no document with split train"):
        train_tokenizer(config(tmp_path, rows))


def test_error_while_the_trainer_reads(tmp_path, monkeypatch):
    """An error of the reader in the second reading is told as itself, not as the trainer's."""
    configured = config(tmp_path)
    real = TrainingSample.__iter__

    def failing(self):
        yield from list(real(self))[:5]
        raise DataError("the file went away")

    monkeypatch.setattr(TrainingSample, "__iter__", failing)
    with pytest.raises(DataError, match="went away"):
        train_tokenizer(configured)


def test_output_is_refused_replaced_and_never_half_written(tmp_path, monkeypatch):
    configured = config(tmp_path)
    train_tokenizer(configured)
    with pytest.raises(DataError, match="exists already"):
        train_tokenizer(configured)
    larger = replace(configured, overwrite=True, tokenizer=TokenizerConfig(vocab_size=420))
    assert load_tokenizer(train_tokenizer(larger)).vocab_size == 420

    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("megalite.data_tools.tokenizer_training.write_synced", full)
    with pytest.raises(ResourceError, match="No space left"):
        train_tokenizer(replace(configured, overwrite=True))
    assert load_tokenizer(tmp_path / "out").vocab_size == 420
    assert sorted(p.name for p in tmp_path.iterdir()) == ["in.jsonl", "out"]
