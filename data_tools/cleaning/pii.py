"""Data about persons: found by form, and by check digits where there are any."""

import ipaddress
import re
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np

from .checksums import IBAN_LENGTHS, is_card, is_chinese_id, is_iban, is_old_chinese_id, is_taiwanese_id
from .step import Dropped, require
from .words import View, spans_around

# Those whose form says most first.
Kind = Literal["email", "id_card", "credit_card", "iban", "ssn", "phone", "ip"]
MASKS = {kind: f"<{kind.upper()}>" for kind in get_args(Kind)}
Span = tuple[int, int]
Found = tuple[int, int, Kind]
_WINDOW = 80  # characters on both sides; an e-mail address may be longer than that only by its domain

# As Chinese input methods write digits and marks: 94 characters, in the order of ASCII from ! on.
_FULL_WIDTH, _HALF_WIDTH, _NUM_FULL_WIDTH = np.uint32(0xFF01), np.uint32(0x21), 94
_FULL_BRACKET, _NUM_BRACKET_TO_Z = np.uint32(0xFF08), 51  # what numbers, and what stands in them, are written with

_EMAIL = re.compile(
    r"(?<![A-Za-z0-9._%+-])[A-Za-z0-9_%+-]++(?:\.[A-Za-z0-9_%+-]++)*+"
    r"@(?:[A-Za-z0-9](?:[A-Za-z0-9-]{0,61}[A-Za-z0-9])?\.)+"
    r"(?!(?i:png|jpe?g|gif|svg|webp)(?![A-Za-z0-9]))[A-Za-z]{2,24}(?![A-Za-z0-9@])"  # icon@2x.png is an image
)
_SIGN_OF_EMAIL = re.compile(r"@(?<=[A-Za-z0-9_%+-]@)[A-Za-z0-9]")
# Quick looks: searches for a form are done only around what these find in the outline of a text, its digits made 0, its
# letters up to F made a, what is not ASCII made ?: a pattern that begins with one certain byte is found fastest.
_OUTLINE = bytes.maketrans(b"123456789ABCDEFbcdef", b"0" * 9 + b"a" * 11)
_SEVEN_DIGITS = re.compile(rb"0(?=[0 ().-]{6})(?:[ ().-]{0,3}0){6}")
_AT = re.compile(b"@")
_PART_OF_IP = re.compile(rb"0(?:\.0{1,3}\.0|[0a]{3}:[0a:])")
_ID_CARD = re.compile(r"(?<![0-9A-Za-z])[1-9]\d{5}[ -]?(?:18|19|20)\d{6}[ -]?\d{3}[0-9Xx](?![0-9A-Za-z])", re.ASCII)
_OLD_ID_CARD = re.compile(
    r"(?<![0-9A-Za-z.-])[1-8]\d(?!00)\d{6}[01]\d[0-3]\d(?!000)\d{3}(?![0-9A-Za-z]|[.-]\d)", re.ASCII
)
# The second digit tells men, women, and foreigners of either.
_TAIWANESE_ID = re.compile(r"(?<![0-9A-Za-z_.-])[A-Z][1289]\d{8}(?![0-9A-Za-z_-])", re.ASCII)
_CARD = re.compile(r"(?<![0-9A-Za-z.-])[2-6]\d{3}(?:[ -]?\d{2,7}){1,5}(?![0-9A-Za-z])", re.ASCII)
_IBAN_HEAD = re.compile(r"(?<![0-9A-Za-z])[A-Z]{2}[0-9]{2}(?= ?[0-9A-Z]{4})")
_IBAN_BODY = re.compile(r"(?: ?[0-9A-Z]){11,29}")
_SSN = re.compile(
    r"(?=[0-8])(?:(?<![0-9-])(?!000|666)\d{3}-(?!00)\d\d-(?!0000)\d{4}(?![0-9-])"
    r"|(?i:(?<=ssn)|(?<=ssn:)|(?<=ssn: )|(?<=ssn )|(?<=security number )|(?<=security number: ))"
    r"(?!000|666)\d{3} ?(?!00)\d\d ?(?!0000)\d{4}(?![0-9-]))",
    re.ASCII,
)
_CHINA = r"(?:\(\+86\)|\+86|0086)[ -]?"
_MOBILE = r"1[3-9]\d(?:[ -]?\d{4}){2}"
_AREA = r"(?:10|2\d|[3-9]\d\d)"  # of China, after a 0
_DASH = "[-–—]"
_NO_SUM = " ?[元人次万萬亿億]"  # after a sum of money, a number of people or of times; 共 is before one
_PHONE = re.compile(
    "(?=[+(0-9])(?:"  # most characters are no beginning of any
    + "|".join(
        (
            # China: mobiles of 11 digits, also one after the other, landlines with their area code, service numbers.
            rf"(?:(?<![0-9A-Za-z_.+共-])|(?<=(?<!\d)1[3-9]\d{{9}}-)|(?<=[Tt]el)|(?<=TEL))(?:{_CHINA}|86[ -]?)?{_MOBILE}"
            rf"(?![0-9A-Za-z_]|\.\d|-(?!1[3-9]\d{{9}}(?!\d))\d|{_NO_SUM})",
            rf"(?<![0-9A-Za-z_.+/-])(?:{_CHINA})?(?:\(0{_AREA}\) ?|0?{_AREA}{_DASH})[2-9]\d{{6,7}}"
            r"(?:-\d{1,5})?(?![0-9A-Za-z_-])",
            # With blanks in it, or nothing, a 0 must come first, and no other number stand beside it.
            rf"(?<![0-9A-Za-z_.+/-])(?<!\d )"
            rf"(?:(?:\(0{_AREA}\) ?|0{_AREA}{_DASH})[2-9]\d{{2,3}}[ -]|0{_AREA} [2-9]\d{{2,3}})\d{{4}}"
            rf"(?![0-9A-Za-z_-]| \d|{_NO_SUM})",
            rf"(?<![0-9A-Za-z_.+/-])0(?:10|2\d)[2-9]\d{{7}}(?![0-9A-Za-z_-]|\.\d|{_NO_SUM})",
            r"(?<![0-9A-Za-z_.+/-])[48]00[ -]?\d{3}[ -]\d{4}(?![0-9A-Za-z_-])",
            rf"(?<![0-9A-Za-z_.+/-])400[016-9](?!\d*000)\d{{6}}(?![0-9A-Za-z_-]|\.\d|{_NO_SUM})",
            # Taiwan: mobiles, landlines; 02-2024-1234 may be a month.
            r"(?<![0-9A-Za-z_.+/-])09\d\d(?:-\d{3}-?|-?\d{3}-| \d{3} )\d{3}(?![0-9A-Za-z_-])",
            r"(?<![0-9A-Za-z_.+/-])(?:(?:\(0[24]\) ?|0[24]-)(?!20)[2-8]\d{3}|(?:\(0[3-8]\) ?|0[3-8]-)[2-9]\d\d)-\d{4}"
            r"(?![0-9A-Za-z_-])",
            # North America: 3-3-4 with separators, 1 or +1 before it.
            r"(?<![0-9A-Za-z_.+/-])(?:\+?1[ .-]?)?(?:\([2-9]\d{2}\) ?|[2-9]\d{2}[ .-])[2-9]\d{2}[ .-]\d{4}"
            r"(?![0-9A-Za-z_]|[.-]\d)",
            # Any country: + and 8 to 15 digits (ITU-T E.164).
            r"(?<![0-9A-Za-z_+])\+[1-9]\d{0,2}[ .-]?(?:\(\d{1,4}\)[ .-]?)?\d(?:[ .-]?\d){5,12}(?![0-9A-Za-z_])",
        )
    )
    + ")",
    re.ASCII,
)
_IPV4 = re.compile(
    r"(?<![0-9A-Za-z_.-])(?:(?:25[0-5]|2[0-4]\d|1?\d?\d)\.){3}(?:25[0-5]|2[0-4]\d|1?\d?\d)(?![0-9A-Za-z_]|[.-][0-9A-Za-z])",
    re.ASCII,
)
_IPV6 = re.compile(r"(?<![0-9A-Za-z:.])[23][0-9A-Fa-f]{3}(?::{1,2}[0-9A-Fa-f]{1,4}){1,7}(?:::)?(?![0-9A-Za-z:])")
# Four numbers after these words are a version or a section.
_NO_ADDRESS = re.compile(r"(?i:version|release|firmware|section|chapter|build|ver\.?|v\.?|§|版本?|节|節|章)[\s:：]*\Z")


