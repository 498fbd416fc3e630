import gzip
import json
import os
import zlib
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from megalite.config.schema_data import ReaderConfig
from megalite.data_tools.readers import Document, ReadReport, find_files, iter_documents
from megalite.errors import ConfigError, DataError
from tests.data_tools.corpora import TRICKY, write_jsonl

STOP, SKIP = ReaderConfig(), ReaderConfig(on_bad="skip")


def read(path, config: ReaderConfig = STOP) -> tuple[list[Document], ReadReport]:
    report = ReadReport()
    inputs = [str(p) for p in (path if isinstance(path, list) else [path])]
    return list(iter_documents(inputs, config, report)), report


def texts_of(path, config: ReaderConfig = STOP) -> list[str]:
    return [document.text for document in read(path, config)[0]]


def write_parquet(path: Path, columns: dict, **options) -> Path:
    pq.write_table(pa.table(columns), path, write_page_checksum=True, **options)
    return path


GOOD = [*TRICKY, "plain"]


@pytest.mark.parametrize("ending", ["jsonl", "jsonl.gz", "jsonl.zst", "parquet"])
def test_every_format_gives_the_same_documents(tmp_path, ending):
    path = tmp_path / f"books.{ending}"
    lines = "".join(json.dumps({"text": text}) + "\n" for text in GOOD).encode()
    if ending == "parquet":
        write_parquet(path, {"text": GOOD, "other": list(range(len(GOOD)))}, row_group_size=3)
    elif ending == "jsonl.zst":
        half = len(lines) // 2  # two frames, as appended files have
        path.write_bytes(zstandard.compress(lines[:half]) + zstandard.compress(lines[half:]))
    else:
        path.write_bytes(gzip.compress(lines) if ending.endswith("gz") else lines)
    documents, report = read(path)
    assert [d.text for d in documents] == GOOD
    assert [d.num_bytes for d in documents] == [len(text.encode()) for text in GOOD]
    assert documents[2].id == f"books.{ending}:3"
    assert {(d.source, d.language, d.split) for d in documents} == {("books", "", None)}
    assert (report.files, report.documents, dict(report.skipped)) == (1, len(GOOD), {})


@pytest.mark.parametrize("make", ["string", "large_string", "string_view", "dictionary", "chunks"])
def test_string_types_of_parquet(tmp_path, make):
    types = {"string": pa.string(), "large_string": pa.large_string(), "string_view": pa.string_view()}
    array = pa.array(["a", "b", "a"], types.get(make, pa.string()))
    if make == "dictionary":
        array = array.dictionary_encode()
    if make == "chunks":
        array = pa.chunked_array([["a"], [], ["b", "a"]])
    assert texts_of(write_parquet(tmp_path / "x.parquet", {"text": array}, row_group_size=1)) == ["a", "b", "a"]


COLUMNS = ReaderConfig(
    text_column="body", id_column="key", source_column="from", language_column="lang", split_column="part"
)


@pytest.mark.parametrize("ending", ["jsonl", "parquet"])
def test_columns(tmp_path, ending):
    row = {"body": "text", "key": 7, "from": "book é", "lang": "en", "part": "validation"}
    if ending == "jsonl":
        path = write_jsonl(tmp_path / "x.jsonl", [row])
    else:
        path = write_parquet(tmp_path / "x.parquet", {key: [value] for key, value in row.items()})
    assert read(path, COLUMNS)[0] == [Document("text", 4, "7", "book é", "en", "validation")]


TEXT = "first\r\nparagraph\n\n \n\n  second\nhere\r\n\r\nthird"


@pytest.mark.parametrize(
    ("document", "expected"),
    [
        ("file", [TEXT]),
        ("line", ["first", "paragraph", "  second", "here", "third"]),
        ("blank_line", ["first\r\nparagraph", "  second\nhere", "third"]),
    ],
)
def test_documents_of_text_files(tmp_path, document, expected):
    (tmp_path / "x.txt").write_bytes(TEXT.encode())
    documents, _ = read(tmp_path / "x.txt", ReaderConfig(document=document))
    assert [d.text for d in documents] == expected
    first_lines = {"file": [1], "line": [1, 2, 6, 7, 9], "blank_line": [1, 6, 9]}
    assert [d.id for d in documents] == [f"x.txt:{number}" for number in first_lines[document]]


