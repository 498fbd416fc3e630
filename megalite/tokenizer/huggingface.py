"""Tokenizers of the `tokenizers` library."""

import json
from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from megalite.errors import DataError
from megalite.tokenizer.base import (
    CONFIG,
    END_OF_DOCUMENT_NAMES,
    GPT2_FILES,
    HF_JSON,
    check_text,
    config_text,
    configured_end,
    digest_of,
    name_of,
    read_config,
    read_file,
    save_files,
)


class HuggingFaceTokenizer:
    """A tokenizer of the `tokenizers` library: tokenizer.json, or GPT-2's vocab.json and merges.txt."""

    def __init__(self, files: tuple[Path, ...], end_of_document: str | None = None):
        """`files`: (tokenizer.json,) or (vocab.json, merges.txt). `end_of_document`: the token's text, when known."""
        self._files = {name: read_file(path) for name, path in zip(_canonical_names(files), files, strict=True)}
        path = files[0]
        self._tokenizer = _load_hugging_face(files)
        # Otherwise `<|endoftext|>` spelled out in a document would become the control id.
        self._tokenizer.encode_special_tokens = True
        self._tokenizer.no_padding()
        self._tokenizer.no_truncation()
        vocabulary = self._tokenizer.get_vocab(with_added_tokens=True)
        if not vocabulary:
            raise DataError(f"tokenizer {path} has no tokens: it is damaged, or not a tokenizer")
        self.name = name_of(path)
        self.vocab_size = max(vocabulary.values()) + 1
        self.end_of_document_text = end_of_document or _end_of_document_name(path, vocabulary)
        if self.end_of_document_text not in vocabulary:
            raise DataError(
                f"tokenizer {path} has no token {self.end_of_document_text!r}, which {CONFIG} names as its last one"
            )
        self.end_of_document = vocabulary[self.end_of_document_text]
        self.begin_of_document = next(iter(self._tokenizer.encode("").ids), self.end_of_document)
        added = self._tokenizer.get_added_tokens_decoder()
        self._control = {self.end_of_document} | {i for i, token in added.items() if token.special}
        self._added = {i: token.content for i, token in added.items()}
        content = json.loads(self._tokenizer.to_str())
        self._byte_level = (content["decoder"] or {}).get("type") == "ByteLevel"
        self.unknown = vocabulary.get(content["model"].get("unk_token") or "")

    @cached_property
    def digest(self) -> str:
        """See `Tokenizer`."""
        return digest_of("huggingface", self.end_of_document, list(self._files.values()))

    def encode(self, text: str) -> list[int]:
        """See `Tokenizer`."""
        check_text(text)
        return self._tokenizer.encode(text, add_special_tokens=False).ids

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """See `Tokenizer`."""
        for text in texts:
            check_text(text)
        return [encoding.ids for encoding in self._tokenizer.encode_batch(list(texts), add_special_tokens=False)]

    def decode(self, ids: Iterable[int]) -> str:
        """See `Tokenizer`."""
        return self.decode_bytes(ids).decode("utf-8", errors="replace")

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """See `Tokenizer`."""
        ids = [i for i in ids if i not in self._control]
        if not self._byte_level:
            return self._tokenizer.decode(ids, skip_special_tokens=False).encode()
        return b"".join(self._token_bytes(i) for i in ids)

    def library_json(self) -> dict[str, Any] | None:
        """See `Tokenizer`."""
        return json.loads(self._tokenizer.to_str())

    def save(self, folder: Path) -> None:
        """See `Tokenizer`."""
        save_files(folder, self._files, config_text("huggingface", self, end_of_document=self.end_of_document_text))

    def _token_bytes(self, i: int) -> bytes:
        if i in self._added:
            return self._added[i].encode()
        token = self._tokenizer.id_to_token(i)
        if token is None:
            raise DataError(f"token id {i} is not in the tokenizer {self.name}, whose ids end at {self.vocab_size - 1}")
        return bytes(self._byte_of_character[character] for character in token)

    @cached_property
    def _byte_of_character(self) -> dict[str, int]:
        """GPT-2's alphabet: printable bytes stand for themselves, the others for U+0100 and up, in order."""
        printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
        others = [byte for byte in range(256) if byte not in printable]
        return {chr(byte): byte for byte in printable} | {chr(0x100 + n): byte for n, byte in enumerate(others)}


def _load_hugging_face(files: tuple[Path, ...]) -> Any:
    """The library's object; whatever it says about a damaged file becomes a `DataError`."""
    from tokenizers import Tokenizer as LibraryTokenizer
    from tokenizers import decoders, models, pre_tokenizers

    try:
        if len(files) == 1:
            return LibraryTokenizer.from_file(str(files[0]))
        tokenizer = LibraryTokenizer(models.BPE.from_file(str(files[0]), str(files[1])))
    except Exception as error:  # the library raises plain Exception
        raise DataError(f"tokenizer {files[0]} is not valid, or is damaged: {error}") from None
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _end_of_document_name(path: Path, vocabulary: dict[str, int]) -> str:
    configured = configured_end(read_config(path.parent / CONFIG))
    if configured:
        return configured
    for name in END_OF_DOCUMENT_NAMES:
        if name in vocabulary:
            return name
    raise DataError(
        f"tokenizer {path} has none of {', '.join(END_OF_DOCUMENT_NAMES)} to end documents with: name its token as "
        f"eos_token in {path.parent / CONFIG}"
    )


def _canonical_names(files: tuple[Path, ...]) -> tuple[str, ...]:
    return (HF_JSON,) if len(files) == 1 else GPT2_FILES
