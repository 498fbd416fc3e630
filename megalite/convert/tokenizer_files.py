"""Tokenizers of Hugging Face folders, in and out.

From a bare tokenizer.model transformers builds a `LlamaTokenizer`, which puts a space before every text: for a model
trained without that, other ids (seen with transformers 5.23). So every tokenizer of ours goes out as a tokenizer.json.
"""

import json
import re
import shutil
from pathlib import Path
from typing import Any

from megalite.convert.tensors import CARRIED
from megalite.data.files import write_synced
from megalite.log import get_logger
from megalite.tokenizer import Tokenizer, load_tokenizer
from megalite.tokenizer.base import CONFIG, GPT2_FILES, HF_JSON, SP_MODEL

_FILES = (HF_JSON, SP_MODEL, *GPT2_FILES)
_SETTINGS = (CONFIG, "special_tokens_map.json", "chat_template.jinja", "chat_template.json")
_PROBED_PIECES = 2000
_BYTE_PIECE = re.compile("<0x[0-9A-F]{2}>")  # spelled out in a text, it is one to the library (`library_content`)
_PROBES = (
    "",
    "The quick brown fox, isn't it?  They'LL\n\n\tgo\r\n 12345 3.14 x_y",
    "春眠不覺曉，處處聞啼鳥。 naïve café e\u0301 \ufb01 Ａ \U0001f3f3\ufe0f\u200d\U0001f308 \U0010ffff",
    "\x00\x01\x7f\x85\u00a0\u2028\u3000\u200b\ufeff \u202e" + "a" * 100 + " " * 50,
)
_DIGEST = "tokenizer.digest"  # of the tokenizer that the settings belong to

log = get_logger(__name__)


def import_tokenizer(source: Path, run_dir: Path) -> None:
    """Copy the tokenizer of a Hugging Face folder to a run, and its settings for an export; nothing if it has none.

    Raises `DataError` for one that cannot be used.
    """
    carried = run_dir / CARRIED
    carried.mkdir()
    _copy(source, carried, _SETTINGS)
    if any((source / name).is_file() for name in (HF_JSON, SP_MODEL, GPT2_FILES[1])):
        tokenizer = load_tokenizer(source)
        tokenizer.save(run_dir / "tokenizer")
        (carried / _DIGEST).write_text(tokenizer.digest)


def carried_settings(carried: Path | None, tokenizer: Path | None) -> Path | None:
    """What an import kept, when it belongs to the tokenizer that the run has now; None: nothing does."""
    if carried is None or not carried.is_dir():
        return None
    kept = carried / _DIGEST
    belongs = kept.is_file() == (tokenizer is not None) and (
        tokenizer is None or kept.read_text() == load_tokenizer(tokenizer).digest
    )
    return carried if belongs else None


def export_tokenizer(folder: Path, output: Path, carried: Path | None = None) -> None:
    """The run's tokenizer under the names that transformers reads; `carried`: see `carried_settings`.

    A tokenizer that has no form which transformers reads with the same ids is left out, which is logged.
    """
    tokenizer = load_tokenizer(folder)
    if carried:
        _copy(folder, output, _FILES)
        _copy(carried, output, _SETTINGS)
        return
    content = tokenizer.library_json()
    if content is None or not _gives_the_same_ids(tokenizer, content):
        log.warning(
            "the tokenizer is left out: transformers would read it with other ids (it has no byte fallback, changes "
            "the text, or finds its pieces in a way of its own)"
        )
        return
    _copy(folder, output, _FILES)
    if not (output / HF_JSON).is_file():
        write_synced(output / HF_JSON, json.dumps(content, ensure_ascii=False) + "\n")
    end = tokenizer.end_of_document_text
    values: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast", "add_bos_token": False}
    values |= {"eos_token": end, "bos_token": end, "add_eos_token": False}
    write_synced(output / CONFIG, json.dumps(values, indent=2, ensure_ascii=False) + "\n")


def _gives_the_same_ids(tokenizer: Tokenizer, content: dict[str, Any]) -> bool:
    """Whether the library reads texts as `tokenizer` does: tried on a text of many scripts and on its own pieces."""
    from tokenizers import Tokenizer as LibraryTokenizer

    library = LibraryTokenizer.from_str(json.dumps(content))
    library.encode_special_tokens = True
    step = max(1, tokenizer.vocab_size // _PROBED_PIECES)
    pieces = [tokenizer.decode([i]) for i in range(0, tokenizer.vocab_size, step)]
    pieces += [token["content"] for token in content["added_tokens"] if not token["special"]]
    pieces = [piece for piece in pieces if piece.strip() and not _BYTE_PIECE.search(piece)]
    probes = [*_PROBES, *("".join(pieces[i : i + 8]) for i in range(0, len(pieces), 4)), " ".join(pieces)]
    return all(library.encode(probe, add_special_tokens=False).ids == tokenizer.encode(probe) for probe in probes)


def _copy(source: Path, target: Path, names: tuple[str, ...]) -> None:
    for name in names:
        if (source / name).is_file():
            shutil.copyfile(source / name, target / name)
