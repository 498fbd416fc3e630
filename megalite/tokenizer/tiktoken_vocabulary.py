"""Vocabularies of the tiktoken library: r50k_base, p50k_base, cl100k_base, o200k_base."""

import binascii
import hashlib
from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from megalite.errors import DataError
from megalite.log import get_logger
from megalite.tokenizer.base import (
    check_text,
    config_text,
    digest_of,
    library_errors,
    name_of,
    read_file,
    save_files,
)

log = get_logger(__name__)

TIKTOKEN_ENDING = ".tiktoken"
_END = "<|endoftext|>"
# Tokens in the files that OpenAI published, special ones not counted.
_SIZES = {"r50k_base": 50_256, "p50k_base": 50_280, "cl100k_base": 100_256, "o200k_base": 199_998}


class TiktokenTokenizer:
    """A .tiktoken file: tokens in base64 with their ranks, a line each.

    How text is cut into words is not in the file: the library knows it by the file's name.
    """

    def __init__(self, path: Path):
        """Load `path`. Raises `DataError` when it is missing, damaged, or not named as the library names it."""
        self._data = read_file(path)
        self._stem = path.name.removesuffix(TIKTOKEN_ENDING)
        self._encoding = _load_tiktoken(path, self._stem, self._data)
        self.name = name_of(path)
        self.vocab_size = self._encoding.max_token_value + 1
        self.end_of_document = self.begin_of_document = self._encoding.encode_single_token(_END)
        self.end_of_document_text = _END
        self.unknown: int | None = None
        self.special_tokens = dict(self._encoding._special_tokens)
        self._control = set(self.special_tokens.values())

    @cached_property
    def digest(self) -> str:
        """See `Tokenizer`."""
        return digest_of(f"tiktoken {self._stem}", self.end_of_document, [self._data])

    def encode(self, text: str) -> list[int]:
        """See `Tokenizer`."""
        check_text(text)
        return self._encoding.encode_ordinary(text)

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """See `Tokenizer`."""
        return [self.encode(text) for text in texts]

    def decode(self, ids: Iterable[int]) -> str:
        """See `Tokenizer`."""
        return self.decode_bytes(ids).decode("utf-8", errors="replace")

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """See `Tokenizer`."""
        try:
            return self._encoding.decode_bytes([i for i in ids if i not in self._control])
        except (KeyError, OverflowError) as error:
            raise DataError(f"the tokenizer {self.name} has no token for an id: {error}") from None

    def library_json(self) -> dict[str, Any] | None:
        """See `Tokenizer`."""
        return None

    def save(self, folder: Path) -> None:
        """See `Tokenizer`."""
        save_files(folder, {self._stem + TIKTOKEN_ENDING: self._data}, config_text("tiktoken", self))


def _load_tiktoken(path: Path, name: str, data: bytes) -> Any:
    """The library's object; what it needs beside the ranks comes from its own table of encodings."""
    try:
        import tiktoken
        import tiktoken_ext.openai_public as known
    except ModuleNotFoundError:
        raise DataError(
            f"tokenizer {path}: tiktoken's files need one more package: pip install megalite[data]"
        ) from None
    if name not in _SIZES:
        raise DataError(
            f"tokenizer {path}: how text is cut is not in the file, and its name is not one of "
            + ", ".join(name + TIKTOKEN_ENDING for name in _SIZES)
        )
    ranks = _parse_ranks(path, data)
    published: list[str | None] = []

    def read(_: str, expected_hash: str | None = None) -> dict[bytes, int]:
        published.append(expected_hash)
        return ranks

    # The library's own reader keeps copies in a folder of temporary files, by the path's name: not what is in the file.
    download = known.load_tiktoken_bpe
    known.load_tiktoken_bpe = read
    try:
        spec = known.ENCODING_CONSTRUCTORS[name]()
    finally:
        known.load_tiktoken_bpe = download
    _check_ranks(path, ranks, _SIZES[name], set(spec["special_tokens"].values()))
    if hashlib.sha256(data).hexdigest() not in published:
        log.warning("tokenizer %s is not the file that was published under this name (its SHA-256 differs)", path)
    spec.pop("explicit_n_vocab", None)
    with library_errors(path):
        return tiktoken.Encoding(**spec)


def _parse_ranks(path: Path, data: bytes) -> dict[bytes, int]:
    """The rank of each token. Raises `DataError` for a line that is not a token and its rank, and for one twice."""
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(data.splitlines(), start=1):
        token, _, rank = line.partition(b" ")
        try:
            if not token or not rank.isdigit() or len(rank) > 9:
                raise ValueError
            text = binascii.a2b_base64(token, strict_mode=True)
        except ValueError:
            raise DataError(
                f"tokenizer {path} is not valid, or is damaged: line {number}: expected a token in base64 and its "
                f"rank, found {line[:80].decode(errors='replace')!r}"
            ) from None
        if text in ranks:
            raise DataError(f"tokenizer {path} is damaged: line {number}: the token {text!r} was there before")
        ranks[text] = int(rank)
    return ranks


def _check_ranks(path: Path, ranks: dict[bytes, int], size: int, special: set[int]) -> None:
    """Raise `DataError` unless there are `size` tokens, a token for every byte, and every rank from 0 once."""
    if len(ranks) != size:
        raise DataError(
            f"tokenizer {path} is damaged, cut short, or wrongly named: {len(ranks):,} tokens, expected {size:,}; "
            "copy it again"
        )
    expected = [rank for rank in range(size + len(special)) if rank not in special][:size]
    for found, rank in zip(sorted(ranks.values()), expected, strict=True):
        if found != rank:
            raise DataError(f"tokenizer {path} is damaged: found a token of rank {found}, expected rank {rank}")
    if missing := [byte for byte in range(256) if bytes([byte]) not in ranks]:
        raise DataError(f"tokenizer {path} is damaged: no token for {len(missing)} bytes, such as 0x{missing[0]:02X}")
