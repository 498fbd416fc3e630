"""Encode and decode with any tokenizer: a folder of ours, SentencePiece, a tokenizer.json, GPT-2's two files.

Text is only ever text: a document that spells out `</s>` or `<|endoftext|>` gets ordinary ids, which a check at loading
holds every tokenizer to. Training a tokenizer lives in `data_tools`.
"""

import json
from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import xxhash

from megalite.errors import DataError

CONFIG = "tokenizer_config.json"
OUR_FORMAT = "megalite"  # value of "format" in a tokenizer_config.json written here; Hugging Face's has no such key
SP_MODEL = "tokenizer.model"
HF_JSON = "tokenizer.json"
GPT2_FILES = ("vocab.json", "merges.txt")
SP_SPACE = "\u2581"  # SentencePiece's stand-in for a space inside pieces
# Tried in turn when no configuration beside tokenizer.json names its eos_token.
END_OF_DOCUMENT_NAMES = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>", "[SEP]")


class Tokenizer(Protocol):
    """What the rest of the program knows of a tokenizer."""

    name: str
    vocab_size: int
    end_of_document: int
    end_of_document_text: str
    unknown: int | None  # the id that stands for text the tokenizer cannot spell; None: it has none

    @property
    def digest(self) -> str:
        """xxh3_128 over its files and the end-of-document id, in hexadecimal."""

    def encode(self, text: str) -> list[int]:
        """Ids of `text` as it stands: nothing prepended or appended, control ids never. `DataError`: no valid text."""

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of each text."""

    def decode(self, ids: Iterable[int]) -> str:
        """The text of `ids`, control ids left out; bytes that are not UTF-8 become U+FFFD."""

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """The bytes of `ids`, control ids left out; exact for byte-level and lossless byte-fallback models."""

    def save(self, folder: Path) -> None:
        """Copy its files to the new folder `folder`, which `load_tokenizer` takes."""


def load_tokenizer(path: str | Path) -> Tokenizer:
    """Load a tokenizer from a folder or file; the kinds are listed at the head of this module.

    Raises `DataError` when there is none at `path`, when a file is damaged, or when it could turn text into its
    end-of-document id.
    """
    path = Path(path)
    if path.is_dir():
        tokenizer = _load_folder(path)
    elif path.name.endswith(".model"):
        tokenizer = SentencePieceTokenizer(path)
    elif path.name.endswith(".json") and path.name not in (GPT2_FILES[0], CONFIG):
        tokenizer = HuggingFaceTokenizer((path,))
    else:
        found = "has an ending that is not known" if path.exists() else "does not exist"
        raise DataError(f"tokenizer {path} {found}. {_ACCEPTED}")
    _refuse_control_text(tokenizer, path)
    return tokenizer


_ACCEPTED = (
    f"Accepted: a folder made by `megalite tokenizer train`, a SentencePiece .model, a {HF_JSON}, or a folder with "
    f"{' and '.join(GPT2_FILES)}"
)


class SentencePieceTokenizer:
    """A SentencePiece model.

    Its stand-in for a space, U+2581, would come back as a space when a text holds it. Where the model is otherwise
    lossless (identity normalisation, byte fallback, no dummy prefix) that character is spelled in byte pieces instead,
    so that every text comes back exactly.
    """

    def __init__(self, path: Path):
        """Load the model file `path`. Raises `DataError` when it is missing, empty or damaged."""
        self._data = _read(path)
        self._model = _load_sentencepiece(path, self._data)
        self.name = _name_of(path)
        self.vocab_size = self._model.get_piece_size()
        self.end_of_document = self._model.eos_id()
        if self.end_of_document < 0:
            raise DataError(f"tokenizer {path} has no end-of-sentence id, which ends documents: train it with eos_id")
        self.end_of_document_text = self._model.id_to_piece(self.end_of_document)
        self.unknown = self._model.unk_id()
        self._space_bytes = [self._model.piece_to_id(f"<0x{byte:02X}>") for byte in SP_SPACE.encode()]
        self._lossless = self._is_lossless()

    @cached_property
    def digest(self) -> str:
        """See `Tokenizer`."""
        return _digest("sentencepiece", self.end_of_document, [self._data])

    def encode(self, text: str) -> list[int]:
        """See `Tokenizer`."""
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """See `Tokenizer`."""
        for text in texts:
            _check_text(text)
        if not (self._lossless and any(SP_SPACE in text for text in texts)):
            return self._model.encode(list(texts), num_threads=1)
        return [self._encode_around_space_marks(text) for text in texts]

    def decode(self, ids: Iterable[int]) -> str:
        """See `Tokenizer`."""
        return self.decode_bytes(ids).decode("utf-8", errors="replace")

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """See `Tokenizer`."""
        ids = [i for i in ids if not self._model.is_control(i)]
        if self._lossless:
            return b"".join(self._piece_bytes[i] for i in ids)
        return self._model.decode(ids).encode()

    def save(self, folder: Path) -> None:
        """See `Tokenizer`."""
        _save(folder, {SP_MODEL: self._data}, config_text("sentencepiece", self))

    @cached_property
    def _piece_bytes(self) -> list[bytes]:
        """What each id spells, by id."""
        pieces = []
        for i in range(self.vocab_size):
            piece = self._model.id_to_piece(i)
            if self._model.is_byte(i):
                pieces.append(bytes([int(piece[3:5], 16)]))  # <0xAB>
            elif self._model.is_unknown(i):
                pieces.append("\ufffd".encode())
            else:
                pieces.append(piece.replace(SP_SPACE, " ").encode())
        return pieces

    def _encode_around_space_marks(self, text: str) -> list[int]:
        parts = self._model.encode(text.split(SP_SPACE), num_threads=1)
        ids = parts[0]
        for part in parts[1:]:
            ids += self._space_bytes + part
        return ids

    def _is_lossless(self) -> bool:
        """Whether the pieces of a text, put side by side, are the text: tried on what normalisers like to change."""
        byte_ids = [self._model.piece_to_id(f"<0x{byte:02X}>") for byte in range(256)]
        if not all(self._model.is_byte(i) for i in byte_ids):
            return False
        for probe in ("a", " a", "  A\u00a0\t\n\n  \ufb01 \uff21 e\u0301 \u2460\r\n b  "):
            if b"".join(self._piece_bytes[i] for i in self._model.encode(probe)) != probe.encode():
                return False
        return True


class HuggingFaceTokenizer:
    """A tokenizer of the `tokenizers` library: tokenizer.json, or GPT-2's vocab.json and merges.txt."""

    def __init__(self, files: tuple[Path, ...], end_of_document: str | None = None):
        """`files`: (tokenizer.json,) or (vocab.json, merges.txt). `end_of_document`: the token's text, when known."""
        self._files = {name: _read(path) for name, path in zip(_canonical_names(files), files, strict=True)}
        path = files[0]
        self._tokenizer = _load_hugging_face(files)
        # Otherwise `<|endoftext|>` spelled out in a document would become the control id.
        self._tokenizer.encode_special_tokens = True
        self._tokenizer.no_padding()
        self._tokenizer.no_truncation()
        vocabulary = self._tokenizer.get_vocab(with_added_tokens=True)
        if not vocabulary:
            raise DataError(f"tokenizer {path} has no tokens: it is damaged, or not a tokenizer")
        self.name = _name_of(path)
        self.vocab_size = max(vocabulary.values()) + 1
        self.end_of_document_text = end_of_document or _end_of_document_name(path, vocabulary)
        if self.end_of_document_text not in vocabulary:
            raise DataError(
                f"tokenizer {path} has no token {self.end_of_document_text!r}, which {CONFIG} names as its last one"
            )
        self.end_of_document = vocabulary[self.end_of_document_text]
        added = self._tokenizer.get_added_tokens_decoder()
        self._control = {self.end_of_document} | {i for i, token in added.items() if token.special}
        self._added = {i: token.content for i, token in added.items()}
        content = json.loads(self._tokenizer.to_str())
        self._byte_level = (content["decoder"] or {}).get("type") == "ByteLevel"
        self.unknown = vocabulary.get(content["model"].get("unk_token") or "")

    @cached_property
    def digest(self) -> str:
        """See `Tokenizer`."""
        return _digest("huggingface", self.end_of_document, list(self._files.values()))

    def encode(self, text: str) -> list[int]:
        """See `Tokenizer`."""
        _check_text(text)
        return self._tokenizer.encode(text, add_special_tokens=False).ids

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """See `Tokenizer`."""
        for text in texts:
            _check_text(text)
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

    def save(self, folder: Path) -> None:
        """See `Tokenizer`."""
        _save(folder, self._files, config_text("huggingface", self, end_of_document=self.end_of_document_text))

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


