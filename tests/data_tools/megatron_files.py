"""Megatron's .bin and .idx for tests, written and read with struct from the description of the format.

Nothing here imports the code under test.
"""

import itertools
import struct
from pathlib import Path

import numpy as np

CODES = {"uint8": 1, "int8": 2, "int16": 3, "int32": 4, "int64": 5, "uint16": 8}
Documents = list[list[list[int]]]  # documents of sequences of ids


def write_current(prefix: Path, documents: Documents, dtype: str = "int32", modes: bool = False) -> Path:
    """An index as Megatron-LM writes it since 2019."""
    sequences = [ids for document in documents for ids in document]
    np.array([i for ids in sequences for i in ids], dtype).tofile(f"{prefix}.bin")
    width = np.dtype(dtype).itemsize
    with open(f"{prefix}.idx", "wb") as file:
        file.write(b"MMIDIDX\x00\x00" + struct.pack("<QB", 1, CODES[dtype]))
        file.write(struct.pack("<QQ", len(sequences), len(documents) + 1))
        file.write(struct.pack(f"<{len(sequences)}i", *(len(ids) for ids in sequences)))
        file.write(struct.pack(f"<{len(sequences)}q", *(width * n for n in starts(sequences)[:-1])))
        file.write(struct.pack(f"<{len(documents) + 1}q", *starts(documents)))
        file.write(bytes(len(sequences)) if modes else b"")
    return prefix


def write_legacy(prefix: Path, documents: Documents, dtype: str = "int32") -> Path:
    """An index as `--dataset-impl lazy` and `cached` were written."""
    sequences = [ids for document in documents for ids in document]
    np.array([i for ids in sequences for i in ids], dtype).tofile(f"{prefix}.bin")
    with open(f"{prefix}.idx", "wb") as file:
        file.write(b"TNTIDX\x00\x00" + struct.pack("<QQQ", 1, CODES[dtype], np.dtype(dtype).itemsize))
        file.write(struct.pack("<QQQ", len(sequences), len(sequences), len(documents) + 1))
        file.write(struct.pack(f"<{len(sequences) + 1}q", *range(len(sequences) + 1)))
        file.write(struct.pack(f"<{len(sequences) + 1}q", *starts(sequences)))
        file.write(struct.pack(f"<{len(sequences)}q", *map(len, sequences)))
        file.write(struct.pack(f"<{len(documents) + 1}q", *starts(documents)))
    return prefix


def starts(items: list) -> list[int]:
    """Where each item begins when they lie side by side, and where the last ends."""
    return [0, *np.cumsum([len(item) for item in items]).tolist()]


def read_current(prefix: Path) -> tuple[str, Documents]:
    """The type of the ids, and the documents, found by the pointers in bytes and not by adding lengths up."""
    index, data = Path(f"{prefix}.idx").read_bytes(), Path(f"{prefix}.bin").read_bytes()
    magic, version, code, count, documents = struct.unpack_from("<9sQBQQ", index)
    assert (magic, version) == (b"MMIDIDX\x00\x00", 1)
    at = struct.calcsize("<9sQBQQ")
    assert len(index) == at + 12 * count + 8 * documents
    lengths = struct.unpack_from(f"<{count}i", index, at)
    pointers = struct.unpack_from(f"<{count}q", index, at + 4 * count)
    bounds = struct.unpack_from(f"<{documents}q", index, at + 12 * count)
    dtype = next(name for name, value in CODES.items() if value == code)
    sequences = [np.frombuffer(data, dtype, n, pointer).tolist() for n, pointer in zip(lengths, pointers, strict=True)]
    return dtype, [sequences[a:b] for a, b in itertools.pairwise(bounds)]
