import json

import pytest

from megalite.data.format import TokenStore
from megalite.data_tools.store_tools.inspection import find_stores
from megalite.errors import ConfigError, DataError
from megalite.launch import tokenizer
from megalite.launch.data import build as data
from tests.data_tools.corpora import write_jsonl


@pytest.fixture(scope="module")
def output(tmp_path_factory, tokenizer_path):
    """The output folder of `megalite data build`."""
    root = tmp_path_factory.mktemp("commands")
    source = write_jsonl(root / "in.jsonl", [{"text": f"document {i} <s>[bold]"} for i in range(50)])
    argv = [f"input={source}", f"output={root}/out", f"tokenizer.path={tokenizer_path}", "workers=1"]
    assert data.build([*argv, "validation_fraction=0.2", "reader.on_bad=skip"]) == 0
    return root / "out"


def test_build_prints_the_report(tmp_path, tokenizer_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "120")
    source = write_jsonl(tmp_path / "in.jsonl", [{"text": "a b"}, {"text": ""}])
    data.build([f"input={source}", f"output={tmp_path}/o", f"tokenizer.path={tokenizer_path}", "reader.on_bad=skip"])
    printed = capsys.readouterr().out
    assert "train/in" in printed
    assert "1 documents from 1 files; skipped: 1 x empty document" in printed


def test_verify(output, capsys):
    assert data.verify([f"store={output}"]) == 0
    assert data.verify([str(output / "train/in")]) == 0
    printed = capsys.readouterr().out.splitlines()
    assert printed == [f"{output}/train/in: whole", f"{output}/validation/in: whole", f"{output}/train/in: whole"]


def test_verify_finds_damage(output, tmp_path):
    import shutil

    shutil.copytree(output, tmp_path / "copy")
    for name in ("tokens_00000.bin", "tokenizer/tokenizer.model"):
        file = tmp_path / "copy/train/in" / name
        good = file.read_bytes()
        file.write_bytes(good[:-1] + bytes([good[-1] ^ 1]))
        with pytest.raises(DataError, match=f"{name} is damaged"):
            data.verify([f"store={tmp_path}/copy"])
        file.write_bytes(good)


def test_inspect(output, capsys):
    assert data.inspect([f"store={output}/train/in", "documents=2"]) == 0
    printed = capsys.readouterr().out
    assert "document 1:" in printed
    assert "document 2:" not in printed
    assert "<s>[bold]" in printed
    manifest = json.loads((output / "train/in/manifest.json").read_text())
    assert f"{manifest['num_tokens']} tokens" in printed.replace(",", "")


def test_inspect_refuses_a_foreign_tokenizer_and_shows_ids_without_one(output, tmp_path, capsys):
    import shutil

    shutil.copytree(output / "train/in", tmp_path / "store")
    manifest = json.loads((tmp_path / "store/manifest.json").read_text())
    manifest["tokenizer"]["digest"] = "0" * 32
    (tmp_path / "store/manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(DataError, match="its tokenizer has digest"):
        data.inspect([f"store={tmp_path}/store"])
    manifest["tokenizer"] = None
    (tmp_path / "store/manifest.json").write_text(json.dumps(manifest))
    assert data.inspect([f"store={tmp_path}/store", "documents=1"]) == 0
    ids = TokenStore.open(tmp_path / "store").document(0)[:-1].tolist()
    assert str(ids) in capsys.readouterr().out.replace("\n", " ").replace("  ", " ")


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "store is required"),
        (["store="], "store is required"),
        (["stor=x"], "unknown key stor. Allowed here: store"),
        (["store=x", "documents=many"], "documents: expected a whole number"),
    ],
)
def test_wrong_keys(argv, message):
    with pytest.raises(ConfigError, match=message):
        data.inspect(argv)


def test_no_store_there(tmp_path):
    with pytest.raises(DataError, match="does not exist"):
        data.verify([f"store={tmp_path}/gone"])
    with pytest.raises(DataError, match="holds no token store"):
        find_stores(tmp_path)


def test_tokenizer_train(tmp_path, capsys):
    from tests.data_tools.corpora import texts

    source = write_jsonl(tmp_path / "in.jsonl", [{"text": text} for text in texts()])
    argv = [f"input={source}", f"output={tmp_path}/tok", "tokenizer.type=sp_unigram", "tokenizer.vocab_size=420"]
    assert tokenizer.train(argv) == 0
    assert "420 entries, digest" in capsys.readouterr().out


def test_required_keys():
    with pytest.raises(ConfigError, match="input is required"):
        data.build([])
    with pytest.raises(ConfigError, match=r"unknown key reader\.colour"):
        tokenizer.train(["input=x", "output=y", "reader.colour=red"])
