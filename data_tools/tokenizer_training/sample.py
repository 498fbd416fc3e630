"""The text that a tokenizer is trained on: weighted by language, cut where SentencePiece needs it."""

import re
from collections import Counter
from collections.abc import Iterator

import xxhash

from megalite.config.schema_data import TokenizerTrainConfig
from megalite.errors import DataError

from ..readers import Document, ReadReport, iter_documents

_MAX_SENTENCE_BYTES = 4096  # SentencePiece drops what is longer than 4192
# SentencePiece skips sentences with a zero byte or U+2585, and takes U+2581 for a space: the text is cut there.
_RESERVED = "\0\u2581\u2585"


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