def _load_folder(path: Path) -> Tokenizer:
    config = _read_config(path / CONFIG)
    if config.get("format") == OUR_FORMAT and config.get("type") not in ("sentencepiece", "huggingface"):
        raise DataError(f"{path / CONFIG}: type {config.get('type')!r}, allowed: sentencepiece, huggingface")
    if (path / SP_MODEL).is_file() and not (path / HF_JSON).is_file():
        tokenizer: Tokenizer = SentencePieceTokenizer(path / SP_MODEL)
    elif (path / HF_JSON).is_file():
        tokenizer = HuggingFaceTokenizer((path / HF_JSON,), _configured_end(config))
    elif all((path / name).is_file() for name in GPT2_FILES):
        tokenizer = HuggingFaceTokenizer(tuple(path / name for name in GPT2_FILES), _configured_end(config))
    else:
        raise DataError(f"no tokenizer in the folder {path}. {_ACCEPTED}")
    if config.get("format") == OUR_FORMAT:
        tokenizer.name = str(config.get("name", tokenizer.name))
        if tokenizer.digest != config.get("digest"):
            raise DataError(
                f"tokenizer {path} is damaged or was changed: its files have digest {tokenizer.digest}, {CONFIG} says "
                f"{config.get('digest')}; train it again, or copy it again"
            )
    return tokenizer


