"""The commands as a person types them: one summary, exit codes, nothing half-written."""

import json
import shutil

import pytest

from megalite.data.format import TokenStore
from megalite.launch.cli import main
from tests.data_tools.megatron_files import read_current, write_current
from tests.data_tools.store_tools.stores import contents, random_store, text_store


@pytest.fixture
def store(tmp_path, monkeypatch):
    monkeypatch.setenv("COLUMNS", "120")
    return random_store(tmp_path / "a", shard_tokens=300)


def test_stats(tmp_path, tokenizer_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "120")
    store, corpus = text_store(tmp_path / "a", tokenizer_path)
    output = tmp_path / "stats.json"
    assert main(["data", "stats", f"store={store.path}", "top=3", f"output={output}"]) == 0
    shown = capsys.readouterr().out
    assert f"source texts: {len(corpus)} documents, {store.num_tokens:,} tokens in 1 shards" in shown
    assert "of 400 entries occur" in shown
    assert "unknown: 0 tokens (0.0000%)" in shown
    assert f"written to {output}" in shown
    top = json.loads(output.read_text())[str(store.path)]["top_tokens"]
    assert len(top) == 3
    for token in top:
        assert repr(token["text"]) in shown
        assert f"{token['count']:,}" in shown


def test_repair(tmp_path, store, capsys):
    command = ["data", "repair", f"store={store.path}", f"output={tmp_path}/out"]
    assert main(command) == 0
    assert capsys.readouterr().out == f"{store.path}: whole, nothing is written\n"
    lost = store.manifest.shards[1]
    file = store.path / lost.tokens.file
    data = file.read_bytes()
    file.write_bytes(data[:-2])
    (store.path / store.manifest.shards[0].document_offsets.file).unlink()
    assert main(command) == 0
    tokens, documents = lost.tokens.bytes // 2, lost.num_documents
    assert capsys.readouterr().out.splitlines() == [
        "damaged: document_offsets_00000.bin is missing",
        f"damaged: tokens_00001.bin has {len(data) - 2} bytes, expected {len(data)}",
        f"{tmp_path}/out: {40 - documents} documents, {store.num_tokens - tokens} tokens",
        f"lost: {documents} documents, {tokens} tokens, from tokens_00001.bin",
    ]
    shutil.rmtree(tmp_path / "out")
    assert main([*command, "unverified=keep"]) == 0
    assert f"not verified: {documents - 1} documents of damaged shards" in capsys.readouterr().out


def test_repair_without_what_it_needs(tmp_path, tokenizer_path, capsys):
    store, _ = text_store(tmp_path / "a", tokenizer_path)
    (store.path / "tokenizer/tokenizer.model").unlink()
    assert main(["data", "repair", f"store={store.path}", f"output={tmp_path}/b"]) == 0
    assert "lost: the tokenizer; name a whole copy as tokenizer.path" in capsys.readouterr().out
    (store.path / store.manifest.shards[0].document_bytes.file).unlink()
    command = ["data", "repair", f"store={store.path}", f"output={tmp_path}/c", f"tokenizer.path={tokenizer_path}"]
    assert main(command) == 0
    assert f"recounted by decoding: the bytes of {store.num_documents} documents" in capsys.readouterr().out
    assert contents(tmp_path / "b") == contents(tmp_path / "c")


def test_merge_and_split(tmp_path, store, capsys):
    other = random_store(tmp_path / "b", seed=1)
    assert main(["data", "merge", f"input=[{store.path},{other.path}]", f"output={tmp_path}/m", "source=both"]) == 0
    merged = TokenStore.open(tmp_path / "m")
    assert contents(merged) == contents(store) + contents(other)
    line = f"{tmp_path}/m: 80 documents, {merged.num_tokens:,} tokens, {merged.manifest.num_bytes:,} bytes of text\n"
    assert capsys.readouterr().out == line
    assert main(["data", "split", f"store={tmp_path}/m", f"output={tmp_path}/s", "fraction=0.25", "seed=3"]) == 0
    assert [line.split(":")[0] for line in capsys.readouterr().out.splitlines()] == [
        f"{tmp_path}/s/train/both",
        f"{tmp_path}/s/validation/both",
    ]
    assert main(["data", "split", f"store={tmp_path}/m", f"output={tmp_path}/s", "parts=2"]) == 3
    assert capsys.readouterr().err == f"DataError: {tmp_path}/s exists already: choose another output\n"
    assert main(["data", "split", f"store={tmp_path}/m", f"output={tmp_path}/p", "parts=2"]) == 0
    assert sorted(p.name for p in (tmp_path / "p").iterdir()) == ["part_0", "part_1"]


def test_convert(tmp_path, store, capsys):
    assert main(["data", "convert", f"input={store.path}", f"output={tmp_path}/mm", "keep_ends=false"]) == 0
    assert f"for Megatron: --data-path {tmp_path}/mm/mm\n" in capsys.readouterr().out
    assert read_current(tmp_path / "mm/mm")[0] == "uint16"
    ids = ["vocab_size=300", "end_of_document=0"]
    assert main(["data", "convert", f"input={tmp_path}/mm/mm.idx", f"output={tmp_path}/back", *ids]) == 0
    shown = capsys.readouterr().out.splitlines()
    assert shown[0] == f"{tmp_path}/back: 40 documents, {store.num_tokens} tokens from an index MMIDIDX"
    assert shown[1] == "0 of 40 documents ended with end_of_document, 40 were given it"
    assert shown[2].startswith("bytes of text are not known and stand as 0")
    assert len(shown) == 3
    write_current(tmp_path / "x", [[[1, 0, 7]], [[2, 7]]])
    assert main(["data", "convert", f"input={tmp_path}/x", f"output={tmp_path}/y", *ids]) == 3
    assert "inner_ends=split" in capsys.readouterr().err
    assert main(["data", "convert", f"input={tmp_path}/x", f"output={tmp_path}/y", *ids, "inner_ends=split"]) == 0
    shown = capsys.readouterr().out
    assert "1 more than Megatron's 2: cut at ends inside documents" in shown
    assert "all of them ended with the id 7: is that the end of a document?" in shown


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["stats"], 2, "store is required"),
        (["stats", "store=gone"], 3, "gone does not exist"),
        (["stats", "store=a", "top=0"], 2, "top: found 0"),
        (["repair", "store=gone", "output=x"], 3, "gone is not a token store"),
        (["repair", "store=a", "output="], 2, "output: is empty"),
        (["merge", "input=a", "output=x"], 2, "name two token stores at least"),
        (["split", "store=a", "output=x"], 2, "give one of them"),
        (["convert", "input=gone", "output=x"], 2, r"give tokenizer.path, or vocab_size and end_of_document"),
        (["convert", "input=gone", "output=x", "vocab_size=9", "end_of_document=0"], 3, "gone.idx is missing"),
    ],
)
def test_mistakes(tmp_path, monkeypatch, capsys, arguments, code, message):
    monkeypatch.chdir(tmp_path)
    assert main(["data", *arguments]) == code
    captured = capsys.readouterr()
    assert message in captured.err
    assert captured.out == ""
    assert list(tmp_path.iterdir()) == []
