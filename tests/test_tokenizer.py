import base64
import json
import math
import random
import shutil
from collections import Counter
from pathlib import Path

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from megalite.errors import DataError
from megalite.tokenizer import SP_MODEL, load_tokenizer
from tests.data_tools.corpora import TRICKY, make_tokenizer, texts

END = "<|endoftext|>"


def train_byte_level(special: bool = True) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=350, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator(texts(), trainer)
    tokenizer.add_tokens([AddedToken(END, special=special)])
    return tokenizer


def gpt2_folder(folder: Path) -> Path:
    """vocab.json and merges.txt in GPT-2's form, the end-of-text token being the last entry."""
    folder.mkdir()
    spec = json.loads(train_byte_level().to_str())["model"]
    vocabulary = spec["vocab"] | {END: len(spec["vocab"])}
    (folder / "vocab.json").write_text(json.dumps(vocabulary), encoding="utf-8")
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in spec["merges"]]
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges) + "\n", encoding="utf-8")
    return folder


def tiktoken_file(folder: Path) -> Path:
    """The same pairs as a file of tiktoken: every token's bytes, in the order in which they are merged."""
    folder.mkdir()
    spec = json.loads(train_byte_level().to_str())["model"]
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    byte_of = {chr(byte): byte for byte in printable} | {chr(0x100 + n): byte for n, byte in enumerate(others)}
    tokens = [bytes(byte_of[c] for c in token) for token in sorted(spec["vocab"], key=spec["vocab"].get)]
    # Up to the size of the published file, of bytes that are in no text.
    tokens += [b"\xff\xff" + n.to_bytes(4, "big") for n in range(50_256 - len(tokens))]
    lines = [base64.b64encode(token).decode() + f" {rank}" for rank, token in enumerate(tokens)]
    (folder / "r50k_base.tiktoken").write_text("\n".join(lines) + "\n")
    return folder / "r50k_base.tiktoken"


@pytest.fixture(scope="module")
def paths(tmp_path_factory) -> dict[str, Path]:
    """Every kind that `load_tokenizer` takes."""
    root = tmp_path_factory.mktemp("tokenizers")
    bpe = make_tokenizer(root)
    (root / "u").mkdir()
    unigram = make_tokenizer(root / "u", vocab_size=420, type="sp_unigram")
    (root / "plain").mkdir()
    shutil.copy(bpe / SP_MODEL, root / "plain/some.model")
    train_byte_level().save(str(root / "tokenizer.json"))
    return {
        "folder": bpe,
        "unigram": unigram,
        "model": root / "plain/some.model",
        "json": root / "tokenizer.json",
        "gpt2": gpt2_folder(root / "gpt2"),
        "tiktoken": tiktoken_file(root / "tiktoken"),
    }


KINDS = ["folder", "unigram", "model", "json", "gpt2", "tiktoken"]


@pytest.mark.parametrize("kind", KINDS)
def test_every_text_comes_back_and_text_is_never_control(paths, kind):
    tokenizer = load_tokenizer(paths[kind])
    all_texts = [*texts(), "", " ", "\n", tokenizer.end_of_document_text * 2]
    batch = tokenizer.encode_batch(all_texts)
    for text, ids in zip(all_texts, batch, strict=True):
        assert tokenizer.encode(text) == ids
        assert tokenizer.decode(ids) == text
        assert tokenizer.decode_bytes(ids) == text.encode()
        assert tokenizer.end_of_document not in ids
        assert all(0 <= i < tokenizer.vocab_size for i in ids)
        if not kind.endswith(("json", "gpt2", "tiktoken")):
            assert not {0, 1, 2, 3} & set(ids), "unknown, begin, end and padding are never text"


@pytest.mark.parametrize("kind", KINDS)
def test_random_unicode_comes_back(paths, kind):
    rng = random.Random(7)
    tokenizer = load_tokenizer(paths[kind])
    points = [c for c in range(0x110000) if not 0xD800 <= c < 0xE000]
    for _ in range(100):
        text = "".join(map(chr, rng.choices(points[:0x3000], k=20) + rng.choices(points, k=5)))
        assert tokenizer.decode(tokenizer.encode(text)) == text


@pytest.mark.parametrize("kind", KINDS)
def test_decoding_leaves_control_ids_out_and_marks_cut_characters(paths, kind):
    tokenizer = load_tokenizer(paths[kind])
    end = tokenizer.end_of_document
    assert tokenizer.decode([end, *tokenizer.encode("night"), end]) == "night"
    cut = tokenizer.encode("\U0010ffff")[:-1]
    assert tokenizer.decode_bytes(cut) == "\U0010ffff".encode()[:-1]
    assert tokenizer.decode(cut) == "\ufffd"