def test_byte_order_mark_is_not_text(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfhello")
    (tmp_path / "b.jsonl").write_bytes(b'\xef\xbb\xbf{"text": "hi"}')
    assert texts_of([tmp_path / "a.txt", tmp_path / "b.jsonl"]) == ["hello", "hi"]


def test_blank_lines_and_missing_last_newline_of_jsonl(tmp_path):
    (tmp_path / "x.jsonl").write_bytes(b'\n{"text": "a"}\r\n  \n{"text": "b"}')
    assert texts_of(tmp_path / "x.jsonl") == ["a", "b"]


# Rows ---------------------------------------------------------------------------------------------------------------

BAD_LINES = [
    (b'{"text": "caf\xe9"}', "invalid UTF-8"),
    (b'{"text": "cut', "broken JSON"),
    (b"[" * 100_000, "broken JSON"),
    (b'["text"]', "not a JSON object"),
    (b'{"text": null}', "missing text"),
    (b'{"other": "x"}', "missing text"),
    (b'{"text": 7}', "text is no text"),
    (b'{"text": "\\ud800"}', "invalid Unicode"),
    (b'{"text": ""}', "empty document"),
    (b'{"text": " \\n\\t"}', "empty document"),
]


@pytest.mark.parametrize(("line", "reason"), BAD_LINES)
def test_bad_line_stops_or_is_counted(tmp_path, line, reason):
    path = tmp_path / "x.jsonl"
    path.write_bytes(b'{"text": "a"}\n' + line + b'\n{"text": "b"}\n')
    with pytest.raises(DataError, match=rf"x\.jsonl, line 2: {reason}.*reader\.on_bad=skip"):
        read(path, STOP)
    documents, report = read(path, SKIP)
    assert [d.text for d in documents] == ["a", "b"]
    assert (report.documents, dict(report.skipped)) == (2, {reason: 1})


def invalid_utf8_column() -> pa.Array:
    return pa.Array.from_buffers(
        pa.string(), 3, [None, pa.py_buffer(b"\0\0\0\0\1\0\0\0\2\0\0\0\3\0\0\0"), pa.py_buffer(b"a\xffb")]
    )


@pytest.mark.parametrize(
    ("column", "reason"),
    [
        (invalid_utf8_column(), "invalid UTF-8"),
        (invalid_utf8_column().dictionary_encode(), "invalid UTF-8"),
        (["a", None, "b"], "missing text"),
        (["a", "", "b"], "empty document"),
    ],
)
def test_bad_row_of_parquet_stops_or_is_counted(tmp_path, column, reason):
    path = write_parquet(tmp_path / "x.parquet", {"text": column})
    with pytest.raises(DataError, match=rf"x\.parquet, row 2: {reason}"):
        read(path, STOP)
    documents, report = read(path, SKIP)
    assert [d.text for d in documents] == ["a", "b"]
    assert dict(report.skipped) == {reason: 1}


@pytest.mark.parametrize(("document", "position"), [("file", 1), ("line", 2), ("blank_line", 1)])
def test_invalid_utf8_of_text_files(tmp_path, document, position):
    (tmp_path / "x.txt").write_bytes(b"good\nb\xe9d\n\nfine")
    config = ReaderConfig(document=document)
    with pytest.raises(DataError, match=rf"x\.txt, line {position}: invalid UTF-8"):
        read(tmp_path / "x.txt", config)
    documents, report = read(tmp_path / "x.txt", replace(config, on_bad="skip"))
    assert [d.text for d in documents] == {"file": [], "line": ["good", "fine"], "blank_line": ["fine"]}[document]
    assert dict(report.skipped) == {"invalid UTF-8": 1}


@pytest.mark.parametrize("name", ["", " ", "a/b", "..", ".hidden", "-x", "a\nb", "x" * 101, "a\\b"])
def test_unfit_source_names(tmp_path, name):
    path = write_jsonl(tmp_path / "x.jsonl", [{"text": "a", "from": name}])
    with pytest.raises(DataError, match="unfit source name"):
        read(path, ReaderConfig(source_column="from"))
    assert read(path, ReaderConfig(source_column="from", on_bad="skip"))[1].skipped == {"unfit source name": 1}
    with pytest.raises(ConfigError, match=r"reader\.source"):
        read(path, ReaderConfig(source=name))


@pytest.mark.parametrize("on_bad", ["stop", "skip"])
def test_split_that_is_not_one_is_always_an_error(tmp_path, on_bad):
    path = write_jsonl(tmp_path / "x.jsonl", [{"text": "a", "part": "train"}, {"text": "b", "part": "test"}])
    with pytest.raises(DataError, match="line 2: split 'test' in column 'part', allowed: train, validation"):
        read(path, ReaderConfig(split_column="part", on_bad=on_bad))


# Files --------------------------------------------------------------------------------------------------------------


def good_bytes(ending: str, tmp_path: Path, count: int = 2000) -> bytes:
    rows = [f"document {i} " + os.urandom(40).hex() for i in range(count)]
    lines = "".join(json.dumps({"text": text}) + "\n" for text in rows).encode()
    if ending == "jsonl.gz":
        return gzip.compress(lines)
    if ending == "jsonl.zst":
        return zstandard.compress(lines)
    return write_parquet(tmp_path / "whole", {"text": rows}, row_group_size=100).read_bytes()


def flip_page_bit(data: bytes) -> bytes:
    middle = len(data) // 2
    return data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :]


