"""SentencePiece models."""

from collections.abc import Iterable, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

from megalite.errors import DataError
from megalite.tokenizer.base import SP_MODEL, check_text, config_text, digest_of, name_of, read_file, save_files
from megalite.tokenizer.sentencepiece_json import SP_SPACE, Piece, library_content
from megalite.tokenizer.sentencepiece_proto import read_model


class SentencePieceTokenizer:
    """A SentencePiece model.

    Its stand-in for a space, U+2581, would come back as a space when a text holds it. Where the model is lossless
    otherwise (identity normalisation, byte fallback, no dummy prefix) that character is spelled in byte pieces, so that
    every text comes back exactly.
    """

    def __init__(self, path: Path):
        """Load the model file `path`. Raises `DataError` when it is missing, empty or damaged."""
        self._data = read_file(path)
        self._model = _load_sentencepiece(path, self._data)
        self.name = name_of(path)
        self.vocab_size = self._model.get_piece_size()
        self.end_of_document = self._model.eos_id()
        if self.end_of_document < 0:
            raise DataError(f"tokenizer {path} has no end-of-sentence id, which ends documents: train it with eos_id")
        self.begin_of_document = self.end_of_document
        self.end_of_document_text = self._model.id_to_piece(self.end_of_document)
        self.unknown = self._model.unk_id()
        ids = (i for i in range(self.vocab_size) if self._model.is_control(i))
        self.special_tokens = {self._model.id_to_piece(i): i for i in ids}
        self._space_bytes = [self._model.piece_to_id(f"<0x{byte:02X}>") for byte in SP_SPACE.encode()]
        self._lossless = self._is_lossless()

    @cached_property
    def digest(self) -> str:
        """See `Tokenizer`."""
        return digest_of("sentencepiece", self.end_of_document, [self._data])

    def encode(self, text: str) -> list[int]:
        """See `Tokenizer`."""
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """See `Tokenizer`."""
        for text in texts:
            check_text(text)
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
        save_files(folder, {SP_MODEL: self._data}, config_text("sentencepiece", self))

    def library_json(self) -> dict[str, Any] | None:
        """See `Tokenizer`; known of lossless models of pair encoding and unigram."""
        if not self._lossless or any(self._model.is_unused(i) for i in range(self.vocab_size)):
            return None
        kind, user = read_model(self._data)
        pieces = [replace(piece, kind="user") if i in user else piece for i, piece in enumerate(self._pieces)]
        return library_content(kind, pieces, self.unknown)

    @cached_property
    def _pieces(self) -> list[Piece]:
        """Every piece, by id."""
        model = self._model
        pieces = []
        for i in range(self.vocab_size):
            kinds = {"control": model.is_control(i), "unknown": model.is_unknown(i), "byte": model.is_byte(i)}
            kind = next((kind for kind, so in kinds.items() if so), "normal")
            pieces.append(Piece(model.id_to_piece(i), model.get_score(i), kind))
        return pieces

    @cached_property
    def _piece_bytes(self) -> list[bytes]:
        """What each id spells, by id."""
        spelled = []
        for piece in self._pieces:
            if piece.kind == "byte":
                spelled.append(bytes([int(piece.text[3:5], 16)]))  # <0xAB>
            elif piece.kind == "unknown":
                spelled.append("\ufffd".encode())
            else:
                spelled.append(piece.text.replace(SP_SPACE, " ").encode())
        return spelled

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


def _load_sentencepiece(path: Path, data: bytes) -> Any:
    """The library's object; whatever it says about a damaged file becomes a `DataError`."""
    from sentencepiece import SentencePieceProcessor

    if not data:  # the library would take it for "no model given"
        raise DataError(f"tokenizer {path} is empty: train it again, or copy it again")
    try:
        return SentencePieceProcessor(model_proto=data)
    except RuntimeError as error:
        raise DataError(f"tokenizer {path} is not a SentencePiece model, or is damaged: {error}") from None
