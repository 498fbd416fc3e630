"""Damaged manifests, shards and indexes are refused or read; they never crash, hang or eat the machine's memory."""

import json
import os
import random
import shutil
import signal
import time
from pathlib import Path
from typing import Literal

import numpy as np
import pytest

from megalite.config.schema_data import DataConvertConfig, DataRepairConfig, GivenTokenizerConfig
from megalite.data.files import digest_file
from megalite.data.format import TokenStore
from megalite.data.manifest import MANIFEST
from megalite.data.writer import StoreWriter
from megalite.data_tools.megatron.from_store import export_store
from megalite.data_tools.megatron.to_store import import_dataset
from megalite.data_tools.store_tools.repairing import repair_store
from megalite.data_tools.store_tools.stats import store_stats
from megalite.errors import DataError, MegaliteError
from tests.data_tools.megatron_files import write_current, write_legacy
from tests.mutants import Outcome, limit_memory, mutate_bytes, mutate_json, run_mutants
from tests.stores import NamedTokenizer

IN_MAKE_TEST, IN_MAKE_SOAK = 200, 10_000


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """Two stores and two datasets of Megatron, to be damaged."""
    root = tmp_path_factory.mktemp("whole")
    rng = np.random.default_rng(0)
    for name, vocab_size in (("narrow", 300), ("wide", 70_000)):
        with StoreWriter(root / name, vocab_size=vocab_size, end_of_document=0, shard_tokens=200) as writer:
            for _ in range(30):
                writer.add_document(rng.integers(1, vocab_size, rng.integers(0, 40)), 9)
            if name == "wide":
                writer.add_tokenizer(NamedTokenizer("a"))
    documents = [[rng.integers(1, 300, rng.integers(0, 20)).tolist() for _ in range(3)] for _ in range(10)]
    (root / "current").mkdir()
    (root / "legacy").mkdir()
    write_current(root / "current/x", documents)
    write_legacy(root / "legacy/x", documents, "int64")
    return root


def read_mutant(whole: Path, number: int, scratch: Path) -> None:
    """Damage one file of a copy, and let every reader loose on it."""
    rng = random.Random(number)
    name = rng.choice(("narrow", "narrow", "wide", "current", "legacy"))
    copy = scratch / "mutant"
    shutil.copytree(whole / name, copy)
    file = rng.choice(sorted(path for path in copy.rglob("*") if path.is_file()))
    if file.name == MANIFEST or (name in ("narrow", "wide") and rng.random() < 0.3):
        file = copy / MANIFEST
        file.write_text(mutate_json(json.loads(file.read_text()), rng), encoding="utf-8")
    else:
        file.write_bytes(mutate_bytes(file.read_bytes(), rng))
        if name in ("narrow", "wide") and rng.random() < 0.6:
            resign(copy, file)
    limit_memory(sum(path.stat().st_size for path in copy.rglob("*")))
    if name in ("current", "legacy"):
        read_dataset(copy, scratch)
    else:
        read_store(copy, scratch)
    shutil.rmtree(scratch)


def resign(store: Path, file: Path) -> None:
    """Size and digest of a file as a faulty writer would have told them."""
    manifest = json.loads((store / MANIFEST).read_text())
    for shard in manifest["shards"]:
        for record in shard.values():
            if record["file"] == file.name:
                record |= {"bytes": file.stat().st_size, "digest": digest_file(file)}
    itemsize = {"uint16": 2, "uint32": 4}[manifest["dtype"]]
    manifest["num_tokens"] = sum(shard["tokens"]["bytes"] for shard in manifest["shards"]) // itemsize
    manifest["num_documents"] = sum(shard["document_bytes"]["bytes"] for shard in manifest["shards"]) // 8
    (store / MANIFEST).write_text(json.dumps(manifest))


def read_dataset(copy: Path, scratch: Path) -> None:
    config = DataConvertConfig(
        input=str(copy / "x"),
        output=str(scratch / "out"),
        tokenizer=GivenTokenizerConfig(),
        vocab_size=300,
        end_of_document=0,
        inner_ends="split",
    )
    import_dataset(config)
    TokenStore.open(scratch / "out").verify()


def read_store(copy: Path, scratch: Path) -> None:
    """Each reader by itself; the first refusal is raised in the end."""
    refusals: list[MegaliteError] = []
    readers = (read_all, verify, read_stats, repair_it, repair_and_keep, export_it)
    for number, reader in enumerate(readers):
        try:
            reader(copy, scratch / str(number))
        except MegaliteError as error:
            refusals.append(error)
    if refusals:
        raise refusals[0]


def read_all(copy: Path, output: Path) -> None:
    store = TokenStore.open(copy)
    assert len(store.tokens(0, store.num_tokens)) == store.num_tokens
    if store.num_tokens > 9:
        store.read_rows([0, store.num_tokens - 9], np.empty((2, 9), np.int64))
        store.document_at(np.arange(store.num_tokens))
    assert len(store.bytes_of_documents(0, store.num_documents)) == store.num_documents
    for index in range(store.num_documents):
        assert len(store.document(index)) > 0


def verify(copy: Path, output: Path) -> None:
    TokenStore.open(copy).verify()


