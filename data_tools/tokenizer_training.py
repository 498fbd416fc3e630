r"""Train a SentencePiece tokenizer (`megalite tokenizer train`).

Where pre-training needs it, what is done differs from SentencePiece's defaults. Text comes back exactly: no
normalisation, no added space, byte fallback. Newlines stay inside sentences, so that pieces such as ",\n" can form.
Long documents are cut, where SentencePiece would drop them. The number of threads is fixed: the model file stores it.
"""

import io
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import xxhash

from megalite.config.schema_data import TokenizerConfig, TokenizerTrainConfig
from megalite.config.validate_commands import validate_tokenizer_train
from megalite.data.files import OVERWRITE_HINT, new_directory, refuse_existing, write_synced
from megalite.errors import ConfigError, DataError, ResourceError
from megalite.log import get_logger
from megalite.tokenizer import CONFIG, SP_MODEL, SentencePieceTokenizer, config_text

from .readers import Document, ReadReport, iter_documents

log = get_logger(__name__)

MODEL_TYPES = {"sp_bpe": "bpe", "sp_unigram": "unigram"}
CONTROL_IDS = {"unk_id": 0, "bos_id": 1, "eos_id": 2, "pad_id": 3}
_MAX_SENTENCE_BYTES = 4096  # SentencePiece drops what is longer than 4192
# SentencePiece skips sentences with a zero byte or U+2585, and takes U+2581 for a space: the text is cut there.
_RESERVED = "\0\u2581\u2585"


def train_tokenizer(config: TokenizerTrainConfig) -> Path:
    """Train on `config.input` and write the folder `config.output` (model, configuration); returns its path.

    Raises `ConfigError` for values out of range, and for a vocabulary that the text cannot fill or that cannot hold its
    characters; `DataError` for bad input, and for an output that exists (without `overwrite`).
    """
    validate_tokenizer_train(config)
    output = Path(config.output)
    mark = CONFIG if config.overwrite else None
    refuse_existing(output, mark, OVERWRITE_HINT)
    try:
        with new_directory(output, mark) as temporary:
            sample = TrainingSample(config)
            (temporary / SP_MODEL).write_bytes(_train(sample, config.tokenizer))
            tokenizer = SentencePieceTokenizer(temporary / SP_MODEL)
            tokenizer.name = output.name
            settings = {**vars(config.tokenizer), "sampled_bytes": sample.sampled_bytes}
            write_synced(temporary / CONFIG, config_text("sentencepiece", tokenizer, training=settings))
    except OSError as error:
        raise ResourceError(f"writing {output} failed: {error}. Is the disk full, or the folder read-only?") from None
    return output


class TrainingSample:
    """The sentences to train on, weighted by language and cut where SentencePiece needs it.

    Languages with shares p of the bytes are sampled with shares proportional to p^(1 - language_balance) (the
    exponential smoothing of multilingual BERT and XLM), of at most `sample_bytes` in all: a piece of text is taken
    a whole number of times, and once more for a fraction of the pieces that a hash chooses.

    `character_coverage` is applied here, since SentencePiece accepts no value below 0.98: the most frequent characters
    that make up this share of the weighted sample stay, and the text is cut at the others. They get no pieces. ASCII
    always stays: as a byte such a character is one token, too, but one that joins no longer piece.
    """

    def __init__(self, config: TokenizerTrainConfig):
        """Reads the input once to count. Raises `DataError` when there is no text."""
        self._config = config
        num_bytes: Counter[str] = Counter()
        characters: dict[str, Counter[str]] = {}
        for document in self._documents(ReadReport()):
            num_bytes[document.language] += document.num_bytes
            characters.setdefault(document.language, Counter()).update(document.text)
        if not num_bytes:
            seen = f" with split {config.split}" if config.split else ""
            raise DataError(f"no document{seen} in {', '.join(config.input)}: there is nothing to train on")
        total = sum(num_bytes.values())
        exponent = 1 - config.tokenizer.language_balance
        smoothed = {language: (size / total) ** exponent for language, size in num_bytes.items()}
        scale = min(config.tokenizer.sample_bytes, total) / sum(smoothed.values())
        self.sampled_bytes = {language: round(share * scale) for language, share in sorted(smoothed.items())}
        self._repeats = {language: smoothed[language] * scale / size for language, size in num_bytes.items()}
        self._cuts = self._cut_characters(characters)

    def __iter__(self) -> Iterator[str]:
        """The sentences; reads the input again."""
        for document in self._documents(ReadReport(quiet=True)):
            repeat = self._repeats[document.language]
            for number, sentence in enumerate(self._sentences(document.text)):
                share = xxhash.xxh3_64_intdigest(f"{document.id}/{number}".encode()) / 2**64
                for _ in range(int(repeat) + (share < repeat % 1)):
                    yield sentence

    def _documents(self, report: ReadReport) -> Iterator[Document]:
        for document in iter_documents(self._config.input, self._config.reader, report):
            if self._config.split in (None, document.split):
                yield document

    def _cut_characters(self, characters: dict[str, Counter[str]]) -> dict[int, str]:
        """The characters that get no piece, as a table for `str.translate` that turns them to U+0000."""
        weights: dict[str, float] = {}
        for language, counts in characters.items():
            for character, count in counts.items():
                weights[character] = weights.get(character, 0.0) + count * self._repeats[language]
        wanted = self._config.tokenizer.character_coverage * sum(weights.values())
        covered, cuts = 0.0, list(_RESERVED)
        for character, weight in sorted(weights.items(), key=lambda item: (-item[1], item[0])):
            if covered >= wanted and not character.isascii():
                cuts.append(character)
            covered += weight
        return {ord(character): "\0" for character in cuts}

    def _sentences(self, text: str) -> Iterator[str]:
        for part in re.split("\0+", text.translate(self._cuts)):
            yield from _cut(part)


def _cut(text: str) -> Iterator[str]:
    """Pieces of at most `_MAX_SENTENCE_BYTES`: cut behind a newline if there is one, else before a space."""
    data = text.encode()
    start = 0
    while start < len(data):
        end = start + _MAX_SENTENCE_BYTES
        if end < len(data):
            newline, space = data.rfind(b"\n", start, end), data.rfind(b" ", start + 1, end)
            if newline >= 0:
                end = newline + 1
            elif space >= 0:
                end = space
            while data[end] & 0xC0 == 0x80:  # inside a character
                end -= 1
        yield data[start:end].decode()
        start = end


def _train(sample: TrainingSample, config: TokenizerConfig) -> bytes:
    """The model file."""
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
