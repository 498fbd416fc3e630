"""JSON arrays, HTML files, and limits on one document; the other formats are in test_readers.py."""

import gzip
import json
import random
from dataclasses import replace

import pytest
import zstandard

from megalite.config.schema_data import CleanStepConfig, ReaderConfig
from megalite.data.format import TokenStore
from megalite.data_tools.builder.building import build_store
from megalite.data_tools.formats import FORMATS, format_of, json_rows
from megalite.data_tools.store_tools.inspection import inspect_documents
from megalite.errors import DataError
from tests.data_tools.corpora import TRICKY, build_config, texts
from tests.data_tools.test_readers import SKIP, STOP, read, texts_of


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        *((f"a.b.{name}", name) for name in FORMATS),
        *((f"A.{name.upper()}.GZ", name) for name in FORMATS if name != "parquet"),
        *(("x.htm", "html"), ("x.xhtml.zst", "html"), ("x.ndjson", "jsonl"), ("x.json.zst", "json")),
        *(("x.parquet.gz", None), ("x.gz", None), ("json", None), ("x.md", None), (".json", "json")),
    ],
)
def test_format_of_a_name(tmp_path, name, expected):
    assert format_of(tmp_path / name) == expected


# JSON ---------------------------------------------------------------------------------------------------------------


def rows_of(rng: random.Random) -> list[dict]:
    return [{"n": rng.random(), "text": text, "more": {"text": [text[:9], None, 7, True]}} for text in texts(20)]


@pytest.mark.parametrize("read_at_once", [1, 7, 4096, 1 << 20])
@pytest.mark.parametrize("layout", ["array", "indented", "one after another", "lines"])
def test_json_gives_the_same_documents_however_it_is_cut(tmp_path, monkeypatch, layout, read_at_once):
    monkeypatch.setattr(json_rows, "_READ_AT_ONCE", read_at_once)
    rows = rows_of(random.Random(0))
    if read_at_once < 100:
        rows = [row for row in rows if len(row["text"]) < 500][-12:]
    dumped = [json.dumps(row, ensure_ascii=i % 2 == 0) for i, row in enumerate(rows)]
    text = {
        "array": f" [{','.join(dumped)}]\n",
        "indented": json.dumps(rows, indent=3, ensure_ascii=False),
        "one after another": "".join(dumped),
        "lines": "\r\n".join(dumped),
    }[layout]
    path = tmp_path / "x.json"
    path.write_bytes(b"\xef\xbb\xbf" + text.encode())
    documents, _ = read(path)
    assert [d.text for d in documents] == [row["text"] for row in rows]
    assert [d.id for d in documents[:2]] == ["x.json:1", "x.json:2"]


@pytest.mark.parametrize("ending", ["json.gz", "json.zst"])
def test_compressed_json(tmp_path, ending):
    data = json.dumps([{"text": text} for text in TRICKY]).encode()
    compress = gzip.compress if ending.endswith("gz") else zstandard.compress
    (tmp_path / f"x.{ending}").write_bytes(compress(data))
    assert texts_of(tmp_path / f"x.{ending}") == list(TRICKY)


GOOD = '{"text": "a"}'


@pytest.mark.parametrize(
    ("text", "reason", "kept"),
    [
        (f"[{GOOD}, 7, {GOOD}]", r"item 2: not a JSON object \(a int\)", 2),
        (f"[{GOOD}, {{}}]", "item 2: missing text", 1),
        (f'[{GOOD}, {{"text": "b", "text": "c"}}]', "item 2: duplicate key \\('text'\\)", 1),
        (f'[{GOOD}, {{"text": "caf\xe9"}}, {GOOD}]', "item 2: invalid Unicode", 2),
        (f"[{GOOD}, {GOOD}", r"x\.json: broken JSON \(the array does not end\)", 2),
        (f"[{GOOD}, {GOOD},]", r"x\.json: broken JSON", 2),
        (f"[{GOOD} {GOOD}]", r"x\.json: broken JSON \(expected , or \]", 1),
        (f"[{GOOD}, {{'text': 1}}]", r"x\.json: broken JSON", 1),
        (f'[{GOOD}, {{"text": "b', r"x\.json: broken JSON \(Unterminated string", 1),
        (f"[{GOOD}] {GOOD}", r"x\.json: broken JSON \(something follows", 1),
        (f"[{GOOD}, {'[' * 100_000}", r"x\.json: broken JSON", 1),
        ("[]", r"x\.json: empty file", 0),
        ("  \n", r"x\.json: empty file", 0),
        ("not json at all", r"x\.json: broken JSON", 0),
    ],
)
def test_bad_json(tmp_path, text, reason, kept):
    path = tmp_path / "x.json"
    path.write_bytes(text.encode("latin-1"))
    with pytest.raises(DataError, match=reason):
        read(path, STOP)
    documents, report = read(path, SKIP)
    assert len(documents) == kept
    assert sum(report.skipped.values()) == 1


