"""Read the history back from a wandb offline file.

The file is a LevelDB log (github.com/google/leveldb, doc/log_format.md) with a header of 7 bytes: blocks of 32 KiB that
hold chunks of (checksum, length, type), a record being one whole chunk or a first, some middle and a last one. A record
is a protobuf message of wandb's own `Record` type.
"""

import json
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

_BLOCK = 32768
_FILE_HEADER = 7
_CHUNK = struct.Struct("<IHB")  # checksum, bytes of data, type
_FULL, _FIRST, _MIDDLE, _LAST = 1, 2, 3, 4


def read_wandb_file(path: Path) -> list[dict[str, Any]]:
    """The logged rows of a `.wandb` file, `_step` and the other fields that wandb adds among them.

    A file cut short by a kill gives the rows before the cut.
    """
    from wandb.proto import wandb_internal_pb2

    messages: Any = wandb_internal_pb2  # its classes are made at import; a type checker sees none

    rows = []
    for data in _iter_records(path.read_bytes()):
        record = messages.Record.FromString(data)
        if record.WhichOneof("record_type") == "history":
            items = record.history.item
            rows.append({"/".join(item.nested_key) or item.key: json.loads(item.value_json) for item in items})
    return rows


def _iter_records(data: bytes) -> Iterator[bytes]:
    position, parts = _FILE_HEADER, b""
    while position + _CHUNK.size <= len(data):
        if _BLOCK - position % _BLOCK < _CHUNK.size:  # too little is left of the block for a chunk
            position += _BLOCK - position % _BLOCK
            continue
        checksum, length, kind = _CHUNK.unpack_from(data, position)
        chunk = data[position + _CHUNK.size : position + _CHUNK.size + length]
        if kind not in (_FULL, _FIRST, _MIDDLE, _LAST) or zlib.crc32(bytes([kind]) + chunk) != checksum:
            return
        position += _CHUNK.size + length
        parts = chunk if kind in (_FULL, _FIRST) else parts + chunk
        if kind in (_FULL, _LAST):
            yield parts
