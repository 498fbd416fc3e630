"""A table: everything that is known to go wrong with input files and texts -> what becomes of it.

A row of it names the input, how to make it, and one of: the message of an error that no setting turns off; the message
of the error and what is counted and kept with reader.on_bad=skip; or the texts that are read although it looks bad.
"""

import gzip
import json
import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from megalite.config.schema_data import ReaderConfig
from megalite.data_tools import formats
from megalite.errors import ConfigError, DataError
from tests.data_tools.corpora import write_jsonl
from tests.data_tools.test_readers import STOP, flip_page_bit, good_bytes, read, write_parquet

DAMAGED = "damaged or unreadable file"


@dataclass
class Case:
    row: str
    make: Callable[[Path], object]  # puts the input below a folder; may give back what to read instead of the folder
    error: str | None = None
    skipped: dict[str, int] | None = None  # None with an error: always one
    texts: list[str] | int | None = None  # or how many
    config: ReaderConfig = STOP


def put(name: str, data: bytes | str) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data if isinstance(data, bytes) else data.encode())
        return path

    return make


def lines(*rows: str) -> str:
    return "".join(row + "\n" for row in rows)


A, B = '{"text": "a"}', '{"text": "b"}'


def damaged(ending: str, damage: Callable[[bytes], bytes]) -> Callable[[Path], Path]:
    return lambda folder: put(f"x.{ending}", damage(good_bytes(ending, folder.parent)))(folder)


def parquet(**columns) -> Callable[[Path], Path]:
    return lambda folder: write_parquet(folder / "x.parquet", columns)


def parquet_groups(*groups: list[str]) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        with pq.ParquetWriter(folder / "x.parquet", pa.schema([("text", pa.string())])) as writer:
            for group in groups:
                writer.write_table(pa.table({"text": pa.array(group, pa.string())}))
        return folder / "x.parquet"

    return make


def unsupported_codec(folder: Path) -> Path:
    path = write_parquet(folder / "x.parquet", {"text": ["a" * 50]}, compression="snappy")
    data = path.read_bytes()
    # In the footer the codec follows the column's name: field 4, an i32, 1 is Snappy and 3 LZO, each doubled.
    assert data.count(b"\x18\x04text\x15\x02") == 1
    path.write_bytes(data.replace(b"\x18\x04text\x15\x02", b"\x18\x04text\x15\x06"))
    return path


def encrypted(folder: Path) -> Path:
    from pyarrow.parquet import encryption

    class Kms(encryption.KmsClient):
        def wrap_key(self, key_bytes, master_key_identifier):
            return key_bytes.hex()

        def unwrap_key(self, wrapped_key, master_key_identifier):
            return bytes.fromhex(wrapped_key)

    factory = encryption.CryptoFactory(lambda _: Kms())
    config = encryption.EncryptionConfiguration(footer_key="k", column_keys={"k": ["text"]})
    properties = factory.file_encryption_properties(encryption.KmsConnectionConfig(), config)
    pq.write_table(pa.table({"text": ["a"]}), folder / "x.parquet", encryption_properties=properties)
    return folder / "x.parquet"


def two_schemas(second: dict) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        write_parquet(folder / "a.parquet", {"text": ["a"], "n": [1]})
        write_parquet(folder / "b.parquet", second)
        return folder

    return make


def bomb(compress: Callable[[bytes], bytes], ending: str) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        write_jsonl(folder / "a.jsonl", [{"text": "a"}])
        put(f"x.jsonl.{ending}", compress(b"\0" * (40 << 20)))(folder)
        return folder

    return make


def links(folder: Path) -> Path:
    write_jsonl(folder / "a.jsonl", [{"text": "a"}])
    os.link(folder / "a.jsonl", folder / "b.jsonl")
    (folder / "c.jsonl").symlink_to("a.jsonl")
    return folder


def directory_loop(folder: Path) -> Path:
    write_jsonl(folder / "a.jsonl", [{"text": "a"}])
    (folder / "sub").mkdir()
    (folder / "sub/up").symlink_to("..")
    return folder


def dangling_link(folder: Path) -> Path:
    write_jsonl(folder / "a.jsonl", [{"text": "a"}])
    (folder / "x.jsonl").symlink_to("gone")
    return folder


def link_loop(folder: Path) -> Path:
    (folder / "x.jsonl").symlink_to("y.jsonl")
    (folder / "y.jsonl").symlink_to("x.jsonl")
    return folder


def named_parquet(folder: Path) -> Path:
    """As Spark writes them."""
    (folder / "x.parquet").mkdir()
    write_parquet(folder / "x.parquet/part-00000.snappy.parquet", {"text": ["a"]})
    put("x.parquet/_SUCCESS", "")(folder)
    return folder / "x.parquet"


def empty_directory(folder: Path) -> Path:
    (folder / "x.parquet").mkdir()
    return folder / "x.parquet"


def odd_names(folder: Path) -> Path:
    for name in ("-x y.jsonl", "überß 春眠.jsonl", "a'b\"c$d.jsonl", "tab\tname.jsonl"):
        put(name, A)(folder)
    return folder


