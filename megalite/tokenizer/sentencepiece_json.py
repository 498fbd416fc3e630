"""A SentencePiece model as the content of a tokenizer.json of the `tokenizers` library.

For models whose pieces, put side by side, are the text; others change the text by tables of their own.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

SP_SPACE = "\u2581"  # SentencePiece's stand-in for a space inside pieces


@dataclass(frozen=True, slots=True)
class Piece:
    """One entry of the vocabulary. `kind`: control, unknown, byte, user (found before all others) or normal."""

    text: str
    score: float
    kind: str


def library_content(model_type: str, pieces: Sequence[Piece], unknown: int) -> dict[str, Any] | None:
    """The tokenizer.json of a model's pieces in the order of their ids; None for a kind that the library has not.

    `model_type`: see `read_model`; `unknown`: the id of the unknown piece. What that library does otherwise: a text
    that spells out U+2581 gets the piece of a space; of a unigram model, one that spells out a control or byte piece
    (`<0x41>`) gets its id; and transformers takes control pieces in a text for what they name, unless told not to.
    """
    model: dict[str, Any]
    if model_type == "bpe":
        vocabulary = {_text_of(piece): i for i, piece in enumerate(pieces)}
        model = {"type": "BPE", "unk_token": pieces[unknown].text, "fuse_unk": True, "byte_fallback": True}
        model |= {"vocab": vocabulary, "merges": list(_merges(pieces))}
    elif model_type in ("unigram", "char"):  # of single characters alone there is one way to spell a text
        model = {"type": "Unigram", "unk_id": unknown, "byte_fallback": True}
        model |= {"vocab": [(_text_of(piece), piece.score) for piece in pieces]}
    else:
        return None
    flags = {"normalized": False, "single_word": False, "lstrip": False, "rstrip": False}
    return {
        "version": "1.0",
        "added_tokens": [
            {"id": i, "content": _text_of(piece), "special": piece.kind != "user"} | flags
            for i, piece in enumerate(pieces)
            if piece.kind in ("control", "unknown") or _is_found_first(piece)
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


def _is_found_first(piece: Piece) -> bool:
    """Whether the piece is its user's; one with a plain space is never found, spaces having their stand-in by then."""
    return piece.kind == "user" and " " not in piece.text


def _text_of(piece: Piece) -> str:
    """The piece as the library looks for it: before all others in the text itself, which has spaces."""
    return piece.text.replace(SP_SPACE, " ") if _is_found_first(piece) else piece.text


def _merges(pieces: Sequence[Piece]) -> Iterator[tuple[str, str]]:
    """Every way to put a piece together from two others, the best piece first."""
    ranked = sorted(pieces, key=lambda piece: -piece.score)  # of pair encoding a score is the rank, below 0
    normal = [piece.text for piece in ranked if piece.kind == "normal"]
    known = set(normal)
    for text in normal:
        for cut in range(1, len(text)):
            if text[:cut] in known and text[cut:] in known:
                yield text[:cut], text[cut:]
