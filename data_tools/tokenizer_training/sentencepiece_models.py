"""SentencePiece models, trained without what would lose text.

Where pre-training needs it, what is done differs from SentencePiece's defaults. Text comes back exactly: no
normalisation, no added space, byte fallback. Newlines stay inside sentences, so that pieces such as ",\\n" can form.
Long documents are cut, where SentencePiece would drop them. The number of threads is fixed: the model file stores it.
"""

import io
import re
from collections.abc import Iterator
from typing import Any

from megalite.config.schema_data import TokenizerConfig
from megalite.errors import ConfigError

from .sample import TrainingSample

MODEL_TYPES = {"sp_bpe": "bpe", "sp_unigram": "unigram"}
CONTROL_IDS = {"unk_id": 0, "bos_id": 1, "eos_id": 2, "pad_id": 3}


def train_sentencepiece(sample: TrainingSample, config: TokenizerConfig) -> bytes:
    """The model file. Raises `ConfigError` for a vocabulary that the text cannot fill, or that cannot hold it."""
    from sentencepiece import SentencePieceTrainer

    model = io.BytesIO()
    source = _Guarded(sample)
    options: dict[str, Any] = dict(
        model_type=MODEL_TYPES[config.type],
        vocab_size=config.vocab_size,
        character_coverage=1.0,  # `TrainingSample` has cut what is not to be covered
        byte_fallback=config.byte_fallback,
        num_threads=config.num_threads,
        normalization_rule_name="identity",
        add_dummy_prefix=False,
        remove_extra_whitespaces=False,
        minloglevel=2,
        **CONTROL_IDS,
    )
    try:
        SentencePieceTrainer.train(sentence_iterator=iter(source), model_writer=model, **options)
    except RuntimeError as error:
        raise source.error or _explained(str(error), config) from None
    return model.getvalue()


class _Guarded:
    """Remembers what went wrong while the trainer read: it would turn every error into a RuntimeError."""

    def __init__(self, sample: TrainingSample):
        self._sample = sample
        self.error: BaseException | None = None

    def __iter__(self) -> Iterator[str]:
        try:
            yield from self._sample
        except Exception as error:
            self.error = error
            raise


def _explained(message: str, config: TokenizerConfig) -> ConfigError:
    """The trainer's own words as the key to change."""
    if match := re.search(r"value <= (\d+)", message):
        return ConfigError(
            f"tokenizer.vocab_size {config.vocab_size}: this text yields {match[1]} pieces at most; "
            "set that or less, or give more text"
        )
    if match := re.search(r"required_chars\. \d+ vs (\d+)", message):
        return ConfigError(
            f"tokenizer.vocab_size {config.vocab_size}: the characters alone need {match[1]}; set more than that, or "
            f"lower tokenizer.character_coverage ({config.character_coverage}) so that rare ones are spelled in bytes"
        )
    return ConfigError(f"SentencePiece could not train with these settings of tokenizer.*: {message}")