@pytest.mark.parametrize("kind", KINDS)
def test_saved_copy_is_the_same_tokenizer(paths, kind, tmp_path):
    tokenizer = load_tokenizer(paths[kind])
    tokenizer.save(tmp_path / "a/copy")
    copy = load_tokenizer(tmp_path / "a/copy")
    assert (copy.digest, copy.name) == (tokenizer.digest, tokenizer.name)
    assert (copy.vocab_size, copy.end_of_document) == (tokenizer.vocab_size, tokenizer.end_of_document)
    assert copy.encode_batch(texts()) == tokenizer.encode_batch(texts())


def test_digest_tells_tokenizers_apart(paths):
    digests = {kind: load_tokenizer(path).digest for kind, path in paths.items()}
    assert digests["folder"] == digests["model"], "the same model, found in two ways"
    assert len(set(digests.values())) == 5


@pytest.mark.parametrize("kind", ["gpt2", "tiktoken"])
def test_our_gpt2_forms_equal_the_library(paths, kind):
    """vocab.json + merges.txt, and tiktoken's file, give the ids that the same model gives as tokenizer.json."""
    ours, library = load_tokenizer(paths[kind]), Tokenizer.from_file(str(paths["json"]))
    for text in texts():
        if END not in text:
            assert ours.encode(text) == library.encode(text).ids


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("mine.tiktoken", None, r"its name is not one of .*cl100k_base\.tiktoken"),
        ("r50k_base.tiktoken", "no base64 at all\n", "is not valid, or is damaged"),
        ("r50k_base.tiktoken", "QQ== 0\nQQ== 1\n", "line 2: the token b'A' was there before"),
        ("r50k_base.tiktoken", "QQ== 4000000000\n", "line 1: expected a token in base64 and its rank"),
        ("cl100k_base.tiktoken", "QQ== 0\n", "cut short.*: 1 tokens, expected 100,256"),
    ],
)
def test_files_of_tiktoken_that_cannot_be_read(paths, tmp_path, name, content, message):
    text = paths["tiktoken"].read_text() if content is None else content
    (tmp_path / name).write_text(text)
    with pytest.raises(DataError, match=message):
        load_tokenizer(tmp_path / name)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda rows: rows[:-1], "cut short, .*: 50,255 tokens, expected 50,256"),
        (lambda rows: [*rows[:-1], rows[-1][:-2]], "found a token of rank 502, expected rank 503"),
        (lambda rows: [*rows[:-1], rows[-2].split()[0][:-4] + b"//8= 50255"], None),
        (lambda rows: [rows[0].split()[0][:-4] + b"/////w== 0", *rows[1:]], "no token for 1 bytes, such as 0x21"),
    ],
    ids=["a line less", "a rank cut", "another token", "a byte less"],
)
def test_damage_in_a_file_of_tiktoken(paths, tmp_path, change, message):
    rows = paths["tiktoken"].read_bytes().splitlines()
    path = tmp_path / "r50k_base.tiktoken"
    path.write_bytes(b"\n".join(change(rows)) + b"\n")
    if message:
        with pytest.raises(DataError, match=message):
            load_tokenizer(path)
    else:
        assert load_tokenizer(path).vocab_size == 50_257


def test_a_file_of_tiktoken_is_what_it_is_now(paths, tmp_path, monkeypatch, caplog):
    """The library keeps copies by the path's name, so that a file written anew would give the ids of the old one."""
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path / "cache"))
    path = tmp_path / "r50k_base.tiktoken"
    rows = paths["tiktoken"].read_bytes().splitlines()
    shutil.copy(paths["tiktoken"], path)
    first = load_tokenizer(path)
    rows[300], rows[301] = rows[301].split()[0] + b" 300", rows[300].split()[0] + b" 301"
    path.write_bytes(b"\n".join(rows) + b"\n")
    second = load_tokenizer(path)
    assert second.decode([300]) == first.decode([301]) != first.decode([300])
    assert first.digest != second.digest
    assert not (tmp_path / "cache").exists()
    assert "is not the file that was published under this name" in caplog.text


