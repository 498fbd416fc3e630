"""Check digits of numbers that name a person or an account."""

import re
from datetime import date

# Letters and digits of an IBAN by country (ISO 13616, the registry of SWIFT).
IBAN_LENGTHS = {
    "AD": 24, "AE": 23, "AL": 28, "AT": 20, "AZ": 28, "BA": 20, "BE": 16, "BG": 22, "BH": 22, "BI": 27, "BR": 29,
    "BY": 28, "CH": 21, "CR": 22, "CY": 28, "CZ": 24, "DE": 22, "DJ": 27, "DK": 18, "DO": 28, "EE": 20, "EG": 29,
    "ES": 24, "FI": 18, "FK": 18, "FO": 18, "FR": 27, "GB": 22, "GE": 22, "GI": 23, "GL": 18, "GR": 27, "GT": 28,
    "HR": 21, "HU": 28, "IE": 22, "IL": 23, "IQ": 23, "IS": 26, "IT": 27, "JO": 30, "KW": 30, "KZ": 20, "LB": 28,
    "LC": 32, "LI": 21, "LT": 20, "LU": 20, "LV": 21, "LY": 25, "MC": 27, "MD": 24, "ME": 22, "MK": 19, "MN": 20,
    "MR": 27, "MT": 31, "MU": 30, "NI": 28, "NL": 18, "NO": 15, "OM": 23, "PK": 24, "PL": 28, "PS": 29, "PT": 25,
    "QA": 29, "RO": 24, "RS": 22, "RU": 33, "SA": 24, "SC": 31, "SD": 18, "SE": 24, "SI": 19, "SK": 24, "SM": 27,
    "SO": 23, "ST": 25, "SV": 28, "TL": 23, "TN": 24, "TR": 26, "UA": 29, "VA": 22, "VG": 24, "XK": 20, "YE": 30,
}  # fmt: skip
# First digits of a card, and its lengths (ISO/IEC 7812; Visa, Mastercard, American Express, UnionPay, Discover, JCB,
# Diners Club).
_CARDS = re.compile(
    r"4(?:\d{12}|\d{15}|\d{18})|5[1-5]\d{14}|2(?:22[1-9]|2[3-9]\d|[3-6]\d\d|7[01]\d|720)\d{12}|3[47]\d{13}"
    r"|62\d{14,17}|6(?:011|4[4-9]\d|5\d\d)\d{12}|35(?:2[89]|[3-8]\d)\d{12}|3(?:0[0-5]|[689]\d)\d{11}"
)
_ID_WEIGHTS = (7, 9, 10, 5, 8, 4, 2, 1, 6, 3, 7, 9, 10, 5, 8, 4, 2)
# The first two digits of a Chinese identity number (GB/T 2260): provinces.
_PROVINCES = re.compile(r"1[1-5]|2[1-3]|3[1-7]|4[1-6]|5[0-4]|6[1-5]|71|8[12]")
# What the first letter of a Taiwanese identity number counts: 10 and on, in this order.
_TAIWAN_LETTERS = "ABCDEFGHJKLMNPQRSTUVXYWZIO"
_TAIWAN_WEIGHTS = (1, 9, 8, 7, 6, 5, 4, 3, 2, 1, 1)
_DOUBLED = (0, 2, 4, 6, 8, 1, 3, 5, 7, 9)


def is_card(digits: str) -> bool:
    """Whether digits are a payment card's: a known issuer and length, and Luhn's check digit (ISO/IEC 7812-1)."""
    if _CARDS.fullmatch(digits) is None or len(set(digits)) == 1:
        return False
    return (sum(map(int, digits[-1::-2])) + sum(_DOUBLED[int(digit)] for digit in digits[-2::-2])) % 10 == 0


def is_iban(text: str) -> bool:
    """Whether letters and digits are an IBAN: the country's length, and 1 modulo 97 (ISO 7064)."""
    if len(text) != IBAN_LENGTHS.get(text[:2]):
        return False
    return int("".join(str(int(character, 36)) for character in text[4:] + text[:4])) % 97 == 1


def is_chinese_id(text: str) -> bool:
    """Whether 18 characters are a Chinese identity number: a date of birth and the check digit of GB 11643-1999."""
    try:
        born = date(int(text[6:10]), int(text[10:12]), int(text[12:14]))
    except ValueError:
        return False
    if not 1850 <= born.year <= 2100:
        return False
    total = sum(weight * int(digit) for weight, digit in zip(_ID_WEIGHTS, text, strict=False))
    return "10X98765432"[total % 11] == text[17].upper()


def is_old_chinese_id(digits: str) -> bool:
    """Whether 15 digits are a Chinese identity number as before 1999 (GB 11643-1989): a province, a date of birth."""
    try:
        date(1900 + int(digits[6:8]), int(digits[8:10]), int(digits[10:12]))
    except ValueError:
        return False
    return _PROVINCES.match(digits) is not None


def is_taiwanese_id(text: str) -> bool:
    """Whether a letter and 9 digits are a Taiwanese identity number: its digits, weighted, are 0 modulo 10."""
    digits = f"{_TAIWAN_LETTERS.index(text[0]) + 10}{text[1:]}"
    return sum(weight * int(digit) for weight, digit in zip(_TAIWAN_WEIGHTS, digits, strict=True)) % 10 == 0