NO_TARGET = "link to a file that does not exist"
LONE = '{"text": "\\ud800"}'
CASES = [
    # Files
    Case("0-byte", put("x.jsonl", ""), "empty file", {"empty file": 1}, []),
    Case("truncated parquet", damaged("parquet", lambda data: data[:-100]), DAMAGED, {DAMAGED: 1}, []),
    Case("wrong magic", put("x.parquet", b"PAR2" + bytes(200) + b"PAR2"), DAMAGED, {DAMAGED: 1}, []),
    Case("wrong magic, gz", put("x.jsonl.gz", b"not gzip at all"), DAMAGED, {DAMAGED: 1}, []),
    Case("bit-flipped page", damaged("parquet", flip_page_bit), DAMAGED, {DAMAGED: 1}),
    Case("no text column", parquet(body=["a"]), "no column 'text'; found: body"),
    Case("wrong-typed column", parquet(text=[1, 2]), "column 'text' has type int64, expected strings"),
    Case("nested column", parquet(text=[{"a": "b"}]), "column 'text' has type struct"),
    Case("list column", parquet(text=[["a"]]), "column 'text' has type list"),
    Case("binary column", parquet(text=[b"a"]), "column 'text' has type binary"),
    Case("dictionary column", parquet(text=pa.array(["a", "b", "a"]).dictionary_encode()), texts=["a", "a", "b"]),
    Case("large_string column", parquet(text=pa.array(["a"], pa.large_string())), texts=["a"]),
    Case("null column", parquet(text=pa.nulls(2)), "row 1: missing text", {"missing text": 2}, []),
    Case("zero row groups", parquet_groups(), "empty file", {"empty file": 1}, []),
    Case("row group with 0 rows", parquet_groups(["a"], [], ["b"]), texts=["a", "b"]),
    Case("schema differs: no column", two_schemas({"body": ["b"]}), r"b\.parquet: no column 'text'"),
    Case("schema differs: type", two_schemas({"text": [1]}), r"b\.parquet: column 'text' has type int64"),
    Case("schema differs: others", two_schemas({"m": [1], "text": ["b"]}), texts=["a", "b"]),
    Case("unsupported codec", unsupported_codec, DAMAGED, {DAMAGED: 1}, []),
    Case("encrypted", encrypted, rf"x\.parquet: {DAMAGED} \(.*encrypted", {DAMAGED: 1}, []),
    Case(
        "broken line", put("x.jsonl", lines(A, '{"text": ', B)), "line 2: broken JSON", {"broken JSON": 1}, ["a", "b"]
    ),
    Case("no trailing newline", put("x.jsonl", f"{A}\n{B}"), texts=["a", "b"]),
    Case("BOM", put("x.jsonl", f"\ufeff{A}"), texts=["a"]),
    Case("CRLF", put("x.jsonl", f"{A}\r\n{B}\r\n"), texts=["a", "b"]),
    Case(
        "one huge line",
        put("x.jsonl", lines(A, '{"text": "' + "x" * 5_000_000, B)),
        "line 2: document too large",
        {"document too large": 1},
        ["a", "b"],
        ReaderConfig(max_document_bytes=1_000_000),
    ),
    Case(
        "duplicate keys",
        put(
            "x.jsonl", lines(A, '{"text": "a", "n": {"text": 1}, "text" : "b"}', '{"text":"b","n":{"text":1,"text":2}}')
        ),
        r"line 2: duplicate key \('text'\)",
        {"duplicate key": 1},
        ["a", "b"],
    ),
    Case(
        "NaN",
        put("x.jsonl", lines('{"text": "a", "n": NaN}', '{"text": NaN}', '{"n": -Infinity, "text": "b"}')),
        "line 2: text is no text",
        {"text is no text": 1},
        ["a", "b"],
    ),
    *(
        Case(f"cut short, {ending}", damaged(f"jsonl.{ending}", lambda data: data[:-50]), DAMAGED, {DAMAGED: 1})
        for ending in ("gz", "zst")
    ),
    *(
        Case(f"zip bomb, {ending}", bomb(compress, ending), "decompression bomb", {"decompression bomb": 1}, ["a"])
        for ending, compress in (("gz", gzip.compress), ("zst", zstandard.compress))
    ),
    Case("directory named x.parquet", named_parquet, texts=["a"]),
    Case("empty directory named x.parquet", empty_directory, "holds no file that ends in"),
    Case("dangling symlink", dangling_link, NO_TARGET, {NO_TARGET: 1}, ["a"]),
    Case("dangling symlink, glob", lambda f: dangling_link(f) / "*.jsonl", NO_TARGET, {NO_TARGET: 1}, ["a"]),
    Case("dangling symlink, named", lambda f: dangling_link(f) / "x.jsonl", NO_TARGET),
    Case("symlink loop", link_loop, NO_TARGET, {NO_TARGET: 2}, []),
    Case("symlink loop, glob", lambda f: link_loop(f) / "*.jsonl", NO_TARGET, {NO_TARGET: 2}, []),
    Case("symlink loop of directories", directory_loop, texts=["a"]),
    Case("symlink loop of directories, glob", lambda f: directory_loop(f) / "**/*.jsonl", texts=["a"]),
    Case("same file twice, by path", lambda f: [put("x.jsonl", A)(f)] * 2, texts=["a"]),
    Case("same file twice, by link", links, texts=["a"]),
    Case("glob matching nothing", lambda f: f / "*.jsonl", "does not exist and matches no file"),
    Case("paths with spaces, Unicode, dash", odd_names, texts=["a"] * 4, config=ReaderConfig(source="odd")),
    Case("many files", lambda f: [put(f"{i}.jsonl", A)(f) for i in range(300)] and f, texts=300),
    # Text
    Case("empty doc", put("x.jsonl", lines('{"text": ""}', A)), "empty document", {"empty document": 1}, ["a"]),
    Case("whitespace only", put("x.jsonl", lines('{"text": " \\n\\u3000"}', A)), "empty", {"empty document": 1}, ["a"]),
    Case("null", put("x.jsonl", lines('{"text": null}', A)), "missing text", {"missing text": 1}, ["a"]),
    Case("invalid UTF-8", put("x.jsonl", b'{"text": "\xff"}\n' + A.encode()), "UTF-8", {"invalid UTF-8": 1}, ["a"]),
    Case("lone surrogate", put("x.jsonl", lines(LONE, A)), "invalid Unicode", {"invalid Unicode": 1}, ["a"]),
    Case("NUL and control chars", put("x.jsonl", '{"text": "a\\u0000\\u001b\\u0085"}'), texts=["a\0\x1b\x85"]),
    Case("RTL, zero-width", put("x.jsonl", '{"text": "\\u202ea\\u200b"}'), texts=["\u202ea\u200b"]),
    Case("only HTML", put("x.html", "<div><p></p></div>"), "line 1: empty document", {"empty document": 1}, []),
    Case("unclosed tags, CDATA, nested comments", put("x.html", "<p>a <!-- <!-- --><b><![CDATA[b]]>"), texts=["a b"]),
    Case("inline tags inside words", put("x.html", "<p>wo<b>rd</b></p>"), texts=["word"]),
    Case("one repeated char", put("x.jsonl", json.dumps({"text": "x" * 2_000_000})), texts=["x" * 2_000_000]),
    Case("longer than 4192 bytes", put("x.jsonl", json.dumps({"text": "é " * 5000})), texts=["é " * 5000]),
    Case("special tokens", put("x.jsonl", '{"text": "<s>a</s> <|endoftext|>"}'), texts=["<s>a</s> <|endoftext|>"]),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.row)