@pytest.mark.parametrize(
    ("file", "change", "message"),
    [
        ("merges.txt", lambda text: text[: text.rindex("\n", 0, -1) + 1], r"merges\.txt is cut short, .* all but 1 of"),
        ("merges.txt", lambda text: text[:301], "merges.txt"),
        ("merges.txt", lambda text: text + "x\n", "expected two tokens, found 'x'"),
        ("vocab.json", lambda text: json.dumps(json.loads(text) | {"<x>": 5}), "both have id 5"),
        ("vocab.json", lambda text: json.dumps(json.loads(text) | {"<x>": 10**9}), "'<x>' has id 1000000000, of"),
        ("vocab.json", lambda text: json.dumps(json.loads(text) | {"<x>": -1}), "expected an object of token and id"),
        ("vocab.json", lambda text: text.replace('"\\u0100"', '"<0>"'), "no token for 1 of the bytes .* such as 0x00"),
    ],
)
def test_damage_in_the_files_of_gpt2(paths, tmp_path, file, change, message):
    shutil.copytree(paths["gpt2"], tmp_path / "gpt2")
    text = (tmp_path / "gpt2" / file).read_text(encoding="utf-8")
    (tmp_path / "gpt2" / file).write_text(change(text), encoding="utf-8")
    with pytest.raises(DataError, match=message):
        load_tokenizer(tmp_path / "gpt2")


def test_encoding_is_never_random(paths, tmp_path):
    """A pair encoding may say that some merges are left out at random (Provilkov et al. 2020)."""
    spec = json.loads(paths["json"].read_text(encoding="utf-8"))
    spec["model"]["dropout"] = 0.5
    (tmp_path / "tokenizer.json").write_text(json.dumps(spec))
    loaded, exact = load_tokenizer(tmp_path), load_tokenizer(paths["json"])
    assert loaded.encode_batch(texts()) == exact.encode_batch(texts())
    assert loaded.library_json()["model"]["dropout"] is None


