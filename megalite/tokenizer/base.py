"""What every kind of tokenizer shares: the protocol, the names of files, and how a folder of ours is written."""

import json
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import xxhash

from megalite.errors import DataError

CONFIG = "tokenizer_config.json"
OUR_FORMAT = "megalite"  # value of "format" in a tokenizer_config.json written here; Hugging Face's has no such key
SP_MODEL = "tokenizer.model"
HF_JSON = "tokenizer.json"
GPT2_FILES = ("vocab.json", "merges.txt")
# Tried in turn when no configuration beside tokenizer.json names its eos_token.
END_OF_DOCUMENT_NAMES = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>", "[SEP]")
ACCEPTED = (
    f"Accepted: a folder made by `megalite tokenizer train`, a SentencePiece .model, a {HF_JSON}, a .tiktoken, or a "
    f"folder with {' and '.join(GPT2_FILES)}"
)


class Tokenizer(Protocol):
    """What the rest of the program knows of a tokenizer."""

    name: str
    vocab_size: int
    end_of_document: int
    end_of_document_text: str
    begin_of_document: int  # what the library puts before a text; otherwise the end of the document before it
    unknown: int | None  # the id that stands for text the tokenizer cannot spell; None: it has none
    special_tokens: dict[str, int]  # text and id of what a document never gets: control tokens, the end among them

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

    def library_json(self) -> dict[str, Any] | None:
        """The content of a tokenizer.json of the `tokenizers` library that gives the same ids; None: not known."""

    def save(self, folder: Path) -> None:
        """Copy its files to the new folder `folder`, which `load_tokenizer` takes."""


def check_text(text: str) -> None:
    """Raise `DataError` for a text that UTF-8 cannot hold, such as half a surrogate pair."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise DataError(f"text is not valid Unicode at character {error.start}: {error.reason}") from None


def digest_of(kind: str, end_of_document: int, contents: list[bytes]) -> str:
    """xxh3_128 over a tokenizer: its kind, its end-of-document id and its files, in hexadecimal."""
    digest = xxhash.xxh3_128(f"{kind} {end_of_document}".encode())
    for content in contents:
        digest.update(len(content).to_bytes(8, "little"))
        digest.update(content)
    return digest.hexdigest()


def config_text(kind: str, tokenizer: Tokenizer, **more: Any) -> str:
    """The tokenizer_config.json of a folder of ours. `kind`: sentencepiece or huggingface."""
    config = {"format": OUR_FORMAT, "type": kind, "name": tokenizer.name, "vocab_size": tokenizer.vocab_size}
    return json.dumps(config | {"digest": tokenizer.digest, **more}, indent=2, ensure_ascii=False) + "\n"


def save_files(folder: Path, files: dict[str, bytes], config: str) -> None:
    """Write a folder that `load_tokenizer` takes: the files by name and the text of the configuration."""
    folder.mkdir(parents=True)
    for name, content in files.items():
        (folder / name).write_bytes(content)
    (folder / CONFIG).write_text(config, encoding="utf-8")


def read_file(path: Path) -> bytes:
    """The content of a tokenizer file. `DataError` when it cannot be read."""
    try:
        return path.read_bytes()
    except OSError as error:
        raise DataError(f"tokenizer {path} cannot be read: {error.strerror}. {ACCEPTED}") from None


def read_config(path: Path) -> dict[str, Any]:
    """A tokenizer_config.json; empty when there is none. `DataError` when it is not JSON."""
    if not path.is_file():
        return {}
    try:
        config = json.loads(read_file(path))
    except ValueError as error:
        raise DataError(f"{path} is not valid JSON: {error}") from None
    if not isinstance(config, dict):
        raise DataError(f"{path}: expected an object of keys and values, found {str(config)[:80]}")
    return config


def configured_end(path: Path, config: dict[str, Any]) -> str | None:
    """The end-of-document token that the tokenizer_config.json at `path` names, ours or Hugging Face's."""
    key = "end_of_document" if config.get("end_of_document") else "eos_token"
    value = config.get(key)
    text = value.get("content", 0) if isinstance(value, dict) else value
    if text is None or isinstance(text, str):
        return text
    raise DataError(f"{path}: {key} is {str(value)[:80]}, allowed: the text of a token, or an object with content")


@contextmanager
def library_errors(path: Path, expected: str = "valid") -> Iterator[None]:
    """Whatever a library says, in its own ways, about the damaged tokenizer file `path` becomes a `DataError`."""
    try:
        yield
    except (KeyboardInterrupt, SystemExit, MemoryError):
        raise
    except BaseException as error:  # a panic of a library in Rust is no `Exception`
        raise DataError(f"tokenizer {path} is not {expected}, or is damaged: {error}") from None


def name_of(path: Path) -> str:
    """What to call the tokenizer in the file `path`: the folder when the file has the usual name."""
    return path.parent.name if path.stem in ("tokenizer", "vocab") else path.stem
