"""Encoding many documents at once: ids side by side, by the fastest engine that gives the tokenizer's own ids.

gigatoken encodes byte-level and SentencePiece pair encodings tens of times faster than the reference libraries. It is
young, so it is never taken at its word: it must give the reference's ids on a list of probes when it is loaded, and on
the head of one document of every batch after that.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import orjson
import xxhash
from numpy.typing import NDArray

from megalite.config.schema_data import EncoderEngine
from megalite.errors import ConfigError, DataError
from megalite.log import get_logger
from megalite.tokenizer.base import END_OF_DOCUMENT_NAMES, Tokenizer, check_text
from megalite.tokenizer.sentencepiece_json import SP_SPACE

log = get_logger(__name__)

_CHECKED_CHARACTERS = 2000  # of one document of a batch: about 1% of the engine's own time
_PROBES = (
    "",
    " ",
    "a",
    "The quick brown fox, isn't it?  They'LL\n\n\tgo\r\n 12345 3.14 x_y",
    "春眠不覺曉，處處聞啼鳥。 中文 mixed 文字",
    "naïve café e\u0301 \ufb01 Ａ ½ ٣ \u1e9b\u0323 ß ǆ",
    "\U0001f3f3\ufe0f\u200d\U0001f308 \U0001d518 \U000f1234 \U0010ffff",
    "\x00\x01\x7f\x85\u00a0\u2028\u3000\u200b\ufeff \u202e",
    "def f(x):\n    return  {'a': [x, 1e-4]}  # <0x41> <unk>\n",
    "=" * 300 + "a" * 300 + " " * 300 + "\n" * 30,
)


class Encoder:
    """Encodes batches of documents; `engine` tells by what: gigatoken or reference."""

    def __init__(self, tokenizer: Tokenizer, engine: EncoderEngine = "auto"):
        """`engine`: auto takes gigatoken where it is installed, knows the tokenizer and agrees with it; reference.

        Raises `ConfigError` for gigatoken by name where it cannot be had.
        """
        self._tokenizer = tokenizer
        self._fast = None
        if engine != "reference":
            try:
                self._load, self._fast = _load_gigatoken(tokenizer)
            except _UnfitError as problem:
                if engine == "gigatoken":
                    raise ConfigError(f"tokenizer.engine: gigatoken cannot serve here: {problem}") from None
                log.info("encoding with the reference library: %s", problem)

    @property
    def engine(self) -> str:
        """gigatoken or reference."""
        return "gigatoken" if self._fast else "reference"

    def forget(self) -> None:
        """Load the engine anew: gigatoken keeps every word that it meets, so its memory grows with the text."""
        if self._fast is not None:
            self._fast = None  # goes before its successor comes
            self._fast = self._load()

    def encode(self, texts: Sequence[str]) -> tuple[NDArray[np.uint32], NDArray[np.int64]]:
        """Ids of all documents side by side [tokens], and how many each has [documents]; no end-of-document tokens.

        Raises `DataError` for a text that is no valid Unicode and when the engine disagrees with the reference.
        """
        if not texts:
            return np.empty(0, np.uint32), np.empty(0, np.int64)
        if self._fast is None:
            return _flat(self._tokenizer.encode_batch(texts))
        # The stand-in for a space is spelled in bytes by our own wrapper of SentencePiece (see there).
        if any(SP_SPACE in text for text in texts):
            rows = [
                self._tokenizer.encode(text) if SP_SPACE in text else _encode_batch(self._fast, [text])[0]
                for text in texts
            ]
            return _flat(rows)
        ids, counts = _encode_batch(self._fast, texts)
        self._check(texts[len(texts) // 2][:_CHECKED_CHARACTERS])
        return ids, counts

    def _check(self, text: str) -> None:
        if _encode_batch(self._fast, [text])[0].tolist() != self._tokenizer.encode(text):
            raise DataError(
                f"gigatoken and the reference library disagree on a text of {len(text)} characters (xxh3_64 "
                f"{xxhash.xxh3_64_hexdigest(text.encode())}): set tokenizer.engine=reference"
            )


class _UnfitError(Exception):
    """Why gigatoken is not used."""


def _load_gigatoken(tokenizer: Tokenizer) -> tuple[Callable[[], Any], Any]:
    """What makes an engine, and the first of them."""
    try:
        from gigatoken import Tokenizer as Gigatoken
    except ModuleNotFoundError:
        raise _UnfitError("gigatoken is not installed (pip install megalite[data])") from None
    content = tokenizer.library_json()
    if content is None or content["model"]["type"] != "BPE":
        raise _UnfitError("the tokenizer is no pair encoding")
    added = [token["content"] for token in content["added_tokens"]]
    # Text is only ever text: a special token that a document spells out must not become its id.
    content = content | {"added_tokens": [token for token in content["added_tokens"] if not token["special"]]}
    try:
        load = functools.partial(Gigatoken.from_json, orjson.dumps(content).decode())
        fast = load()
        specials = [f"a {name}{name} b" for name in (*END_OF_DOCUMENT_NAMES, *added)]
        for probe in (*_PROBES, *specials, "".join(_PROBES)):
            if _encode_batch(fast, [probe])[0].tolist() != tokenizer.encode(probe):
                raise _UnfitError(f"gigatoken gives other ids for {probe[:40]!r}")
    except (ValueError, RuntimeError, NotImplementedError) as error:
        raise _UnfitError(f"gigatoken does not know this tokenizer: {error}") from None
    return load, fast


def _encode_batch(fast: Any, texts: Sequence[str]) -> tuple[NDArray[np.uint32], NDArray[np.int64]]:
    try:
        data = [text.encode() for text in texts]
    except UnicodeEncodeError:
        for text in texts:
            check_text(text)
        raise
    layout = fast.encode_batch(data, parallel=False).layout
    offsets = np.asarray(layout.offsets.data)
    return np.asarray(layout.content.data)[offsets[0] : offsets[-1]], np.diff(offsets)


def _flat(rows: Sequence[Any]) -> tuple[NDArray[np.uint32], NDArray[np.int64]]:
    counts = np.fromiter((len(row) for row in rows), np.int64, len(rows))
    return np.concatenate([np.asarray(row, np.uint32) for row in rows]), counts