def test_hugging_face_end_of_document(tmp_path):
    tokenizer = train_byte_level()
    tokenizer.add_special_tokens(["<stop>"])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    assert load_tokenizer(tmp_path).end_of_document_text == END
    for value in ("<stop>", {"content": "<stop>"}):
        (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": value}))
        for path in (tmp_path, tmp_path / "tokenizer.json"):
            loaded = load_tokenizer(path)
            assert loaded.end_of_document == tokenizer.token_to_id("<stop>")
            assert loaded.end_of_document not in loaded.encode("a <stop> b")
    for value in (["<stop>"], 5, {"text": "<stop>"}):
        (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": value}))
        for path in (tmp_path, tmp_path / "tokenizer.json"):
            with pytest.raises(
                DataError, match=r"tokenizer_config\.json: eos_token is .*, allowed: the text of a token"
            ):
                load_tokenizer(path)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<gone>"}))
    with pytest.raises(DataError, match="no token '<gone>'"):
        load_tokenizer(tmp_path)


def test_truncation_padding_and_added_ids_of_the_file_are_not_applied(tmp_path):
    from tokenizers.processors import TemplateProcessing

    tokenizer = train_byte_level()
    tokenizer.enable_truncation(3)
    tokenizer.enable_padding(length=50)
    end = tokenizer.token_to_id(END)
    tokenizer.post_processor = TemplateProcessing(single=f"{END} $A {END}", special_tokens=[(END, end)])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    loaded = load_tokenizer(tmp_path)
    text = "the king of night and day walks by"
    assert loaded.decode(loaded.encode(text)) == text
    assert end not in loaded.encode(text)


SPECIAL = ("[UNK]", "[CLS]", "[SEP]", "<s>", "<|im_start|>", "king", "\n\n")  # the last three not marked as such


def unigram_pieces(corpus: list[str]) -> list[tuple[str, float]]:
    """Special tokens, all characters, and the 200 most frequent strings of 2 to 6, by the logarithm of their share."""
    counts = Counter(text[i : i + n] for text in corpus for n in range(1, 7) for i in range(len(text) - n + 1))
    kept = [piece for piece in counts if len(piece) == 1]
    kept += sorted((p for p in counts if len(p) > 1), key=lambda p: (-counts[p], p))[:200]
    total = sum(counts.values())
    # No two of one score: what is segmented in two ways that are as likely may be segmented in either.
    scores = {piece: math.log(counts[piece] / total) - 1e-3 * i / math.pi for i, piece in enumerate(kept)}
    return [(text, 0.0) for text in SPECIAL[:4]] + [(p, s) for p, s in scores.items() if p not in SPECIAL]


def with_special_tokens(kind: str) -> Tokenizer:
    """Of each kind of model, the special tokens in its vocabulary as BERT's, T5's and XLM-R's have them."""
    unknown, split = SPECIAL[0], pre_tokenizers.WhitespaceSplit()
    whole_words = models.BPE(unk_token=unknown, ignore_merges=True)
    models_of = {
        "wordpiece": (models.WordPiece(unk_token=unknown), trainers.WordPieceTrainer, {"vocab_size": 200}, split),
        "bert": (models.WordPiece(unk_token=unknown), trainers.WordPieceTrainer, {"vocab_size": 200}, None),
        "wordlevel": (models.WordLevel(unk_token=unknown), trainers.WordLevelTrainer, {"vocab_size": 90}, split),
        "bpe": (models.BPE(unk_token=unknown), trainers.BpeTrainer, {"vocab_size": 250}, split),
        "whole words": (whole_words, trainers.BpeTrainer, {"vocab_size": 250}, split),
    }  # fmt: skip
    corpus = [text for text in texts(30) if "<" not in text] + ["< s > [ C L S E P ] | i m _"] * 3
    if kind == "unigram":  # the library's training gives another model each time
        tokenizer = Tokenizer(models.Unigram(unigram_pieces(corpus), unk_id=0))
        tokenizer.add_special_tokens([AddedToken(text, special=True) for text in SPECIAL[:4]])
        tokenizer.add_tokens([AddedToken(text, special=False, normalized=False) for text in SPECIAL[4:]])
        return tokenizer
    model, trainer, settings, pre_tokenizer = models_of[kind]
    tokenizer = Tokenizer(model)
    if pre_tokenizer:
        tokenizer.pre_tokenizer = pre_tokenizer
    elif kind == "bert":
        tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
        tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.train_from_iterator(corpus, trainer(special_tokens=list(SPECIAL[:4]), show_progress=False, **settings))
    tokenizer.add_tokens([AddedToken(text, special=False, normalized=False) for text in SPECIAL[4:]])
    return tokenizer


@pytest.mark.parametrize("kind", ["wordpiece", "bert", "wordlevel", "unigram", "bpe", "whole words"])
def test_no_document_spells_out_a_special_or_added_token(tmp_path, kind):
    library = with_special_tokens(kind)
    library.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": "[SEP]"}))
    tokenizer = load_tokenizer(tmp_path)
    assert set(tokenizer.special_tokens) == set(SPECIAL[:-1])
    for token, i in tokenizer.special_tokens.items():
        assert i == library.token_to_id(token)
        for text in (token, f"the {token} of", f"the{token}of", token * 3, f"{token}\n", f" {token} "):
            ids = tokenizer.encode(text)
            assert ids
            assert i not in ids or i == tokenizer.unknown
    library.encode_special_tokens = True
    for text in texts():
        if not any(token in text.lower() for token in SPECIAL[3:-1]) and TRICKY[0] not in text:
            assert tokenizer.encode(text) == library.encode(text).ids
    tokenizer.save(tmp_path / "copy")
    assert load_tokenizer(tmp_path / "copy").encode_batch(texts()) == tokenizer.encode_batch(texts())
    assert tokenizer.decode([library.token_to_id("<|im_start|>")]) == "<|im_start|>"


def test_added_white_space_is_text(tmp_path):
    library = train_byte_level()
    library.add_tokens([AddedToken("        ", normalized=False), AddedToken("<x>", normalized=False)])
    library.save(str(tmp_path / "tokenizer.json"))
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.encode("a        b") == library.encode("a        b").ids
    assert library.token_to_id("        ") in tokenizer.encode("a        b")
    assert library.token_to_id("<x>") not in tokenizer.encode("a <x> b")
    assert tokenizer.decode(tokenizer.encode("        <x>")) == "        <x>"


def test_an_end_that_only_its_configuration_names_is_no_text(tmp_path):
    """GPT-2's files mark nothing as special: a word made of pairs is spelled in the pairs below it."""
    folder = gpt2_folder(tmp_path / "gpt2")
    assert len(load_tokenizer(folder).encode("king")) < 4
    word = load_tokenizer(folder).decode(load_tokenizer(folder).encode("king")[:1])
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": word}))
    tokenizer = load_tokenizer(folder)
    assert tokenizer.end_of_document_text == word
    for text in texts():
        ids = tokenizer.encode(text)
        assert tokenizer.end_of_document not in ids
        assert tokenizer.decode(ids) == text


def test_tokenizer_whose_special_token_is_a_letter_is_refused(tmp_path):
    library = train_byte_level()
    library.add_special_tokens(["a"])
    library.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(DataError, match=r"the special token 'a', .* into nothing"):
        load_tokenizer(tmp_path)


def test_tokenizer_that_drops_what_it_cannot_spell_is_refused(tmp_path):
    spec = json.loads(train_byte_level().to_str())
    spec |= {"pre_tokenizer": None, "decoder": None}
    spec["model"] |= {"vocab": {"<|endoftext|>": 0, "a": 1, "b": 2}, "merges": []}
    (tmp_path / "tokenizer.json").write_text(json.dumps(spec))
    with pytest.raises(DataError, match=r"drops characters that are not in its vocabulary"):
        load_tokenizer(tmp_path)
    spec["model"]["unk_token"] = "b"
    (tmp_path / "tokenizer.json").write_text(json.dumps(spec))
    assert load_tokenizer(tmp_path).unknown == 2


def test_tokenizer_without_an_end_is_refused(tmp_path):
    spec = json.loads(train_byte_level().to_str())
    spec["added_tokens"] = []
    (tmp_path / "tokenizer.json").write_text(json.dumps(spec))
    with pytest.raises(DataError, match=r"has none of .*eos_token"):
        load_tokenizer(tmp_path)


def test_sentencepiece_without_an_end_is_refused(tmp_path):
    from sentencepiece import SentencePieceTrainer

    with open(tmp_path / "x.model", "wb") as model:
        SentencePieceTrainer.train(
            sentence_iterator=iter(texts()), model_writer=model, vocab_size=200, eos_id=-1, minloglevel=2
        )
    with pytest.raises(DataError, match="no end-of-sentence id"):
        load_tokenizer(tmp_path / "x.model")


def test_lossy_sentencepiece_decodes_as_the_library_does(tmp_path):
    from sentencepiece import SentencePieceProcessor, SentencePieceTrainer

    with open(tmp_path / "x.model", "wb") as model:
        SentencePieceTrainer.train(sentence_iterator=iter(texts()), model_writer=model, vocab_size=200, minloglevel=2)
    ours, library = load_tokenizer(tmp_path / "x.model"), SentencePieceProcessor(str(tmp_path / "x.model"))
    for text in texts():
        assert ours.encode(text) == library.encode(text)
        assert ours.decode(ours.encode(text)) == library.decode(library.encode(text))


@pytest.mark.parametrize("kind", KINDS)
def test_damaged_files(paths, kind, tmp_path):
    source = paths[kind]
    files = [source] if source.is_file() else sorted(p for p in source.iterdir() if p.name != "tokenizer_config.json")
    for file in files:
        for name, content in {
            "empty": b"",
            "garbage": bytes(range(256)) * 20,
            "truncated": file.read_bytes()[: len(file.read_bytes()) // 2],
        }.items():
            target = tmp_path / f"{name}-{file.name}"
            shutil.copytree(source if source.is_dir() else source.parent, target)
            (target / file.name).write_bytes(content)
            with pytest.raises(DataError):
                load_tokenizer(target if source.is_dir() else target / file.name)


@pytest.mark.parametrize("kind", KINDS)
def test_changed_file_in_a_folder_of_ours(paths, kind, tmp_path):
    load_tokenizer(paths[kind]).save(tmp_path / "copy")
    config = json.loads((tmp_path / "copy/tokenizer_config.json").read_text())
    config["digest"] = "0" * 32
    (tmp_path / "copy/tokenizer_config.json").write_text(json.dumps(config))
    with pytest.raises(DataError, match="damaged or was changed"):
        load_tokenizer(tmp_path / "copy")


def test_nothing_there(tmp_path):
    for path, message in [
        (tmp_path / "gone", "does not exist"),
        (tmp_path / "gone.model", "cannot be read"),
        (tmp_path / "gone.json", "not valid|cannot be read"),
        (tmp_path, "no tokenizer in the folder"),
    ]:
        with pytest.raises(DataError, match=message):
            load_tokenizer(path)
    (tmp_path / "x.bin").write_bytes(b"x")
    with pytest.raises(DataError, match=r"ending that is not known.*Accepted"):
        load_tokenizer(tmp_path / "x.bin")
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"format": "megalite", "type": "magic"}))
    with pytest.raises(DataError, match=r"type 'magic', allowed"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text("{")
    with pytest.raises(DataError, match="not valid JSON"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize("kind", KINDS)
def test_text_that_is_not_unicode(paths, kind):
    with pytest.raises(DataError, match="not valid Unicode at character 1"):
        load_tokenizer(paths[kind]).encode("a\ud800")


def test_tricky_texts_hold_what_they_should():
    assert any("\u2581" in text for text in TRICKY)
