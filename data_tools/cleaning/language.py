"""Which language a document is in."""

import functools
import re
from collections import Counter
from dataclasses import dataclass
from typing import Any

from .step import Dropped, require, require_package, require_share
from .words import HAN, KANA, View, split_words

_HAN_RUN = re.compile(f"[{HAN}]+")
_KANA_RUN = re.compile(f"[{KANA}]+")
_HANGUL_RUN = re.compile("[\u1100-\u11ff\u3130-\u318f\uac00-\ud7af]+")
# What py3langid tells; zxx is what is no language, such as lists of numbers.
LANGUAGES = (
    "ace", "af", "am", "an", "ar", "ary", "arz", "as", "az", "ba", "bcl", "be", "bg", "bn", "br", "bs", "ca", "crh",
    "cs", "cy", "da", "de", "dz", "el", "en", "eo", "es", "et", "eu", "ext", "fa", "fi", "fo", "fr", "fuv", "fy",
    "ga", "gcf", "gcr", "gd", "gl", "gom", "grc", "gu", "gug", "guw", "ha", "hbo", "he", "hi", "hr", "ht", "hu",
    "hy", "id", "ig", "is", "it", "ja", "jv", "ka", "kab", "kik", "kk", "km", "kn", "ko", "ku", "ky", "la", "lb",
    "lg", "lij", "ln", "lo", "lt", "ltg", "lv", "mg", "mk", "ml", "mn", "mr", "ms", "mt", "my", "ne", "nl", "nn",
    "no", "nso", "oc", "om", "or", "pa", "pcm", "pl", "ps", "pt", "qu", "ro", "ru", "rw", "sa", "sdh", "se", "si",
    "sk", "sl", "sn", "so", "sq", "sr", "st", "sv", "sw", "ta", "te", "tg", "th", "tk", "tl", "tr", "tt", "ug",
    "uk", "ur", "uz", "uzs", "vec", "vi", "vo", "wa", "wuu", "xh", "yo", "yue", "zh", "zu", "zxx",
)  # fmt: skip
_MIN_KANA = 0.1  # of Han and kana together: Japanese prose has more than half, quoting Chinese has hardly any


@dataclass(frozen=True, kw_only=True)
class Language:
    """Keeps documents in the languages `keep` (ISO 639-1: en, zh, ...) of which the identifier is sure enough.

    A text written mostly without blanks or in Hangul is told by its script alone: kana make it ja, Hangul ko, Han zh
    (simplified, traditional and classical alike). Any other goes to py3langid (Lui and Baldwin 2012, 140 languages), a
    naive Bayes classifier: sure of almost every text of a sentence or more, so that `min_confidence` mostly catches
    short texts, lists and code. It looks at `sample_characters`, half from the head of the text and half from its
    middle. 0.65 is the threshold of FineWeb (Penedo et al. 2024), there of another classifier.

    What a column says (`reader.language_column`) is not taken on trust here: this step looks at the text.
    """

    keep: tuple[str, ...]
    min_confidence: float = 0.65
    sample_characters: int = 500

    def __post_init__(self) -> None:
        require_package("py3langid", "clean")
        require(bool(self.keep), "keep: name at least one language")
        for language in self.keep:
            require(language in LANGUAGES, f"keep: {language!r} is not among {' '.join(LANGUAGES)}")
        require_share(self, "min_confidence")
        require(
            self.sample_characters >= 100, f"sample_characters: found {self.sample_characters}, allowed: 100 or more"
        )

    def apply(self, view: View, language: str, counts: Counter[str]) -> str | Dropped:
        """The same text, or what language it is dropped for."""
        found, confidence = identify_language(_sample(view.text, self.sample_characters))
        if found not in self.keep:
            return Dropped(f"language {found}")
        return view.text if confidence >= self.min_confidence else Dropped("language unsure")


def identify_language(text: str) -> tuple[str, float]:
    """The language of a text (ISO 639-1) and how sure that is, 0 to 1."""
    if not text.isascii():
        words = split_words(text)
        if words.is_unspaced:
            kana, han = (sum(map(len, run.findall(text))) for run in (_KANA_RUN, _HAN_RUN))
            share = kana / (kana + han)
            return ("ja", 1.0) if share >= _MIN_KANA else ("zh", 1 - share)
        letters = sum(map(len, words.spaced))
        if 2 * sum(map(len, _HANGUL_RUN.findall(text))) > letters:
            return "ko", 1.0
    label, confidence = _identifier().classify(text)
    return str(label), float(confidence)


def _sample(text: str, size: int) -> str:
    if len(text) <= size:
        return text
    middle = max(size // 2, len(text) // 2)
    return text[: size // 2] + "\n" + text[middle : middle + size // 2]


@functools.lru_cache(maxsize=1)
def _identifier() -> Any:
    """The model, loaded once a process: half a second and 130 MB."""
    from py3langid.langid import MODEL_FILE, LanguageIdentifier

    identifier = LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)
    # Half precision as stored would be widened for every document again, which takes a third of its time.
    identifier.nb_ptc = identifier.nb_ptc.astype("float32")
    return identifier
