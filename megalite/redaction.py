"""Take secrets out of what is written or printed: values of keys that look like secrets, and user-info in URLs."""

import re
from typing import Any

HIDDEN = "***"
_SECRET_WORDS = frozenset(
    ["apikey", "auth", "credential", "credentials", "passphrase", "passwd", "password", "secret", "token"]
)
_SECRET_ENDINGS = (("access", "key"), ("api", "key"), ("private", "key"), ("secret", "key"))
_USER_INFO = re.compile(r"(?<=:/)(/?)[^/\s?#]*@")  # a path makes one slash of two


def redact(values: Any) -> Any:
    """A copy of nested plain values in which no secret is left.

    A text under a key such as `password`, `hf_token` or `api_key` becomes `***` (`num_tokens` and `tokenizer` are no
    secrets); in every other text the user-info of URLs does (`https://user:key@host` -> `https://***@host`).
    """
    if isinstance(values, dict):
        return {key: HIDDEN if _is_secret(str(key)) and value else redact(value) for key, value in values.items()}
    if isinstance(values, list | tuple):
        return [redact(value) for value in values]
    return redact_text(values) if isinstance(values, str) else values


def has_secret(text: str) -> bool:
    """Whether `redact_text` would change `text`."""
    return _USER_INFO.search(text) is not None


def redact_text(text: str) -> str:
    """`text` with the user-info of every URL in it replaced."""
    return _USER_INFO.sub(rf"\1{HIDDEN}@", text)


def _is_secret(key: str) -> bool:
    words = re.split(r"[^a-z0-9]+", key.lower())
    return bool(_SECRET_WORDS.intersection(words)) or tuple(words[-2:]) in _SECRET_ENDINGS
