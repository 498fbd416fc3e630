"""Addresses of the web that are not wanted."""

import re
from collections import Counter
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

from .lines import compile_patterns
from .step import Dropped, read_list, require
from .words import View

# Up to a blank, a quote, a bracket, or the first character of a script that addresses are not written in.
_URL = re.compile(r"(?i)\b(?:https?://|www\.)[^\s<>\"'`{}|\\^\[\]\u3000-\u303f\u4e00-\u9fff\uff00-\uffef]+")
_MARK = "<URL>"


@dataclass(frozen=True, kw_only=True)
class Urls:
    """Drops documents with a denied address in their text, or masks the address as <URL>.

    Denied are the `domains` and those of `domains_file` (one a line), with all below them, and addresses in which one
    of `patterns` is found (Python's `re`; `.` denies all).
    """

    domains: tuple[str, ...] = ()
    domains_file: str | None = None
    patterns: tuple[str, ...] = ()
    action: Literal["drop", "mask"] = "drop"

    def __post_init__(self) -> None:
        denied, patterns = self._denied
        require(bool(denied or patterns), "domains: the step needs domains, domains_file or patterns")

    @cached_property
    def _denied(self) -> tuple[frozenset[str], tuple[re.Pattern[str], ...]]:
        listed = [] if self.domains_file is None else read_list("domains_file", self.domains_file)
        domains = frozenset(domain.lower().strip(".") for domain in (*self.domains, *listed))
        return domains, compile_patterns(self.patterns)

    def apply(self, view: View, language: str, counts: Counter[str]) -> str | Dropped:
        """The text, with marks in place of addresses, or why it goes."""
        text = view.text
        if "://" not in text and "www." not in text.lower():
            return text
        if self.action == "drop":
            return Dropped("denied URL") if any(self._denies(url[0]) for url in _URL.finditer(text)) else text
        masked = _URL.sub(lambda url: _MARK if self._denies(url[0]) else url[0], text)
        counts["urls: masked"] += masked.count(_MARK) - text.count(_MARK)
        return masked

    def _denies(self, url: str) -> bool:
        domains, patterns = self._denied
        host = re.split(r"[/?#]", url.split("://")[-1], maxsplit=1)[0]
        labels = host.rsplit("@", 1)[-1].split(":")[0].lower().strip(".").split(".")
        if any(".".join(labels[i:]) in domains for i in range(len(labels))):
            return True
        return any(pattern.search(url) for pattern in patterns)
