"""A SentencePiece model as the content of a tokenizer.json of the `tokenizers` library.

For models whose pieces, put side by side, are the text; others change the text by tables of their own.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

SP_SPACE = "\u2581"  # SentencePiece's stand-in for a space inside pieces


@dataclass(frozen=True, slots=True)
class Piece:
    """One entry of the vocabulary. `kind`: control, unknown, byte or normal."""

    text: str
    score: float
    kind: str


def library_content(pieces: Sequence[Piece], unknown: int) -> dict[str, Any]:
    """The tokenizer.json of a model's pieces in the order of their ids; `unknown`: the id of the unknown piece.

    What that library does otherwise: a text that spells out U+2581 gets the piece of a space; of a unigram model, one
    that spells out a control or byte piece (`<0x41>`) gets its id; and transformers takes control pieces in a text for
    what they name, unless told not to.
    """
    scores = [piece.score for piece in pieces if piece.kind == "normal"]
    model: dict[str, Any]
    if all(score == -rank for rank, score in enumerate(scores)):  # pair encoding writes ranks as scores
        vocabulary = {piece.text: i for i, piece in enumerate(pieces)}
        model = {"type": "BPE", "unk_token": pieces[unknown].text, "fuse_unk": True, "byte_fallback": True}
        model |= {"vocab": vocabulary, "merges": list(_merges(pieces))}
    else:
        model = {"type": "Unigram", "unk_id": unknown, "byte_fallback": True}
        model |= {"vocab": [(piece.text, piece.score) for piece in pieces]}
    flags = {"normalized": False, "single_word": False, "lstrip": False, "rstrip": False}
    return {
        "version": "1.0",
        "added_tokens": [
            {"id": i, "content": piece.text, "special": True} | flags
            for i, piece in enumerate(pieces)
            if piece.kind in ("control", "unknown")
        ],
        "normalizer": {"type": "Replace", "pattern": {"String": " "}, "content": SP_SPACE},
        "pre_tokenizer": None,
        "post_processor": None,
        "decoder": {
            "type": "Sequence",
            "decoders": [
                {"type": "Replace", "pattern": {"String": SP_SPACE}, "content": " "},
                {"type": "ByteFallback"},
                {"type": "Fuse"},
            ],
        },
        "model": model,
    }


def _merges(pieces: Sequence[Piece]) -> Iterator[tuple[str, str]]:
    """Every way to put a piece together from two others, the best piece first."""
    normal = [piece.text for piece in pieces if piece.kind == "normal"]
    known = set(normal)
    for text in normal:
        for cut in range(1, len(text)):
            if text[:cut] in known and text[cut:] in known:
                yield text[:cut], text[cut:]