def test_rows_that_one_json_reader_takes_and_the_other_does_not(tmp_path):
    """orjson reads deeper nesting than Python, and both have a longest number."""
    deep = '{"text": "deep", "m": ' + "[" * 1015 + "]" * 1015 + ', "a": {"text": 1}}'
    (tmp_path / "x.jsonl").write_text(f'{deep}\n{{"text": "b", "n": {"9" * 5000}}}\n{{"text": "c"}}\n')
    documents, report = read([tmp_path / "x.jsonl"], SKIP)
    assert [document.text for document in documents] in (["deep", "b", "c"], ["deep", "c"])
    assert report.skipped.total() == 3 - len(documents)


def test_a_number_of_too_many_digits_ends_a_json_file(tmp_path):
    (tmp_path / "x.json").write_text(f'[{{"text": "a"}}, {{"text": "b", "n": {"9" * 5000}}}]')
    with pytest.raises(DataError, match="broken JSON"):
        read([tmp_path / "x.json"], STOP)
    documents, report = read([tmp_path / "x.json"], SKIP)
    assert [document.text for document in documents] == ["a"]
    assert report.skipped == {"broken JSON": 1}


def test_a_number_at_the_edge_of_what_was_read_is_whole(tmp_path, monkeypatch):
    monkeypatch.setattr(json_rows, "_READ_AT_ONCE", 1)
    (tmp_path / "x.json").write_text(f"[1234567, {GOOD}, -12.5e+7, 1.25E-10]")
    documents, report = read(tmp_path / "x.json", SKIP)
    assert [d.text for d in documents] == ["a"]
    assert report.skipped == {"not a JSON object": 3}


def test_broken_json_is_said_before_the_rest_is_read(tmp_path, monkeypatch):
    reads = []
    original = json_rows._Items._read
    monkeypatch.setattr(json_rows, "_READ_AT_ONCE", 100)
    monkeypatch.setattr(json_rows._Items, "_read", lambda self: reads.append(1) or original(self))
    (tmp_path / "x.json").write_text(f"[{GOOD}, {{nonsense}}, " + f"{GOOD}, " * 100_000)
    with pytest.raises(DataError, match="broken JSON"):
        read(tmp_path / "x.json")
    assert len(reads) < 5


@pytest.mark.parametrize("ending", ["json", "jsonl"])
def test_missing_columns_of_json(tmp_path, ending):
    (tmp_path / f"x.{ending}").write_text('{"body": "a"}')
    with pytest.raises(DataError, match="no column 'text'; found: body"):
        read(tmp_path / f"x.{ending}", SKIP)


# HTML ---------------------------------------------------------------------------------------------------------------

PAGE = "<html><head><title>no</title></head><body><p>wo<b>rd</b> é&amp;</p><p>你好</p></body></html>"


@pytest.mark.parametrize("name", ["x.html", "x.htm", "x.HTML.gz", "x.html.zst"])
def test_a_page_is_a_document(tmp_path, name):
    data = PAGE.encode()
    data = gzip.compress(data) if name.endswith("gz") else zstandard.compress(data) if name.endswith("zst") else data
    (tmp_path / name).write_bytes(data)
    documents, _ = read(tmp_path / name)
    assert [(d.text, d.id) for d in documents] == [("word é&\n\n你好", f"{name}:1")]


@pytest.mark.parametrize(
    ("charset", "encoding"),
    [("gb2312", "gb18030"), ("GBK", "gbk"), ("big5", "big5"), ("Shift_JIS", "shift_jis"), ("utf-8", "utf-8")],
)
@pytest.mark.parametrize(
    "meta", ['<meta charset="{}">', '<META http-equiv=Content-Type content="text/html; charset={}">']
)
def test_the_charset_of_a_page(tmp_path, meta, charset, encoding):
    text = "日本" if encoding != "gb18030" else "镕日本"  # not in GB 2312, in pages that say so
    (tmp_path / "x.html").write_bytes(f"<head>{meta.format(charset)}</head>{text}".encode(encoding))
    assert texts_of(tmp_path / "x.html") == [text]


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"<p>caf\xe9", r"invalid UTF-8 \(byte 6\)"),
        (b"<meta charset=gbk><p>\xff\xff", r"invalid UTF-8 \(nor is the page gbk, as it says\)"),
        (b"<meta charset=zlib><p>\xff\xff", r"invalid UTF-8 \(nor is the page zlib"),
        (b"<meta charset=klingon><p>\xff\xff", r"invalid UTF-8 \(nor is the page klingon"),
        (b"<script>x()</script><div></div>", "empty document"),
        (b"<div>" * 20_000, r"broken HTML \(elements nested deeper"),
    ],
)
def test_bad_pages(tmp_path, data, reason):
    (tmp_path / "x.html").write_bytes(data)
    with pytest.raises(DataError, match=rf"x\.html, line 1: {reason}"):
        read(tmp_path / "x.html")
    assert sum(read(tmp_path / "x.html", SKIP)[1].skipped.values()) == 1