DAMAGES = {
    "empty": lambda data: b"",
    "truncated": lambda data: data[: len(data) * 2 // 3],
    "cut tail": lambda data: data[:-5],
    "garbage": lambda data: bytes(range(256)) * 20,
}


@pytest.mark.parametrize(
    ("ending", "damage"),
    [*((ending, damage) for ending in ("jsonl.gz", "jsonl.zst", "parquet") for damage in DAMAGES), ("parquet", "flip")],
)
def test_damaged_file_stops_or_is_counted(tmp_path, ending, damage):
    (tmp_path / "in").mkdir()
    path = tmp_path / f"in/b.{ending}"
    data = good_bytes(ending, tmp_path)
    path.write_bytes(flip_page_bit(data) if damage == "flip" else DAMAGES[damage](data))
    write_jsonl(tmp_path / "in/a.jsonl", [{"text": "before"}])
    write_jsonl(tmp_path / "in/c.jsonl", [{"text": "after"}])
    reason = "empty file" if damage == "empty" else "damaged or unreadable file"
    with pytest.raises(DataError, match=rf"b\.{ending}: {reason}"):
        read(tmp_path / "in", STOP)
    documents, report = read(tmp_path / "in", SKIP)
    assert [documents[0].text, documents[-1].text] == ["before", "after"]
    assert len(documents) < 2002 or damage == "cut tail"
    assert (report.files, dict(report.skipped)) == (3, {reason: 1})


@pytest.mark.parametrize("ending", ["txt", "jsonl"])
def test_empty_plain_file(tmp_path, ending):
    (tmp_path / f"x.{ending}").touch()
    with pytest.raises(DataError, match="empty file"):
        read(tmp_path / f"x.{ending}", STOP)
    assert read(tmp_path / f"x.{ending}", SKIP)[1].skipped == {"empty file": 1}


def test_files_without_a_row_are_empty(tmp_path):
    write_parquet(tmp_path / "a.parquet", {"text": pa.array([], pa.string())})
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(b""))
    (tmp_path / "c.txt").write_text(" \n\n")
    for path in sorted(tmp_path.iterdir()):
        with pytest.raises(DataError, match="empty file"):
            read(path, ReaderConfig(document="line"))
    assert read(tmp_path, ReaderConfig(on_bad="skip", document="line"))[1].skipped == {"empty file": 3}


