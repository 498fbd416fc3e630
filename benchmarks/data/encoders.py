"""An encoder by itself, .jsonl to one flat file: `python -m benchmarks.data.encoders NAME SOURCE TOKENIZER`."""

import json
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

BATCH = 200  # documents


def batches(source: Path) -> Iterator[list[str]]:
    """The texts of a .jsonl."""
    import orjson

    batch = []
    with open(source, "rb") as file:
        for line in file:
            batch.append(orjson.loads(line)["text"])
            if len(batch) == BATCH:
                yield batch
                batch = []
    yield batch


def gpt2(folder: Path) -> Any:
    """GPT-2's tokenizer as the `tokenizers` library has it."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    tokenizer = Tokenizer(models.BPE.from_file(str(folder / "vocab.json"), str(folder / "merges.txt")))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def with_tokenizers(folder: Path) -> Callable[[list[str]], Any]:
    tokenizer = gpt2(folder)
    return lambda batch: np.concatenate([encoding.ids for encoding in tokenizer.encode_batch_fast(batch)])


def with_gigatoken(folder: Path) -> Callable[[list[str]], Any]:
    from gigatoken import Tokenizer

    content = json.loads(gpt2(folder).to_str())
    fast = Tokenizer.from_json(json.dumps(content))
    return lambda batch: np.asarray(fast.encode_batch([text.encode() for text in batch]).layout.content.data)


def with_sentencepiece(folder: Path) -> Callable[[list[str]], Any]:
    from sentencepiece import SentencePieceProcessor

    model = SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    return lambda batch: np.concatenate(model.encode(batch, num_threads=1))


ENCODERS = {"tokenizers": with_tokenizers, "gigatoken": with_gigatoken, "sentencepiece": with_sentencepiece}


def main() -> None:
    name, source, tokenizer = sys.argv[1:]
    encode = ENCODERS[name](Path(tokenizer))
    with tempfile.TemporaryFile() as output:
        for batch in batches(Path(source)):
            if batch:
                output.write(encode(batch).astype(np.uint16).tobytes())


if __name__ == "__main__":
    main()
