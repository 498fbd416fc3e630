"""GPT-2's two files, vocab.json and merges.txt, and what can be told of their being whole."""

import json
import re
from pathlib import Path

from megalite.errors import DataError

# Entries that no merge makes: <s>, <|endoftext|>, [SEP], and fairseq's filling up to a round number.
_NAMES = re.compile(r"<.*>|\[.*\]|madeupword\d+")


def byte_characters() -> dict[str, int]:
    """GPT-2's alphabet, character to byte: printable ones are themselves, the others are U+0100 and up, in order."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(0x100 + n): byte for n, byte in enumerate(others)}


def parse_pair_encoding(
    vocabulary_path: Path, merges_path: Path, vocabulary_text: bytes, merges_text: bytes, end: str | None
) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Ids by token, and the merges in their order. `end`: the token that ends documents, when known.

    Raises `DataError` for files that are damaged, cut short, or of two tokenizers.
    """
    try:
        vocabulary = json.loads(vocabulary_text)
    except ValueError as error:
        raise DataError(f"tokenizer {vocabulary_path} is not valid JSON, or is damaged: {error}") from None
    if not isinstance(vocabulary, dict) or not all(type(i) is int and 0 <= i < 2**31 for i in vocabulary.values()):
        raise DataError(f"tokenizer {vocabulary_path}: expected an object of token and id, 0 and up")
    merges = _parse_merges(merges_path, merges_text)
    known = set(byte_characters()) | {left + right for left, right in merges} | {end}
    if cut := [token for token in vocabulary if token not in known and not _NAMES.fullmatch(token)]:
        raise DataError(
            f"tokenizer {merges_path} is cut short, or is not that of {vocabulary_path}: its {len(merges):,} merges "
            f"make all but {len(cut):,} of {len(vocabulary):,} tokens, such as {cut[-1]!r}; copy both files again"
        )
    return vocabulary, merges


def _parse_merges(path: Path, content: bytes) -> list[tuple[str, str]]:
    try:
        lines = content.decode().split("\n")
    except UnicodeDecodeError as error:
        raise DataError(f"tokenizer {path} is not valid UTF-8, or is damaged: {error}") from None
    merges = []
    for number, line in enumerate(lines, start=1):
        tokens = line.removesuffix("\r").split(" ")
        if len(tokens) == 2 and all(tokens) and tokens[0] != "#version:":
            merges.append((tokens[0], tokens[1]))
        elif line.strip() and not line.startswith("#version"):
            raise DataError(f"tokenizer {path}, line {number}: expected two tokens, found {line[:80]!r}")
    return merges
