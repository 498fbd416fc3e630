import base64
import json
import random
import shutil
from pathlib import Path

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

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
        ("cl100k_base.tiktoken", "QQ== 0\n", "has 1 tokens, fewer than there are bytes"),
    ],
)
def test_files_of_tiktoken_that_cannot_be_read(paths, tmp_path, name, content, message):
    text = paths["tiktoken"].read_text() if content is None else content
    (tmp_path / name).write_text(text)
    with pytest.raises(DataError, match=message):
        load_tokenizer(tmp_path / name)


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


def test_tokenizer_that_reads_its_own_end_is_refused(tmp_path):
    train_byte_level(special=False).save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(DataError, match=r"turns the text .*endoftext.* into its end-of-document id"):
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
            if file.name == "merges.txt" and name != "garbage":
                continue  # fewer merges are a valid file; the digest in a folder of ours finds it (below)
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