def read_stats(copy: Path, output: Path) -> None:
    store_stats(TokenStore.open(copy), top=5)


def repair_it(copy: Path, output: Path, unverified: Literal["drop", "keep"] = "drop") -> None:
    """What is repaired is whole."""
    config = DataRepairConfig(
        store=str(copy), output=str(output), tokenizer=GivenTokenizerConfig(), unverified=unverified
    )
    if repair_store(config):
        store = TokenStore.open(output)
        store.verify()
        assert store.num_documents > 0


def repair_and_keep(copy: Path, output: Path) -> None:
    repair_it(copy, output, unverified="keep")


def export_it(copy: Path, output: Path) -> None:
    export_store(DataConvertConfig(input=str(copy), output=str(output), tokenizer=GivenTokenizerConfig()))


def rewrite(copy: Path, **changes) -> None:
    manifest = json.loads((copy / MANIFEST).read_text())
    (copy / MANIFEST).write_text(json.dumps(manifest | changes))


def wrapped_offsets(copy: Path) -> None:
    """Offsets that increase as signed differences, which wrap around."""
    file = copy / "document_offsets_00000.bin"
    offsets = np.fromfile(file, "<u8")
    offsets[1:4] = (5, 2**63 + 1, 2**64 - 1)
    offsets.tofile(file)
    resign(copy, file)


def tokenizer_record(folder: str, file: str) -> dict:
    record = {"file": file, "bytes": 1, "digest": ""}
    return {"tokenizer": {"name": "a", "digest": "", "folder": folder, "files": [record]}}


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda copy: rewrite(copy, num_bytes=10**400), "number is infinity"),
        (lambda copy: rewrite(copy, num_bytes=10**30), "num_bytes: expected a whole number"),
        (lambda copy: rewrite(copy, num_bytes=2**63 + 1), "num_bytes 9223372036854775809, allowed: 0 to"),
        (lambda copy: rewrite(copy, num_bytes=-1), "num_bytes -1, allowed: 0 to"),
        (lambda copy: rewrite(copy, vocab_size=2**40), "vocab_size 1099511627776, allowed: 0 to 4294967296"),
        (lambda copy: rewrite(copy, **tokenizer_record("..", "../x")), "'..', which is not inside the store"),
        (lambda copy: rewrite(copy, **tokenizer_record("t", "x")), "'x', which is not in the tokenizer's folder 't'"),
        (wrapped_offsets, "offsets do not increase|do not follow one another"),
    ],
)
def test_what_mutants_have_found(whole, tmp_path, damage, message):
    copy = tmp_path / "copy"
    shutil.copytree(whole / "wide", copy)
    damage(copy)
    with pytest.raises(DataError, match=message):
        TokenStore.open(copy).verify()
    with pytest.raises(DataError, match=message):
        read_all(copy, tmp_path)


def test_a_name_that_no_file_can_have(whole, tmp_path):
    """Found when the file is looked at: reading tokens needs no tokenizer."""
    copy = tmp_path / "copy"
    shutil.copytree(whole / "wide", copy)
    rewrite(copy, **tokenizer_record("tokenizer", "tokenizer/" + 300 * "x"))
    with pytest.raises(DataError, match="cannot be read: File name too long"):
        TokenStore.open(copy).verify()


def check(outcome: Outcome, count: int) -> None:
    shown = "\n".join(f"mutant {number}: {what}" for number, what in list(outcome.bad.items())[:10])
    assert not outcome.bad, f"{len(outcome.bad)} of {count} mutants:\n{shown}"
    assert outcome.read + outcome.refused.total() == count
    assert outcome.refused["DataError"] > count / 2, "most mutants should be found out"
    assert outcome.read > count / 50, "and some should be readable, or nothing but the first check was tried"


def test_mutants(whole, tmp_path):
    check(run_mutants(range(IN_MAKE_TEST), lambda *mutant: read_mutant(whole, *mutant), tmp_path), IN_MAKE_TEST)


@pytest.mark.soak
def test_many_mutants(whole, tmp_path):
    check(run_mutants(range(IN_MAKE_SOAK), lambda *mutant: read_mutant(whole, *mutant), tmp_path), IN_MAKE_SOAK)


def test_what_must_not_be_is_noticed(tmp_path):
    """The harness itself, on mutants that do what none may do."""

    def misbehave(number: int, scratch: Path) -> None:
        limit_memory(1000)
        if number == 3:
            os.kill(os.getpid(), signal.SIGSEGV)
        if number == 5:
            time.sleep(9)
        if number == 7:
            np.empty(100 << 20, np.uint8)
        if number == 8:
            raise DataError("as it should be")
        if number == 9:
            raise IndexError("not for a user")

    outcome = run_mutants(range(60), misbehave, tmp_path, seconds=0.3)
    assert (outcome.read, dict(outcome.refused)) == (55, {"DataError": 1})
    assert outcome.bad.keys() == {3, 5, 7, 9}
    assert outcome.bad[3] == "ended by SIGSEGV"
    assert outcome.bad[5] == "took longer than 0.3 s"
    assert "MemoryError" in outcome.bad[7]
    assert "IndexError: not for a user" in outcome.bad[9]
