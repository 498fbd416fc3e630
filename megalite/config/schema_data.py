"""The configuration of the data tools as frozen dataclasses; see `schema.py`."""

from dataclasses import dataclass
from typing import Literal

TokenizerType = Literal["sp_bpe", "sp_unigram"]
Split = Literal["train", "validation"]
EncoderEngine = Literal["auto", "gigatoken", "reference"]


@dataclass(frozen=True, kw_only=True)
class TokenizerConfig:
    """A tokenizer to train (`megalite tokenizer train`)."""

    type: TokenizerType = "sp_bpe"
    vocab_size: int = 8192
    character_coverage: float = 0.98  # share of characters that get pieces; the rest is spelled in bytes
    byte_fallback: bool = True
    language_balance: float = 0.0  # 0: text as it comes .. 1: every reader.language_column gets the same share
    sample_bytes: int = 100_000_000  # at most so much text is looked at
    num_threads: int = 2  # stored in the model file: the same number gives the same bytes


@dataclass(frozen=True, kw_only=True)
class ReaderConfig:
    """How documents are read from files, for the tokenizer's training and for the store alike."""

    format: Literal["auto", "jsonl", "parquet", "txt"] = "auto"  # auto: by the file's ending
    document: Literal["blank_line", "file", "line"] = "file"  # what one document of a .txt file is
    text_column: str = "text"
    id_column: str | None = None  # None: file name and position
    source_column: str | None = None  # None: every document belongs to the source `source`
    language_column: str | None = None  # None: one language
    split_column: str | None = None  # says train or validation; None: split by `validation_fraction`
    source: str | None = None  # None: the first input's name without endings
    on_bad: Literal["skip", "stop"] = "stop"  # invalid UTF-8, missing text, broken line; skip: count and log


@dataclass(frozen=True, kw_only=True)
class TokenizerTrainConfig:
    """`megalite tokenizer train`."""

    input: tuple[str, ...]  # files, folders or globs; one or a list
    output: str  # a folder that does not exist yet
    split: Split | None = None  # with reader.split_column: only documents of this split are seen
    overwrite: bool = False  # replace an output of this command
    tokenizer: TokenizerConfig
    reader: ReaderConfig


@dataclass(frozen=True, kw_only=True)
class StoreTokenizerConfig:
    """The tokenizer that encodes a store."""

    path: str  # a folder of `megalite tokenizer train`, a SentencePiece .model, a tokenizer.json, or GPT-2's folder
    engine: EncoderEngine = "auto"  # auto: gigatoken where it gives the reference library's ids


@dataclass(frozen=True, kw_only=True)
class DataBuildConfig:
    """`megalite data build`."""

    input: tuple[str, ...]  # files, folders or globs; one or a list
    output: str  # a folder that does not exist yet; stores go to {train,validation}/<source>/ in it
    tokenizer: StoreTokenizerConfig
    reader: ReaderConfig
    validation_fraction: float = 0.01  # of the documents, chosen by a hash of the seed and their id
    seed: int = 1234
    workers: int | None = None  # None: the number of CPU cores
    shard_tokens: int = 500_000_000  # tokens a shard holds at most (a document is never cut)
    overwrite: bool = False  # replace an output of this command
