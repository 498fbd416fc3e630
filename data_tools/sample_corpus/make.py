"""Make corpus.parquet from the two raw files; README.md tells where they come from.

python data_tools/sample_corpus/make.py tinyshakespeare.txt tang_poems.jsonl [corpus.parquet]
"""

import json
import re
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

DOCUMENT_BYTES = 2000
VALIDATION_SHARE = 0.1  # of Shakespeare's characters, at the end; of the poems every tenth


def shakespeare_documents(text: str) -> list[str]:
    """The text cut behind blank lines into documents of about 2 kB; joined again they are the text."""
    documents, current = [], ""
    for paragraph in re.findall(r".+?(?:\n\n+|\Z)", text, flags=re.DOTALL):
        if current and len((current + paragraph).encode()) > DOCUMENT_BYTES:
            documents.append(current)
            current = ""
        current += paragraph
    return [*documents, current]


def shakespeare_rows(text: str) -> list[dict[str, str]]:
    """One row a document; those that reach into the last tenth of the characters are validation."""
    rows, end = [], 0
    for number, document in enumerate(shakespeare_documents(text)):
        end += len(document)
        split = "validation" if end > (1 - VALIDATION_SHARE) * len(text) else "train"
        rows.append(_row(f"shakespeare-{number:04d}", "shakespeare", "en", document, split))
    return rows


def tang_rows(lines: list[str]) -> list[dict[str, str]]:
    """One row a poem; every tenth is validation."""
    rows = []
    for number, line in enumerate(lines, start=1):
        poem = json.loads(line)
        rows.append(_row(poem["id"], "tang", "zh", poem["text"], "validation" if number % 10 == 0 else "train"))
    return rows


def write(rows: list[dict[str, str]], path: Path) -> None:
    """One parquet file with page checksums, which the reader verifies."""
    pq.write_table(
        pa.Table.from_pylist(rows, pa.schema([(name, pa.string()) for name in rows[0]])),
        path,
        compression="zstd",
        compression_level=22,
        data_page_size=1 << 24,
        row_group_size=len(rows),
        use_dictionary=["source", "language", "split"],
        write_page_checksum=True,
    )


def _row(id_: str, source: str, language: str, text: str, split: str) -> dict[str, str]:
    return {"id": id_, "source": source, "language": language, "text": text, "split": split}


if __name__ == "__main__":
    shakespeare = Path(sys.argv[1]).read_bytes().decode()
    tang = Path(sys.argv[2]).read_bytes().decode().splitlines()
    output = Path(sys.argv[3]) if len(sys.argv) > 3 else Path(__file__).with_name("corpus.parquet")
    write(shakespeare_rows(shakespeare) + tang_rows(tang), output)
