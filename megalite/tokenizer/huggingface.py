"""Tokenizers of the `tokenizers` library."""

from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import orjson

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
    library_errors,
    name_of,
    read_config,
    read_file,
    save_files,
)
from megalite.tokenizer.gpt2_files import byte_characters, parse_pair_encoding
from megalite.tokenizer.text_only import special_tokens, without_tokens


class HuggingFaceTokenizer:
    """A tokenizer of the `tokenizers` library: tokenizer.json, or GPT-2's vocab.json and merges.txt."""

    def __init__(self, files: tuple[Path, ...], end_of_document: str | None = None):
        """`files`: (tokenizer.json,) or (vocab.json, merges.txt). `end_of_document`: the token's text, when known."""
        self._files = {name: read_file(path) for name, path in zip(_canonical_names(files), files, strict=True)}
        path = files[0]
        library = _load_hugging_face(files, list(self._files.values()), end_of_document)
        vocabulary = library.get_vocab(with_added_tokens=True)
        _check_ids(path, vocabulary)
        self.name = name_of(path)
        self.vocab_size = max(vocabulary.values()) + 1
        self.end_of_document_text = end_of_document or _end_of_document_name(path, library, vocabulary)
        if self.end_of_document_text not in vocabulary:
            raise DataError(
                f"tokenizer {path} has no token {self.end_of_document_text!r}, which {CONFIG} names as its last one"
            )
        self.end_of_document = vocabulary[self.end_of_document_text]
        self.begin_of_document = next(iter(library.encode("").ids), self.end_of_document)
        content = orjson.loads(library.to_str())
        self.special_tokens = special_tokens(content, self.end_of_document_text, self.end_of_document)
        special = {token["id"] for token in content["added_tokens"] if token["special"]}
        self._control = {self.end_of_document} | special & set(self.special_tokens.values())
        self._added = {token["id"]: token["content"] for token in content["added_tokens"]}
        self.unknown = vocabulary.get(content["model"].get("unk_token") or "", content["model"].get("unk_id"))
        self._byte_level = (content["decoder"] or {}).get("type") == "ByteLevel"
        if self._byte_level and self.unknown is None:
            _check_alphabet(path, vocabulary)
        self._library = library  # all tokens, to decode with
        self._encoder, self._text = _text_encoder(path, library, content, self.special_tokens)

    @cached_property
    def digest(self) -> str:
        """See `Tokenizer`."""
        return digest_of("huggingface", self.end_of_document, list(self._files.values()))

    def encode(self, text: str) -> list[int]:
        """See `Tokenizer`."""
        check_text(text)
        return self._encoder.encode(text, add_special_tokens=False).ids

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """See `Tokenizer`."""
        for text in texts:
            check_text(text)
        return [encoding.ids for encoding in self._encoder.encode_batch(list(texts), add_special_tokens=False)]

    def decode(self, ids: Iterable[int]) -> str:
        """See `Tokenizer`."""
        return self.decode_bytes(ids).decode("utf-8", errors="replace")

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """See `Tokenizer`."""
        ids = [i for i in ids if i not in self._control]
        if not self._byte_level:
            return self._library.decode(ids, skip_special_tokens=False).encode()
        return b"".join(self._token_bytes(i) for i in ids)

    def library_json(self) -> dict[str, Any] | None:
        """See `Tokenizer`."""
        return orjson.loads(self._text or self._encoder.to_str())

    def save(self, folder: Path) -> None:
        """See `Tokenizer`."""
        save_files(folder, self._files, config_text("huggingface", self, end_of_document=self.end_of_document_text))

    def _token_bytes(self, i: int) -> bytes:
        if i in self._added:
            return self._added[i].encode()
        token = self._library.id_to_token(i)
        if token is None:
            raise DataError(f"token id {i} is not in the tokenizer {self.name}, whose ids end at {self.vocab_size - 1}")
        return bytes(self._byte_of_character[character] for character in token)

    @cached_property
    def _byte_of_character(self) -> dict[str, int]:
        return byte_characters()