def test_what_becomes_of_it(tmp_path, case):
    folder = tmp_path / "in"
    folder.mkdir()
    source = case.make(folder) or folder
    skip = replace(case.config, on_bad="skip")
    if case.error is not None:
        with pytest.raises(DataError, match=case.error) as error:
            read(source, case.config)
        assert len(str(error.value)) < 1000
        if case.skipped is None:
            with pytest.raises(DataError, match=case.error):
                read(source, skip)
            return
    documents, report = read(source, skip)
    assert dict(report.skipped) == (case.skipped or {})
    found = [document.text for document in documents]
    assert case.texts is None or (
        len(found) == case.texts if isinstance(case.texts, int) else sorted(found) == case.texts
    )


def test_the_table_names_each_row_once():
    rows = [case.row for case in CASES]
    assert len(rows) == len(set(rows))


@pytest.mark.parametrize("ending", ["jsonl", "txt", "jsonl.gz", "json"])
@pytest.mark.parametrize("change", ["grows", "shrinks", "is replaced"])
def test_a_file_that_changes_while_it_is_read(tmp_path, monkeypatch, ending, change):
    data = lines(*[A] * 20_000)
    path = put(f"x.{ending}", gzip.compress(data.encode()) if ending.endswith("gz") else data)(tmp_path)
    size = path.stat().st_size

    def alter(config: ReaderConfig):
        path.write_bytes(gzip.compress(data.encode(), mtime=1) if ending.endswith("gz") else data.encode())
        for i, row in enumerate(formats.iter_rows(path, ending.removesuffix(".gz"), ["text"], config)):
            if i == 0:
                if change == "is replaced":
                    put("new", path.read_bytes())(tmp_path).rename(path)
                else:
                    os.truncate(path, size + (512 if change == "grows" else -size // 2))
            yield row

    with pytest.raises(formats.BadFileError, match=r"changed while it was read|damaged|broken JSON"):
        list(alter(ReaderConfig(document="line")))


def test_a_name_that_begins_with_a_dash_is_no_source(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    put("-x.jsonl", A)(Path())
    with pytest.raises(ConfigError, match=r"unfit source name .*set reader\.source"):
        read("-x.jsonl")
    assert [d.source for d in read("-x.jsonl", ReaderConfig(source="x"))[0]] == ["x"]