@dataclass(frozen=True, kw_only=True)
class Pii:
    """Masks, or drops documents with, data about persons in English and Chinese text.

    email; id_card: Chinese identity numbers, of 18 digits and Taiwan's with the right check digit, of 15 digits with a
    province and a date of birth; credit_card: known issuers, Luhn's check digit; iban: modulo 97; ssn: of the United
    States, with dashes or named; phone: mobiles and landlines of China and Taiwan, North American ones, and any with +
    and its country; ip: IPv4 and IPv6 addresses that are public. A mask is <EMAIL> and so on. Names and postal
    addresses have no form to find them by.
    """

    action: Literal["mask", "drop"] = "mask"
    kinds: tuple[Kind, ...] = get_args(Kind)

    def __post_init__(self) -> None:
        require(bool(self.kinds), f"kinds: name at least one of {', '.join(get_args(Kind))}")

    def apply(self, view: View, language: str, counts: Counter[str]) -> str | Dropped:
        """The text with masks, or what it is dropped for."""
        text = view.text
        plain = _half_width(text)
        outline = plain.encode("ascii", "replace").translate(_OUTLINE)  # of the same length
        anchors = {_FINDERS[kind][0] for kind in self.kinds}
        windows = {anchor: spans_around(anchor.finditer(outline), _WINDOW) for anchor in anchors}
        found: list[Found] = []
        for kind in self.kinds:
            anchor, find = _FINDERS[kind]
            found += [(*span, kind) for window in windows[anchor] for span in find(plain, *window)]
        if not found:
            return text
        found = _without_overlaps(found)
        if self.action == "drop":
            return Dropped(found[0][2].replace("_", " "))
        counts.update(f"pii: masked {kind.replace('_', ' ')}" for _, _, kind in found)
        return _masked(text, found)