def _load_sentencepiece(path: Path, data: bytes) -> Any:
    """The library's object; whatever it says about a damaged file becomes a `DataError`."""
    from sentencepiece import SentencePieceProcessor

    if not data:  # the library would take it for "no model given"
        raise DataError(f"tokenizer {path} is empty: train it again, or copy it again")
    try:
        return SentencePieceProcessor(model_proto=data)
    except RuntimeError as error:
        raise DataError(f"tokenizer {path} is not a SentencePiece model, or is damaged: {error}") from None


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
    configured = _configured_end(_read_config(path.parent / CONFIG))
    if configured:
        return configured
    for name in END_OF_DOCUMENT_NAMES:
        if name in vocabulary:
            return name
    raise DataError(
        f"tokenizer {path} has none of {', '.join(END_OF_DOCUMENT_NAMES)} to end documents with: name its token as "
        f"eos_token in {path.parent / CONFIG}"
    )


def _configured_end(config: dict[str, Any]) -> str | None:
    """The end-of-document token that a tokenizer_config.json names, ours or Hugging Face's."""
    value = config.get("end_of_document") or config.get("eos_token")
    return value.get("content") if isinstance(value, dict) else value


def _refuse_control_text(tokenizer: Tokenizer, path: Path) -> None:
    """Refuse a tokenizer that reads its own end-of-document token in a text."""
    for probe in (*END_OF_DOCUMENT_NAMES, tokenizer.end_of_document_text):
        if tokenizer.end_of_document in tokenizer.encode(f"a {probe}{probe} b"):
            raise DataError(
                f"tokenizer {path} turns the text {probe!r} into its end-of-document id, so that a document could end "
                "itself: mark the token as special in its file"
            )


def _canonical_names(files: tuple[Path, ...]) -> tuple[str, ...]:
    return (HF_JSON,) if len(files) == 1 else GPT2_FILES


def _check_text(text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise DataError(f"text is not valid Unicode at character {error.start}: {error.reason}") from None


def _digest(kind: str, end_of_document: int, contents: list[bytes]) -> str:
    digest = xxhash.xxh3_128(f"{kind} {end_of_document}".encode())
    for content in contents:
        digest.update(len(content).to_bytes(8, "little"))
        digest.update(content)
    return digest.hexdigest()


def config_text(kind: str, tokenizer: Tokenizer, **more: Any) -> str:
    """The tokenizer_config.json of a folder of ours. `kind`: sentencepiece or huggingface."""
    config = {"format": OUR_FORMAT, "type": kind, "name": tokenizer.name, "vocab_size": tokenizer.vocab_size}
    return json.dumps(config | {"digest": tokenizer.digest, **more}, indent=2, ensure_ascii=False) + "\n"


def _save(folder: Path, files: dict[str, bytes], config: str) -> None:
    folder.mkdir(parents=True)
    for name, content in files.items():
        (folder / name).write_bytes(content)
    (folder / CONFIG).write_text(config, encoding="utf-8")


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise DataError(f"tokenizer {path} cannot be read: {error.strerror}. {_ACCEPTED}") from None


def _read_config(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise DataError(f"{path} is not valid JSON: {error}") from None
    return config if isinstance(config, dict) else {}


def _name_of(path: Path) -> str:
    return path.parent.name if path.stem in ("tokenizer", "vocab") else path.stem
