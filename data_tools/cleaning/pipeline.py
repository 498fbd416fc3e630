"""The list of steps that a configuration names, run over one document at a time."""

import dataclasses
import textwrap
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from megalite.config.loader import check_choice, load_config
from megalite.config.schema_data import CleanStepConfig
from megalite.errors import ConfigError

from .c4 import C4
from .characters import ControlCharacters, Nfc, RepairUnicode, Whitespace
from .code import CodeQuality
from .fineweb import FineWeb
from .gopher import GopherQuality
from .language import Language
from .lines import Lines
from .markup import Html
from .pii import Pii
from .repetition import GopherRepetition
from .step import Dropped, Step
from .urls import Urls
from .words import View

STEPS: Mapping[str, type[Step]] = {
    "c4": C4,
    "code_quality": CodeQuality,
    "control_characters": ControlCharacters,
    "fineweb": FineWeb,
    "gopher_quality": GopherQuality,
    "gopher_repetition": GopherRepetition,
    "html": Html,
    "language": Language,
    "lines": Lines,
    "nfc": Nfc,
    "pii": Pii,
    "repair_unicode": RepairUnicode,
    "urls": Urls,
    "whitespace": Whitespace,
}


def describe_steps() -> list[str]:
    """Each step with what it does and its options, as lines of text."""
    lines = []
    for name, step in STEPS.items():
        lines.append(f"  {name}: {(step.__doc__ or '').splitlines()[0]}")
        fields = dataclasses.fields(step)  # type: ignore[arg-type]
        options = [f"{field.name}={_shown(field)}" for field in fields]
        lines += textwrap.wrap(", ".join(options), 100, initial_indent="      ", subsequent_indent="      ")
    return lines


def _shown(field: "dataclasses.Field[Any]") -> str:
    if field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
        return "???"
    value = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
    if isinstance(value, tuple | list | set | frozenset):
        return f"[{','.join(map(str, value))}]"
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


class Cleaner:
    """Steps in order. Deterministic, picklable, without state between documents."""

    def __init__(self, steps: Sequence[tuple[str, Step]]):
        self._steps = tuple(steps)

    def clean(self, text: str, language: str, counts: Counter[str]) -> str | None:
        """The text after all steps, or None when one of them drops the document.

        Counts `<step>: changed`, `<step>: dropped (<reason>)`, and what a step tells besides, such as
        `pii: masked email`. `language` is an ISO 639-1 code, or "" when it is unknown.
        """
        view = View(text)
        for name, step in self._steps:
            result = step.apply(view, language, counts)
            if isinstance(result, str):
                if result == view.text:
                    continue
                if not result.strip():
                    result = Dropped("nothing left")
            if isinstance(result, Dropped):
                counts[f"{name}: dropped ({result.reason})"] += 1
                return None
            counts[f"{name}: changed"] += 1
            view = View(result)
        return view.text


def build_cleaner(steps: Sequence[CleanStepConfig]) -> Cleaner:
    """The cleaner that a configuration's list `clean` describes; an empty list changes nothing.

    Raises `ConfigError` that names the key for an unknown step or option, a value out of range, or a missing package.
    """
    built = []
    for i, config in enumerate(steps):
        check_choice(f"clean[{i}].step", config.step, list(STEPS))
        try:
            built.append((config.step, load_config(STEPS[config.step], config.options, f"clean[{i}].options")))
        except ModuleNotFoundError as error:
            raise ConfigError(f"clean[{i}]: the step {config.step} {error}") from None
        except ValueError as error:
            raise ConfigError(f"clean[{i}].options.{error}") from None
    return Cleaner(built)
