"""Find out what a path holds and load it."""

from pathlib import Path

from megalite.errors import DataError
from megalite.tokenizer.base import (
    ACCEPTED,
    CONFIG,
    GPT2_FILES,
    HF_JSON,
    OUR_FORMAT,
    SP_MODEL,
    Tokenizer,
    configured_end,
    read_config,
)
from megalite.tokenizer.huggingface import HuggingFaceTokenizer
from megalite.tokenizer.sentencepiece_model import SentencePieceTokenizer
from megalite.tokenizer.tiktoken_vocabulary import TIKTOKEN_ENDING, TiktokenTokenizer


def load_tokenizer(path: str | Path) -> Tokenizer:
    """Load a tokenizer from a folder or file; `ACCEPTED` lists the kinds.

    Raises `DataError` when there is none at `path`, when a file is damaged, when it could turn text into its
    end-of-document id, or when it drops text.
    """
    path = Path(path)
    if path.is_dir():
        tokenizer = _load_folder(path)
    elif path.name.endswith(".model"):
        tokenizer = SentencePieceTokenizer(path)
    elif path.name.endswith(TIKTOKEN_ENDING):
        tokenizer = TiktokenTokenizer(path)
    elif path.name.endswith(".json") and path.name not in (GPT2_FILES[0], CONFIG):
        tokenizer = HuggingFaceTokenizer((path,))
    else:
        found = "has an ending that is not known" if path.exists() else "does not exist"
        raise DataError(f"tokenizer {path} {found}. {ACCEPTED}")
    _refuse_lost_text(tokenizer, path)
    _refuse_control_text(tokenizer, path)
    return tokenizer


def _load_folder(path: Path) -> Tokenizer:
    config = read_config(path / CONFIG)
    end = configured_end(path / CONFIG, config)
    kinds = ("sentencepiece", "huggingface", "tiktoken")
    if config.get("format") == OUR_FORMAT and config.get("type") not in kinds:
        raise DataError(f"{path / CONFIG}: type {config.get('type')!r}, allowed: {', '.join(kinds)}")
    if (path / SP_MODEL).is_file() and not (path / HF_JSON).is_file():
        tokenizer: Tokenizer = SentencePieceTokenizer(path / SP_MODEL)
    elif (path / HF_JSON).is_file():
        tokenizer = HuggingFaceTokenizer((path / HF_JSON,), end)
    elif all((path / name).is_file() for name in GPT2_FILES):
        tokenizer = HuggingFaceTokenizer(tuple(path / name for name in GPT2_FILES), end)
    elif len(found := sorted(path.glob(f"*{TIKTOKEN_ENDING}"))) == 1:
        tokenizer = TiktokenTokenizer(found[0])
    else:
        raise DataError(f"no tokenizer in the folder {path}. {ACCEPTED}")
    if config.get("format") == OUR_FORMAT:
        tokenizer.name = str(config.get("name", tokenizer.name))
        if tokenizer.digest != config.get("digest"):
            raise DataError(
                f"tokenizer {path} is damaged or was changed: its files have digest {tokenizer.digest}, {CONFIG} says "
                f"{config.get('digest')}; train it again, or copy it again"
            )
    return tokenizer


def _refuse_control_text(tokenizer: Tokenizer, path: Path) -> None:
    """Refuse a tokenizer that reads a special token in a text, or reads nothing at all in its place."""
    for token, i in tokenizer.special_tokens.items():
        if i == tokenizer.unknown:  # which any text may get that cannot be spelled
            continue
        for probe in (token, f"a {token} b", f"a{token}{token}b"):
            ids = tokenizer.encode(probe)
            if i in ids or not ids:
                found = f"its id {i}" if ids else "nothing"
                raise DataError(
                    f"tokenizer {path} turns the special token {token!r}, where a document spells it out, into "
                    f"{found}; expected: ids of ordinary text"
                )


# Letters of scripts that are in hardly any vocabulary, and that no table of normalisation takes for something else.
_RARE_LETTERS = ("\U00012345", "\U00016888")


def _refuse_lost_text(tokenizer: Tokenizer, path: Path) -> None:
    """Refuse a tokenizer that leaves characters outside its vocabulary out, with no id to count them by."""
    if not all(tokenizer.encode(letter) for letter in _RARE_LETTERS):
        raise DataError(
            f"tokenizer {path} drops characters that are not in its vocabulary without a trace: it needs byte-level "
            "pieces, byte fallback or an unknown token"
        )