@pytest.mark.parametrize("ending", ["gz", "zst"])
def test_all_that_can_be_read_before_the_damage_is_kept(tmp_path, ending):
    data = good_bytes(f"jsonl.{ending}", tmp_path, 20_000)  # several of zstd's blocks
    path = tmp_path / f"x.jsonl.{ending}"
    path.write_bytes(data[: len(data) // 2])
    new_frame = zstandard.ZstdDecompressor().decompressobj() if ending == "zst" else zlib.decompressobj(31)
    readable = new_frame.decompress(path.read_bytes()).count(b"\n")
    assert readable > 500
    assert len(read(path, SKIP)[0]) == readable


def test_several_gzip_members_and_padding_are_one_file(tmp_path):
    path = tmp_path / "x.jsonl.gz"
    path.write_bytes(gzip.compress(b'{"text": "a"}\n') + b"\0" * 512 + gzip.compress(b'{"text": "b"}\n') + b"\0" * 99)
    assert [document.text for document in read(path)[0]] == ["a", "b"]
    data = bytearray(path.read_bytes())
    data[-103] ^= 1  # the last member's length
    path.write_bytes(data)
    with pytest.raises(DataError, match="damaged or unreadable file"):
        read(path)


def test_two_columns_of_one_name(tmp_path):
    table = pa.table([pa.array(["a"]), pa.array(["b"])], names=["text", "text"])
    pq.write_table(table, tmp_path / "x.parquet")
    with pytest.raises(DataError, match=r"x\.parquet: 2 columns are called 'text'"):
        read(tmp_path / "x.parquet")


@pytest.mark.parametrize("on_bad", ["stop", "skip"])
@pytest.mark.parametrize("ending", ["jsonl", "parquet", "txt"])
def test_missing_column_is_always_an_error(tmp_path, ending, on_bad):
    path = tmp_path / f"x.{ending}"
    if ending == "jsonl":
        write_jsonl(path, [{"body": "a", "title": "b"}])
    elif ending == "parquet":
        write_parquet(path, {"body": ["a"], "title": ["b"]})
    else:
        path.write_text("a")
    config = ReaderConfig(on_bad=on_bad, split_column="part" if ending == "txt" else None)
    missing, found = ("'part'", "text") if ending == "txt" else ("'text'", "body, title")
    with pytest.raises(DataError, match=rf"no column {missing}; found: {found}"):
        read(path, config)


@pytest.mark.parametrize("on_bad", ["stop", "skip"])
@pytest.mark.parametrize("column", [[1, 2], [["a"]], [b"raw"], [{"a": "b"}]])
def test_column_of_an_unfit_type_is_always_an_error(tmp_path, column, on_bad):
    path = write_parquet(tmp_path / "x.parquet", {"text": column})
    with pytest.raises(DataError, match=r"column 'text' has type .*, expected strings"):
        read(path, ReaderConfig(on_bad=on_bad))


def test_unreadable_file(tmp_path, monkeypatch):
    path = write_jsonl(tmp_path / "x.jsonl", [{"text": "a"}])

    def refuse(*args, **kwargs):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("builtins.open", refuse)
    with pytest.raises(DataError, match=r"unreadable file.*Permission denied"):
        read(path, STOP)
    assert read(path, SKIP)[1].skipped == {"damaged or unreadable file": 1}


def test_zst_without_the_extra(tmp_path, monkeypatch):
    (tmp_path / "x.jsonl.zst").write_bytes(zstandard.compress(b'{"text": "a"}'))
    monkeypatch.setitem(__import__("sys").modules, "zstandard", None)
    with pytest.raises(DataError, match=r"pip install megalite\[data\]"):
        read(tmp_path / "x.jsonl.zst", SKIP)


# Finding files --------------------------------------------------------------------------------------------------------


def test_folders_globs_and_order(tmp_path):
    for name in (
        "b.txt",
        "a.jsonl.gz",
        "sub/c.parquet",
        "sub/deep/ü d.txt",
        ".hidden/e.txt",
        "_SUCCESS.txt",
        "note.md",
    ):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("x")
    below = [p.relative_to(tmp_path).as_posix() for p in find_files([str(tmp_path)], "auto")]
    assert below == ["a.jsonl.gz", "b.txt", "sub/c.parquet", "sub/deep/ü d.txt"]
    inputs = [str(tmp_path / "sub/**/*.txt"), str(tmp_path / "b.txt"), str(tmp_path / "*.txt")]
    assert [p.name for p in find_files(inputs, "auto")] == ["ü d.txt", "b.txt", "_SUCCESS.txt"]


def test_the_same_file_is_read_once(tmp_path):
    write_jsonl(tmp_path / "a.jsonl", [{"text": "a"}])
    os.link(tmp_path / "a.jsonl", tmp_path / "b.jsonl")
    (tmp_path / "c.jsonl").symlink_to(tmp_path / "a.jsonl")
    assert len(find_files([str(tmp_path), str(tmp_path / "a.jsonl")], "auto")) == 1


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ([], "input is empty"),
        (["gone.txt"], "does not exist and matches no file"),
        (["*.parquet"], "matches no file"),
        (["folder"], "holds no file that ends in .txt, .jsonl, .json, .html, .parquet"),
        (["note.md"], "tells no format. Known: .*reader.format"),
        (["dangling.txt"], "link to a file that does not exist"),
    ],
)
@pytest.mark.parametrize("on_bad", ["stop", "skip"])
def test_inputs_that_cannot_be_found(tmp_path, monkeypatch, inputs, message, on_bad):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder/x.md").touch()
    (tmp_path / "note.md").touch()
    (tmp_path / "dangling.txt").symlink_to("nowhere")
    with pytest.raises(DataError, match=message):
        read(inputs, ReaderConfig(on_bad=on_bad))


def test_format_that_the_ending_does_not_tell(tmp_path):
    write_jsonl(tmp_path / "x.data", [{"text": "a"}])
    assert texts_of(tmp_path / "x.data", ReaderConfig(format="jsonl")) == ["a"]


def test_default_source_is_the_first_input(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("books/a.txt", "other.v2.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("x")
    assert {d.source for d in read(["books", "other.v2.txt"])[0]} == {"books"}
    assert {d.source for d in read(["other.v2.txt"])[0]} == {"other"}
    assert {d.source for d in read(["*/*.txt"])[0]} == {"a"}
    assert {d.source for d in read(["books"], ReaderConfig(source="mine"))[0]} == {"mine"}


def test_messages_never_show_the_text(tmp_path, caplog):
    path = tmp_path / "x.jsonl"
    path.write_bytes(b'{"text": "a"}\n{"text": "my secret \xff"}\n{"text": "my secret')
    read(path, SKIP)
    with pytest.raises(DataError) as error:
        read(path, STOP)
    assert "secret" not in caplog.text + str(error.value)
