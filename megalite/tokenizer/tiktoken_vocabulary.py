"""Vocabularies of the tiktoken library: r50k_base, p50k_base, cl100k_base, o200k_base."""

from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from megalite.errors import DataError
from megalite.tokenizer.base import check_text, config_text, digest_of, name_of, read_file, save_files

TIKTOKEN_ENDING = ".tiktoken"
_END = "<|endoftext|>"


class TiktokenTokenizer:
    """A .tiktoken file: tokens in base64 with their ranks, a line each.

    How text is cut into words is not in the file: the library knows it by the file's name.
    """

    def __init__(self, path: Path):
        """Load `path`. Raises `DataError` when it is missing, damaged, or not named as the library names it."""
        self._data = read_file(path)
        self._stem = path.name.removesuffix(TIKTOKEN_ENDING)
        self._encoding = _load_tiktoken(path, self._stem)
        self.name = name_of(path)
        self.vocab_size = self._encoding.max_token_value + 1
        self.end_of_document = self.begin_of_document = self._encoding.encode_single_token(_END)
        self.end_of_document_text = _END
        self.unknown: int | None = None
        self._control = set(self._encoding._special_tokens.values())

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
        return self._encoding.decode_bytes([i for i in ids if i not in self._control])

    def library_json(self) -> dict[str, Any] | None:
        """See `Tokenizer`."""
        return None

    def save(self, folder: Path) -> None:
        """See `Tokenizer`."""
        save_files(folder, {self._stem + TIKTOKEN_ENDING: self._data}, config_text("tiktoken", self))


def _load_tiktoken(path: Path, name: str) -> Any:
    """The library's object; what it needs beside the ranks comes from its own table of encodings."""
    try:
        import tiktoken
        import tiktoken.load
        import tiktoken_ext.openai_public as known
    except ModuleNotFoundError:
        raise DataError(
            f"tokenizer {path}: tiktoken's files need one more package: pip install megalite[data]"
        ) from None
    names = [name for name in known.ENCODING_CONSTRUCTORS if name.endswith("_base")]
    if name not in names:
        raise DataError(
            f"tokenizer {path}: how text is cut is not in the file, and its name is not one of "
            + ", ".join(name + TIKTOKEN_ENDING for name in names)
        )
    download = known.load_tiktoken_bpe
    try:
        known.load_tiktoken_bpe = lambda *_, **__: tiktoken.load.load_tiktoken_bpe(str(path))
        spec = known.ENCODING_CONSTRUCTORS[name]()
    except Exception as error:  # the library raises what it met: ValueError, IndexError, binascii.Error
        raise DataError(f"tokenizer {path} is not valid, or is damaged: {error}") from None
    finally:
        known.load_tiktoken_bpe = download
    if len(spec["mergeable_ranks"]) < 256:
        raise DataError(f"tokenizer {path} has {len(spec['mergeable_ranks'])} tokens, fewer than there are bytes")
    spec.pop("explicit_n_vocab", None)
    return tiktoken.Encoding(**spec)