def _without_overlaps(found: list[Found]) -> list[Found]:
    """In order of the text; of two that overlap the one whose form says more, as `Kind` lists them."""
    kept: list[Found] = []
    rank = get_args(Kind).index
    for span in sorted(found):
        if kept and span[0] < kept[-1][1]:
            kept[-1] = min(kept[-1], span, key=lambda one: rank(one[2]))
        else:
            kept.append(span)
    return kept


def _half_width(text: str) -> str:
    """The text with digits and marks as Chinese input methods write them made ASCII, of the same length."""
    if text.isascii():
        return text
    code_points = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), "<u4")
    # Differences wrap around, so that what stands before the first character is far above the last.
    if not (code_points - _FULL_BRACKET < _NUM_BRACKET_TO_Z).any():
        return text
    is_full = code_points - _FULL_WIDTH < _NUM_FULL_WIDTH
    half = np.where(is_full, code_points - (_FULL_WIDTH - _HALF_WIDTH), code_points)
    return half.tobytes().decode("utf-32-le", "surrogatepass")


def _masked(text: str, spans: list[Found]) -> str:
    parts, end = [], 0
    for start, stop, kind in spans:
        parts += [text[end:start], MASKS[kind]]
        end = stop
    return "".join([*parts, text[end:]])


def _emails(text: str, start: int, end: int) -> Iterator[Span]:
    if _SIGN_OF_EMAIL.search(text, start, end):  # a decorator is none
        yield from (match.span() for match in _EMAIL.finditer(text, start, end))


def _id_cards(text: str, start: int, end: int) -> Iterator[Span]:
    for match in _ID_CARD.finditer(text, start, end):
        if is_chinese_id(re.sub("[ -]", "", match[0])):
            yield match.span()
    for match in _OLD_ID_CARD.finditer(text, start, end):
        if is_old_chinese_id(match[0]) and not is_card(match[0]):  # those of American Express have 15 digits too
            yield match.span()
    for match in _TAIWANESE_ID.finditer(text, start, end):
        if is_taiwanese_id(match[0]):
            yield match.span()


def _cards(text: str, start: int, end: int) -> Iterator[Span]:
    return (match.span() for match in _CARD.finditer(text, start, end) if is_card(re.sub("[ -]", "", match[0])))


def _ibans(text: str, first: int, last: int) -> Iterator[Span]:
    """An IBAN may stand in groups of four, and capitals may follow it: its country tells where it ends."""
    for head in _IBAN_HEAD.finditer(text, first, last):
        body = _IBAN_BODY.match(text, head.end())
        if body is None or head[0][:2] not in IBAN_LENGTHS:
            continue
        end, missing = head.end(), IBAN_LENGTHS[head[0][:2]] - 4
        for character in body[0]:
            if not missing:
                break
            missing -= character != " "
            end += 1
        followed = text[end : end + 1].isascii() and text[end : end + 1].isalnum()
        if not missing and not followed and is_iban(text[head.start() : end].replace(" ", "")):
            yield head.start(), end


def _matches(form: re.Pattern[str]) -> Callable[[str, int, int], Iterator[Span]]:
    return lambda text, start, end: (match.span() for match in form.finditer(text, start, end))


def _addresses(text: str, start: int, end: int) -> Iterator[Span]:
    """IP addresses that are routed in the public internet; loopback, private, and example ranges name nobody."""
    for match in (*_IPV4.finditer(text, start, end), *_IPV6.finditer(text, start, end)):
        if _NO_ADDRESS.search(text, max(0, match.start() - 12), match.start()):
            continue
        try:
            address = ipaddress.ip_address(match[0])
        except ValueError:
            continue
        if address.is_global and not address.is_multicast:
            yield match.span()


# What is looked for at once, and what is found around it.
_FINDERS: dict[Kind, tuple[re.Pattern[bytes], Callable[[str, int, int], Iterator[Span]]]] = {
    "email": (_AT, _emails),
    "id_card": (_SEVEN_DIGITS, _id_cards),
    "credit_card": (_SEVEN_DIGITS, _cards),
    "iban": (_SEVEN_DIGITS, _ibans),
    "ssn": (_SEVEN_DIGITS, _matches(_SSN)),
    "phone": (_SEVEN_DIGITS, _matches(_PHONE)),
    "ip": (_PART_OF_IP, _addresses),
}
