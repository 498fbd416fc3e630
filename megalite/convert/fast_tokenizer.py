"""A SentencePiece model as the tokenizer.json of the `tokenizers` library, which transformers reads without guessing.

From a bare tokenizer.model transformers builds a `LlamaTokenizer`, which puts a space before every text: for a model
trained without that, other ids (seen with transformers 5.23).
"""

import json
from collections.abc import Iterable, Iterator
from typing import Any

from megalite.tokenizer.sentencepiece_model import SP_SPACE, SentencePieceTokenizer


def fast_tokenizer(tokenizer: SentencePieceTokenizer) -> str | None:
    """The text of a tokenizer.json that gives the ids of `tokenizer`; None where no such file is known.

    For lossless models alone: others change the text by tables of their own. Tried before it is given out, on every
    piece of the vocabulary by itself and on all of them as one text. What differs in that library: a text that spells
    out U+2581 gets the piece of a space and, of a unigram model, one that spells out a control piece gets its id.
    """
    from tokenizers import Tokenizer

    if not tokenizer.lossless:
        return None
    text = json.dumps(_content(tokenizer), ensure_ascii=False)
    fast = Tokenizer.from_str(text)
    pieces = [piece.replace(SP_SPACE, " ") for piece, _, kind in tokenizer.pieces() if kind == "normal"]
    probes = [*pieces, "".join(pieces), " ".join(pieces), "\n".join(reversed(pieces)), "\U000f1234  \t\r\n\x00"]
    found = [encoding.ids for encoding in fast.encode_batch(probes, add_special_tokens=False)]
    return text if found == tokenizer.encode_batch(probes) else None


def _content(tokenizer: SentencePieceTokenizer) -> dict[str, Any]:
    pieces = list(tokenizer.pieces())
    scores = [score for _, score, kind in pieces if kind == "normal"]
    common = {"unk_id": tokenizer.unknown, "byte_fallback": True}
    if all(score == -rank for rank, score in enumerate(scores)):  # pair encoding writes ranks as scores
        ids = {piece: i for i, (piece, _, _) in enumerate(pieces)}
        common = {"unk_token": pieces[tokenizer.unknown][0], "byte_fallback": True, "fuse_unk": True}
        model = {"type": "BPE", **common, "vocab": ids, "merges": list(_merges(pieces))}
    else:
        model = {"type": "Unigram", **common, "vocab": [(piece, score) for piece, score, _ in pieces]}
    return {
        "version": "1.0",
        "added_tokens": [
            {"id": i, "content": piece, "special": True, "normalized": False, "single_word": False}
            | {"lstrip": False, "rstrip": False}
            for i, (piece, _, kind) in enumerate(pieces)
            if kind in ("control", "unknown")
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


def _merges(pieces: Iterable[tuple[str, float, str]]) -> Iterator[tuple[str, str]]:
    """Every way to put a piece together from two others, the best piece first."""
    normal = [piece for piece, _, kind in pieces if kind == "normal"]
    known = set(normal)
    for piece in normal:
        for cut in range(1, len(piece)):
            if piece[:cut] in known and piece[cut:] in known:
                yield piece[:cut], piece[cut:]
