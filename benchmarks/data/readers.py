"""One measurement of reading, in a process of its own: `python -m benchmarks.data.readers NAME FOLDER SECONDS_OF_CPU`.

Prints one JSON object. Every reader delivers rows of LENGTH + 1 token ids in random order as torch tensors, BATCH at a
time, until so much CPU time has gone; `samples_per_cpu_second` counts from the first batch on, `startup_cpu_seconds` is
everything before: interpreter, imports, opening, the first batch.
"""

import json
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

LENGTH, BATCH = 2048, 256


def megalite(folder: Path, widen: bool = False) -> Iterator[Any]:
    """Our loader: windows in the closed-form order, rows in the stored type."""
    from megalite.data.dataset import BlendedDataset
    from megalite.data.format import TokenStore
    from megalite.data.loader import Loader

    dataset = BlendedDataset([(TokenStore.open(folder / "store"), 1.0)], LENGTH, seed=1)
    loader = Loader(dataset, BATCH, BATCH, 0, 1)
    position = 0
    while True:
        (ids,) = loader.micro_batches(position)
        yield ids.long() if widen else ids
        position += BATCH


def megalite_int64(folder: Path) -> Iterator[Any]:
    """The same, widened to int64 on the CPU, as peers deliver it."""
    return megalite(folder, widen=True)


def plain_memmap(folder: Path) -> Iterator[Any]:
    """A memory map opened anew for each batch, windows at random places, two int64 copies: a widespread recipe."""
    import numpy as np
    import torch

    while True:
        data = np.memmap(folder / "tokens.bin", dtype=np.uint16, mode="r")
        starts = torch.randint(len(data) - LENGTH, (BATCH,)).tolist()
        x = torch.stack([torch.from_numpy(data[i : i + LENGTH].astype(np.int64)) for i in starts])
        y = torch.stack([torch.from_numpy(data[i + 1 : i + 1 + LENGTH].astype(np.int64)) for i in starts])
        yield x, y


def litdata(folder: Path) -> Iterator[Any]:
    """litdata's StreamingDataset with its TokensLoader, shuffled, collated to batches."""
    import torch
    from litdata import StreamingDataset, TokensLoader

    dataset = StreamingDataset(
        str(folder / "litdata"), item_loader=TokensLoader(block_size=LENGTH + 1), shuffle=True, drop_last=True
    )
    while True:
        rows = []
        for row in dataset:
            rows.append(row)
            if len(rows) == BATCH:
                yield torch.stack(rows)
                rows = []


def megatron(folder: Path) -> Iterator[Any]:
    """Megatron-Core's GPTDataset over one epoch's worth of samples, collated as its DataLoader does."""
    from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
    from megatron.core.datasets.indexed_dataset import IndexedDataset
    from megatron.core.datasets.utils import Split
    from torch.utils.data import default_collate

    prefix = str(next((folder / "megatron").glob("*.idx")).with_suffix(""))
    indexed = IndexedDataset(prefix, mmap=True)
    config = GPTDatasetConfig(
        random_seed=1, sequence_length=LENGTH, blend=([prefix], None), split="1", reset_position_ids=False,
        reset_attention_mask=False, eod_mask_loss=False, create_attention_mask=False, tokenizer=_NoTokenizer(),
        path_to_cache=str(folder / "megatron_cache"), mid_level_dataset_surplus=0.005,
    )  # fmt: skip
    import numpy as np

    documents = np.arange(indexed.document_indices.shape[0] - 1, dtype=np.int32)
    dataset = GPTDataset(indexed, prefix, documents, None, Split.train, config)
    while True:
        for start in range(0, len(dataset) - BATCH, BATCH):
            yield default_collate([dataset[i] for i in range(start, start + BATCH)])


class _NoTokenizer:
    """What GPTDataset asks a tokenizer for."""

    eod, pad, vocab_size, unique_identifiers = 0, 0, 50_000, {"class": "none"}


READERS: dict[str, Callable[[Path], Iterator[Any]]] = {
    "megalite": megalite,
    "megalite_int64": megalite_int64,
    "plain_memmap": plain_memmap,
    "litdata": litdata,
    "megatron": megatron,
}


def main(name: str, folder: str, seconds: float) -> None:
    import torch

    torch.set_num_threads(1)
    batches = READERS[name](Path(folder))
    next(batches)
    started = time.process_time()
    samples = 0
    while time.process_time() - started < seconds:
        next(batches)
        samples += BATCH
    took = time.process_time() - started
    print(json.dumps({"samples_per_cpu_second": samples / took, "startup_cpu_seconds": started}))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], float(sys.argv[3]))
