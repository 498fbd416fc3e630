"""What the SentencePiece library does not tell of a model: its kind, and which pieces its user defined.

A model is a message of protocol buffers (sentencepiece_model.proto of SentencePiece 0.2): pieces in field 1, each with
its type in field 3; the settings of its training in field 2, with the model's kind in field 3.
"""

from collections.abc import Iterator

_MODEL_TYPES = {1: "unigram", 2: "bpe", 3: "word", 4: "char"}
_USER_DEFINED = 4


def read_model(data: bytes) -> tuple[str, set[int]]:
    """The kind of the model (unigram, bpe, word, char) and the ids of user-defined pieces.

    `data`: a model that the library has loaded.
    """
    kind, user, count = 1, set(), 0
    for number, content in _fields(data):
        if number == 1 and isinstance(content, bytes):
            if dict(_fields(content)).get(3) == _USER_DEFINED:
                user.add(count)
            count += 1
        elif number == 2 and isinstance(content, bytes):
            found = dict(_fields(content)).get(3, kind)
            kind = found if isinstance(found, int) else kind
    return _MODEL_TYPES.get(kind, "unknown"), user


def _fields(data: bytes) -> Iterator[tuple[int, int | bytes]]:
    """Number and content of each field of a message."""
    position = 0
    while position < len(data):
        key, position = _varint(data, position)
        if (wire := key & 7) == 0:
            value, position = _varint(data, position)
            yield key >> 3, value
            continue
        if wire == 2:
            size, position = _varint(data, position)
        else:
            size = 8 if wire == 1 else 4
        yield key >> 3, data[position : position + size]
        position += size


def _varint(data: bytes, position: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[position]
        position += 1
        value |= (byte & 0x7F) << shift
        shift += 7
        if byte < 0x80:
            return value, position
