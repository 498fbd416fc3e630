"""S1: tokenizers, stores and configurations made to harm are refused with one error, and nothing of them runs."""

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest

from megalite.config.frozen import read_config
from megalite.data.dataset import TokenStore
from megalite.errors import DataError
from megalite.tokenizer import HF_JSON, SP_MODEL, load_tokenizer
from tests.data_tools.corpora import make_tokenizer
from tests.runs import write_store
from tests.security.hostile import foreign_files, refused


@pytest.fixture(scope="module")
def good(tmp_path_factory) -> Path:
    """A folder with a SentencePiece model."""
    return make_tokenizer(tmp_path_factory.mktemp("good"))


def library_json(**model) -> bytes:
    vocabulary = {chr(c): i for i, c in enumerate(range(33, 127))} | {"<|endoftext|>": 94}
    values = {"type": "BPE", "vocab": vocabulary, "merges": []} | model
    return json.dumps({"version": "1.0", "added_tokens": [], "model": values}).encode()


def hostile_json() -> dict[str, bytes]:
    """Name -> content of a tokenizer.json."""
    huge = {"id": 2**62, "content": "<|endoftext|>", "special": True, "single_word": False,
            "lstrip": False, "rstrip": False, "normalized": False}  # fmt: skip
    slow = {"type": "Split", "pattern": {"Regex": "(a+)+$"}, "behavior": "Isolated", "invert": False}
    whole = json.loads(library_json())
    return {
        "deep": b"[" * 200_000,
        "deep objects": b'{"a":' * 100_000,
        "a list": b"[]",
        "null": b"null",
        "no model": b'{"version": "1.0"}',
        "an unknown model": library_json(type="__import__('os')"),
        "negative ids": library_json(vocab={"a": -1, "<|endoftext|>": 0}),
        "ids of 2^62": library_json(vocab={"a": 2**62, "<|endoftext|>": 0}),
        "ids that are equal": library_json(vocab={"a": 0, "<|endoftext|>": 0}),
        "merges of nothing": library_json(merges=["x y z", ""]),
        "merges without end": library_json(merges=[["é", "é"]] * 3),
        "an added id of 2^62": json.dumps(whole | {"added_tokens": [huge]}).encode(),
        "numbers without end": b'{"version": ' + b"9" * 100_000 + b"}",
        "an expression that never ends": json.dumps(whole | {"pre_tokenizer": slow}).encode(),
        "an expression that is none": json.dumps(
            whole | {"pre_tokenizer": slow | {"pattern": {"Regex": "(((("}}}
        ).encode(),
    }  # fmt: skip


def hostile_models(whole: bytes) -> dict[str, bytes]:
    """Name -> content of a SentencePiece model."""
    return {
        "cut": whole[: len(whole) // 2],
        "a length of 2^63": b"\x0a" + b"\xff" * 9 + b"\x01" + bytes(20),
        "groups without end": b"\x0b" * 100_000,
        "pieces of nothing": b"\x0a\x00" * 1000,
        "a trainer's settings only": b"\x12\x02\x08\x01",
        "zeros": bytes(4096),
        "bits flipped": bytes(byte ^ 0xFF for byte in whole),
    }


def test_hostile_tokenizers_are_refused(tmp_path, good):
    canary = tmp_path / "canary"
    cases = [(SP_MODEL, name, content) for name, content in hostile_models((good / SP_MODEL).read_bytes()).items()]
    cases += [(HF_JSON, name, content) for name, content in hostile_json().items()]
    ranks = {"cut": b"IQ==", "no number": b"IQ== x\n", "a huge rank": b"IQ== 99999999999999999999\n",
             "no base64": b"!!!! 0\n", "negative": b"IQ== -1\n", "a line of 20 MB": b"I" * (20 << 20)}  # fmt: skip
    cases += [("x.tiktoken", name, content) for name, content in ranks.items()]
    for file in (SP_MODEL, HF_JSON, "x.tiktoken"):
        cases += [(file, name, content) for name, content in foreign_files(canary).items()]
    assert len(cases) >= 45
    for number, (file, name, content) in enumerate(cases):
        folder = tmp_path / str(number)
        folder.mkdir()
        (folder / file).write_bytes(content)
        for path in (folder, folder / file):
            code = refused(lambda path=path: load_tokenizer(path))
            assert code == 0, f"{file}, {name}: {code}"
    assert not canary.exists()


def test_a_good_tokenizer_is_read_by_the_same_child(good):
    assert refused(lambda: load_tokenizer(good)) == 7


def read(path: Path) -> None:
    """All that a training and the tools read."""
    store = TokenStore.open(path)
    store.read(0, np.empty(store.num_tokens, store.dtype))
    store.document_at([0])
    store.bytes_of_documents(0, 1)


@pytest.mark.parametrize("name", ["../secret", "/secret", "x/../../secret", "a\0b", "..", "", "a" * 300, "~/secret"])
def test_a_store_names_nothing_outside_itself(tmp_path, name):
    """A link is another matter: whoever keeps shards on several disks may make one, and it holds numbers only."""
    store = write_store(tmp_path / "words")
    (tmp_path / "secret").write_bytes((store / "tokens_00000.bin").read_bytes())
    manifest = json.loads((store / "manifest.json").read_text())
    manifest["shards"][0]["tokens"]["file"] = name
    (store / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(DataError):
        read(store)


def test_files_that_are_no_store_are_refused(tmp_path):
    canary = tmp_path / "canary"
    whole = write_store(tmp_path / "words")
    assert refused(lambda: read(whole)) == 7
    for name, content in foreign_files(canary).items():
        for file in ("manifest.json", "tokens_00000.bin", "document_offsets_00000.bin", "document_bytes_00000.bin"):
            store = shutil.copytree(whole, tmp_path / f"{name} as {file}")
            assert (store / file).exists()
            (store / file).write_bytes(content)
            assert refused(lambda store=store: read(store)) == 0, (name, file)
    assert not canary.exists()


YAML = {
    "a Python object": "!!python/object/apply:os.mkdir [CANARY]",
    "a Python name": "seed: !!python/name:os.system",
    "aliases that double": "a0: &a0 [x]\n" + "".join(f"a{i + 1}: &a{i + 1} [*a{i}, *a{i}]\n" for i in range(40)),
    "deep": "[" * 5000,
    "a list": "[1, 2]",
    "nothing": "",
    "a target": "_target_: os.mkdir\npath: CANARY",
    "a binary": "seed: !!binary aGVsbG8=",
    "no UTF-8": "\udcff\udcfe",
    "a zero byte": "seed: a\0b",
}


@pytest.mark.parametrize("name", YAML)
def test_hostile_configurations_are_refused(tmp_path, name):
    """What stands in a run directory, which may come from somebody else."""
    canary = tmp_path / "canary"
    (tmp_path / "config.yaml").write_bytes(os.fsencode(YAML[name].replace("CANARY", str(canary))))
    assert refused(lambda: read_config(tmp_path / "config.yaml")) == 0
    assert not canary.exists()
