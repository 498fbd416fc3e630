"""The content of a tokenizer.json without what no document may spell: special and added tokens.

The `tokenizers` library looks for added tokens in every text, and can be told to leave out only those marked special.
A token that is an entry of the model as well may come out of the model itself, a whole word or piece of it. What is
taken out of both cannot come out of either; every other text keeps its ids.
"""

import re
from collections.abc import Mapping
from typing import Any

from megalite.tokenizer.sentencepiece_json import SP_SPACE

# Before the name of an unknown token, which a model needs: U+10FFFF stands for no character, so it is in no text; a
# text that holds it all the same is as unknown as the id says.
_NOT_TEXT = "\U0010ffff"
_BYTE_PIECE = re.compile("<0x[0-9A-F]{2}>")


def special_tokens(content: Mapping[str, Any], end: str, end_id: int) -> dict[str, int]:
    """The ids that no document may get, by the tokens' texts: `end`, which ends documents, and all added tokens.

    Added tokens of nothing but white space are text (files of GPT-NeoX and Gemma have them for indented code), and so
    are the pieces that a model with byte fallback spells unknown characters in.
    """
    byte_fallback = content["model"].get("byte_fallback")
    tokens = {end: end_id}
    for token in content["added_tokens"]:
        text = token["content"]
        if not (_is_blank(token) or (byte_fallback and _BYTE_PIECE.fullmatch(text))):
            tokens[text] = token["id"]
    return tokens


def without_tokens(content: dict[str, Any], tokens: Mapping[str, int]) -> dict[str, Any] | None:
    """`content` with nothing left that turns a text into one of `tokens`; None: it holds nothing that does.

    Tokens marked special are left to `encode_special_tokens`, of the library.
    """
    model = _REDUCTIONS[content["model"]["type"]](content["model"], tokens)
    blanks = [token for token in content["added_tokens"] if _is_blank(token) and token["content"] not in tokens]
    others = [token for token in content["added_tokens"] if token not in blanks]
    if model is content["model"] and all(token["special"] for token in others):
        return None
    kept = {token["id"]: token["content"] for token in blanks}
    return content | {"added_tokens": blanks, "model": model | {"vocab": _with_added(model["vocab"], kept)}}


def _with_added(vocabulary: Any, added: Mapping[int, str]) -> Any:
    """The vocabulary with added tokens: unless it holds them, the library numbers them anew, from its size."""
    if isinstance(vocabulary, dict):
        return vocabulary | {text: i for i, text in added.items()}
    last = max(added, default=0)
    lowest = min(score for _, score in vocabulary) if vocabulary else 0.0
    return vocabulary + [[added.get(i, added[last]), lowest] for i in range(len(vocabulary), last + 1)]


def _is_blank(token: Mapping[str, Any]) -> bool:
    return not token["special"] and not token["content"].replace(SP_SPACE, " ").strip()


def _pair_encoding(model: dict[str, Any], tokens: Mapping[str, int]) -> dict[str, Any]:
    """Pairs make only what a merge names, single characters, and whole words where merges are passed over."""
    prefix, suffix = model["continuing_subword_prefix"] or "", model["end_of_word_suffix"] or ""
    made = {left + right.removeprefix(prefix) for left, right in model["merges"]}
    found = {
        token
        for token in tokens.keys() & model["vocab"].keys()
        if token in made or model["ignore_merges"] or len(token.removeprefix(prefix).removesuffix(suffix)) <= 1
    }
    if not found:
        return model
    merges = [
        [left, right] for left, right in model["merges"] if not found & {left, right, left + right.removeprefix(prefix)}
    ]
    return _whole_words(model, dict.fromkeys(found, 0)) | {"merges": merges}


def _whole_words(model: dict[str, Any], tokens: Mapping[str, int]) -> dict[str, Any]:
    """A model whose vocabulary is a table of its own: the entries are left out of it."""
    vocabulary = {text: i for text, i in model["vocab"].items() if text not in tokens}
    if len(vocabulary) == len(model["vocab"]):
        return model
    unknown = model["unk_token"]
    if unknown not in tokens or unknown not in model["vocab"]:
        return model | {"vocab": vocabulary}
    return model | {
        "vocab": vocabulary | {_NOT_TEXT + unknown: model["vocab"][unknown]},
        "unk_token": _NOT_TEXT + unknown,
    }


def _unigram(model: dict[str, Any], tokens: Mapping[str, int]) -> dict[str, Any]:
    """A list, in which the place is the id: the entries repeat its last one, whose id is that of the last place."""
    vocabulary = list(model["vocab"])
    if not any(text in tokens for text, _ in vocabulary):
        return model
    while vocabulary and vocabulary[-1][0] in tokens and len(vocabulary) - 1 != model["unk_id"]:
        vocabulary.pop()
    last = vocabulary[-1][0] if vocabulary else ""
    return model | {"vocab": [[last if text in tokens else text, score] for text, score in vocabulary]}


_REDUCTIONS = {"BPE": _pair_encoding, "WordPiece": _whole_words, "WordLevel": _whole_words, "Unigram": _unigram}