ESCAPED = "<p>Write <code>&lt;body&gt;</code> first &amp;amp; then</p><pre>&lt;p&gt;\n&lt;/p&gt;</pre>"


@pytest.mark.parametrize("clean", ["html", "nfc"])
def test_the_text_is_taken_out_of_a_page_once(tmp_path, tokenizer_path, clean):
    """By the step that is there for it, or else by the reader."""
    folder = tmp_path / "in"
    folder.mkdir()
    for i, page in enumerate(("<html><body>{}</body></html>", "{}", "text first {}", "# heading\n```\n{}")):
        page = "<meta charset=gbk>" + page.format(f"{ESCAPED}<div>好{i}</div>")
        (folder / f"{i}.html").write_bytes(page.encode("gbk"))
    bare = texts_of(folder)
    assert all("Write <body> first &amp; then" in text and "<p>\n</p>" in text for text in bare)
    steps = (CleanStepConfig(step=clean),)
    build_store(build_config([folder], tmp_path / "out", tokenizer_path, clean=steps, validation_fraction=0.0))
    assert stored(tmp_path / "out") == bare


def test_the_extractor_of_the_step_is_that_of_html_files(tmp_path, tokenizer_path):
    body = "".join(f"<p>{f'This is a long sentence of the article, number {i}. ' * 3}</p>" for i in range(9))
    page = f"<html><body><nav><a href='/'>Menu entry</a></nav><article>{body}</article></body></html>"
    (tmp_path / "x.html").write_text(page)
    for extractor, holds in (("all", True), ("trafilatura", False)):
        steps = (CleanStepConfig(step="html", options={"extractor": extractor}),)
        build_store(build_config([tmp_path / "x.html"], tmp_path / extractor, tokenizer_path, clean=steps))
        (text,) = stored(tmp_path / extractor)
        assert ("Menu entry" in text) == holds
        assert "article, number 8" in text


def stored(out) -> list[str]:
    (path,) = out.glob("*/*/manifest.json")
    return [document.text for document in inspect_documents(TokenStore.open(path.parent), 9)]


# One document -------------------------------------------------------------------------------------------------------

LIMIT = 100


@pytest.mark.parametrize(
    "ending", ["jsonl", "jsonl.gz", "json", "html", "parquet", "txt", "line.txt", "blank_line.txt"]
)
def test_a_document_over_the_limit(tmp_path, ending):
    small, large = "a" * (LIMIT - 40), "b" * (LIMIT + 40)
    config = ReaderConfig(max_document_bytes=LIMIT)
    path = tmp_path / f"x.{ending}"
    if ending.startswith("jsonl"):
        data = "".join(json.dumps({"text": text}) + "\n" for text in (small, large, large * 50_000, small)).encode()
        path.write_bytes(gzip.compress(data, 1) if ending.endswith("gz") else data)
        config = replace(config, max_document_bytes=LIMIT if ending == "jsonl" else 100_000)
        expected = [small, small] if ending == "jsonl" else [small, large, small]
    elif ending == "json":
        path.write_text(json.dumps([{"text": text} for text in (small, large, small)]))
        expected = [small, small]
    elif ending == "parquet":
        import pyarrow as pa
        import pyarrow.parquet as pq

        pq.write_table(pa.table({"text": [small, large, small]}), path)
        expected = [small, small]
    elif ending in ("html", "txt"):
        path.write_text(large)
        expected = []
    else:
        config = replace(config, document=ending.split(".")[0])
        blank = "\n" if ending.startswith("line") else "\n\n"
        long = large if ending.startswith("line") else "\n".join([small, small, small])
        path.write_text(blank.join([small, long, small, large * 9, small]) + "\n")
        expected = [small] * 3
    with pytest.raises(DataError, match=r"x\..*: document too large \(over reader\.max_document_bytes="):
        read(path, config)
    documents, report = read(path, replace(config, on_bad="skip"))
    assert [d.text for d in documents] == expected
    assert set(report.skipped) == {"document too large"}
    assert read(path, replace(config, max_document_bytes=10**8))[1].skipped == {}