def _load_hugging_face(files: tuple[Path, ...], contents: list[bytes], end: str | None) -> Any:
    """The library's object; whatever it says about a damaged file becomes a `DataError`."""
    from tokenizers import Tokenizer as LibraryTokenizer
    from tokenizers import decoders, models, pre_tokenizers

    if len(files) == 1:
        with library_errors(files[0]):
            tokenizer = LibraryTokenizer.from_buffer(contents[0])
    else:
        vocabulary, merges = parse_pair_encoding(files[0], files[1], contents[0], contents[1], end)
        with library_errors(files[0]):
            tokenizer = LibraryTokenizer(models.BPE(vocabulary, merges))
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
    # Settings of training, some of which random (Provilkov et al. 2020); encoding gives a text's one and only ids.
    if isinstance(tokenizer.model, models.BPE):
        tokenizer.model.dropout = None
    tokenizer.no_padding()
    tokenizer.no_truncation()
    return tokenizer


def _text_encoder(path: Path, library: Any, content: dict[str, Any], tokens: dict[str, int]) -> tuple[Any, str | None]:
    """The library's object that reads none of `tokens` in a text, and its tokenizer.json where that is another one.

    As text: parsed it takes ten times the memory, in every worker of a build.
    """
    encoder, text = library, None
    if (reduced := without_tokens(content, tokens)) is not None:
        text = orjson.dumps(reduced).decode()
        with library_errors(path):
            encoder = type(library).from_str(text)
    encoder.encode_special_tokens = True
    return encoder, text


def _check_ids(path: Path, vocabulary: dict[str, int]) -> None:
    """Raise `DataError` for a vocabulary that is empty, gives one id twice, or leaves most ids out."""
    if not vocabulary:
        raise DataError(f"tokenizer {path} has no tokens: it is damaged, or not a tokenizer")
    tokens = {i: token for token, i in vocabulary.items()}
    if len(tokens) < len(vocabulary):
        token, i = next((token, i) for token, i in vocabulary.items() if tokens[i] != token)
        raise DataError(f"tokenizer {path} is damaged: its tokens {token!r} and {tokens[i]!r} both have id {i}")
    if (last := max(tokens)) > 8 * len(tokens) + 1000:
        raise DataError(
            f"tokenizer {path} is damaged: token {tokens[last]!r} has id {last}, of {len(tokens)} tokens altogether"
        )


def _check_alphabet(path: Path, vocabulary: dict[str, int]) -> None:
    """Raise `DataError` for a byte-level vocabulary without a byte that UTF-8 is written in."""
    never = {0xC0, 0xC1, *range(0xF5, 0x100)}
    missing = [byte for character, byte in byte_characters().items() if character not in vocabulary]
    if missing := sorted(set(missing) - never):
        raise DataError(
            f"tokenizer {path} has no token for {len(missing)} of the bytes that text is made of, such as "
            f"0x{missing[0]:02X}, and would drop them without a trace"
        )


def _end_of_document_name(path: Path, library: Any, vocabulary: dict[str, int]) -> str:
    configured = configured_end(path.parent / CONFIG, read_config(path.parent / CONFIG))
    if configured:
        return configured
    special = {token.content for token in library.get_added_tokens_decoder().values() if token.special}
    for names in (special, vocabulary):  # a word that only looks like one comes last
        for name in END_OF_DOCUMENT_NAMES:
            if name in names:
                return name
    raise DataError(
        f"tokenizer {path} has none of {', '.join(END_OF_DOCUMENT_NAMES)} to end documents with: name its token as "
        f"eos_token in {path.parent / CONFIG}"
    )


def _canonical_names(files: tuple[Path, ...]) -> tuple[str, ...]:
    return (HF_JSON,) if len(files) == 1 else GPT2_FILES
