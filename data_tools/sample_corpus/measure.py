"""Bytes per token of tokenizers trained on the sample corpus: the table in README.md.

python -m megalite.data_tools.sample_corpus.measure
"""

import tempfile
from collections import defaultdict
from collections.abc import Iterator
from itertools import product
from pathlib import Path

from megalite.config.schema_data import ReaderConfig, TokenizerConfig, TokenizerTrainConfig
from megalite.errors import ConfigError
from megalite.tokenizer import load_tokenizer

from ..readers import ReadReport, iter_documents
from ..tokenizer_training import train_tokenizer

CORPUS = Path(__file__).with_name("corpus.parquet")
READER = ReaderConfig(
    id_column="id", source_column="source", language_column="language", split_column="split", on_bad="stop"
)
# (type, coverage, language balance), each at every vocabulary size
VOCAB_SIZES = (2048, 4096, 8192)
SETTINGS = (
    *(("sp_bpe", coverage, balance) for coverage in (0.9, 0.95, 0.98, 0.9995) for balance in (0.0, 0.5, 1.0)),
    *(("sp_unigram", coverage, 1.0) for coverage in (0.9, 0.95, 0.98)),
)


def bytes_per_token(config: TokenizerConfig) -> dict[str, float]:
    """By source, on the validation split, end-of-document tokens left out; trained on the training split."""
    num_bytes, num_tokens = defaultdict[str, int](int), defaultdict[str, int](int)
    with tempfile.TemporaryDirectory() as folder:
        output = f"{folder}/tokenizer"
        train = TokenizerTrainConfig(
            input=(str(CORPUS),), output=output, split="train", tokenizer=config, reader=READER
        )
        tokenizer = load_tokenizer(train_tokenizer(train))
        for document in iter_documents((str(CORPUS),), READER, ReadReport()):
            if document.split == "validation":
                num_bytes[document.source] += document.num_bytes
                num_tokens[document.source] += len(tokenizer.encode(document.text))
    return {source: num_bytes[source] / num_tokens[source] for source in num_bytes}


def rows() -> Iterator[str]:
    """The table's rows in Markdown."""
    for vocab_size, (type_, coverage, balance) in product(VOCAB_SIZES, SETTINGS):
        config = TokenizerConfig(
            type=type_,  # type: ignore[arg-type]
            vocab_size=vocab_size,
            character_coverage=coverage,
            language_balance=balance,
        )
        try:
            ratio = bytes_per_token(config)
            figures = f"{ratio['shakespeare']:.2f} | {ratio['tang']:.2f}"
        except ConfigError:
            figures = "too many characters | "
        yield f"| {vocab_size} | {type_} | {coverage} | {balance} | {figures} |"


if __name__ == "__main__":
    print("| vocabulary | type | coverage | balance | Shakespeare | Tang |\n|---|---|---|---|---|---|")
    for row in rows():
        print(row, flush=True)
