"""The configuration of the data tools as frozen dataclasses; see `schema.py`."""

from dataclasses import dataclass, field
from typing import Any, Literal

from megalite.config.schema_launch import LaunchConfig

TokenizerType = Literal["bpe_bytelevel", "sp_bpe", "sp_unigram", "unigram", "wordpiece"]
Split = Literal["train", "validation"]
CleanStep = Literal[
    "c4",
    "code_quality",
    "control_characters",
    "fineweb",
    "gopher_quality",
    "gopher_repetition",
    "html",
    "language",
    "lines",
    "nfc",
    "pii",
    "repair_unicode",
    "urls",
    "whitespace",
]
EncoderEngine = Literal["auto", "gigatoken", "reference"]


@dataclass(frozen=True, kw_only=True)
class TokenizerConfig:
    """A tokenizer to train (`megalite tokenizer train`)."""

    type: TokenizerType = "sp_bpe"
    vocab_size: int = 8192
    character_coverage: float = 0.98  # share of characters that get pieces; the rest is spelled in bytes
    byte_fallback: bool = True  # of sp_bpe and sp_unigram; the byte-level types need none, wordpiece has none
    language_balance: float = 0.0  # 0: text as it comes .. 1: every reader.language_column gets the same share
    sample_bytes: int = 100_000_000  # at most so much text is looked at
    num_threads: int = 2  # stored in the model file: the same number gives the same bytes


@dataclass(frozen=True, kw_only=True)
class ReaderConfig:
    """How documents are read from files, for the tokenizer's training and for the store alike."""

    format: Literal["auto", "html", "json", "jsonl", "parquet", "txt"] = "auto"  # auto: by the file's ending
    document: Literal["blank_line", "file", "line"] = "file"  # what one document of a .txt file is
    text_column: str = "text"
    id_column: str | None = None  # None: file name and position
    source_column: str | None = None  # None: every document belongs to the source `source`
    language_column: str | None = None  # None: one language
    split_column: str | None = None  # says train or validation; None: split by `validation_fraction`
    source: str | None = None  # None: the first input's name without endings
    on_bad: Literal["skip", "stop"] = "stop"  # invalid UTF-8, missing text, broken line; skip: count and log
    max_document_bytes: int = 33_554_432  # a longer document is a bad one; it bounds what one may take of memory


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
class CleanStepConfig:
    """One step of the cleaning; a plain name stands for a step with its defaults."""

    step: CleanStep
    options: dict[str, Any] = field(default_factory=dict)  # the fields of its class in data_tools/cleaning


@dataclass(frozen=True, kw_only=True)
class StoreTokenizerConfig:
    """The tokenizer that encodes a store."""

    path: str  # a folder of `megalite tokenizer train`, a .model, a tokenizer.json, a .tiktoken, or GPT-2's folder
    engine: EncoderEngine = "auto"  # auto: gigatoken where it gives the reference library's ids


@dataclass(frozen=True, kw_only=True)
class DedupConfig:
    """Which documents of a build are left out because an earlier one holds the same."""

    exact: bool = False  # documents whose text is that of an earlier one
    near: bool = False  # documents whose sets of word n-grams are like those of an earlier one
    ngram: int = 5  # words (Han and other scripts without spaces: characters) of an n-gram
    lines: bool = False  # lines that stand earlier in the input, be it in a document that is dropped; reads it twice
    min_line_characters: int = 20  # shorter lines are never left out
    threshold: float = 0.75  # Jaccard similarity of the two sets from which on a document is left out


@dataclass(frozen=True, kw_only=True)
class DecontaminateConfig:
    """Which documents of a build are left out because they hold text of an evaluation set."""

    input: tuple[str, ...] = ()  # files of the evaluation sets; none: nothing is looked for
    text_columns: tuple[str, ...] = ("text",)  # of those files
    ngram: int = 13  # words that must be the same in a row
    min_overlap: int = 1  # so many n-grams of a document must be in an evaluation set


@dataclass(frozen=True, kw_only=True)
class DataBuildConfig:
    """`megalite data build`."""

    input: tuple[str, ...]  # files, folders or globs; one or a list
    output: str  # a folder that does not exist yet; stores go to {train,validation}/<source>/ in it
    tokenizer: StoreTokenizerConfig
    reader: ReaderConfig
    clean: tuple[CleanStepConfig, ...] = ()  # a list of steps, in order, or the name of one in conf/clean
    dedup: DedupConfig = field(default_factory=DedupConfig)
    decontaminate: DecontaminateConfig = field(default_factory=DecontaminateConfig)
    validation_fraction: float = 0.01  # of the documents, chosen by a hash of the seed and their id
    seed: int = 1234
    workers: int | None = None  # None: the number of CPU cores
    shard_tokens: int = 500_000_000  # tokens a shard holds at most (a document is never cut)
    overwrite: bool = False  # replace an output of this command
    part: tuple[int, int] | None = None  # [i,n]: do the i-th of n shares only, counted from 0, on a disk that all see
    parts: int = 1  # launch=slurm: an array of so many jobs, and one more that puts their shares together
    launch: LaunchConfig = field(default_factory=LaunchConfig)


@dataclass(frozen=True, kw_only=True)
class GivenTokenizerConfig:
    """A tokenizer that may be named."""

    path: str | None = None  # a folder or file as `megalite data build` takes; None: no tokenizer is given


@dataclass(frozen=True, kw_only=True)
class DataRepairConfig:
    """`megalite data repair`."""

    store: str  # a damaged token store; it is not touched
    output: str  # a folder that does not exist yet
    unverified: Literal["drop", "keep"] = "drop"  # complete documents of shards whose digest differs
    tokenizer: GivenTokenizerConfig  # a whole copy, when the one in the store is damaged


@dataclass(frozen=True, kw_only=True)
class DataStatsConfig:
    """`megalite data stats`."""

    store: str  # a token store, or a folder with several
    output: str | None = None  # a JSON file that does not exist yet
    top: int = 20  # so many of the most frequent tokens


@dataclass(frozen=True, kw_only=True)
class DataMergeConfig:
    """`megalite data merge`."""

    input: tuple[str, ...]  # token stores of one tokenizer, in order
    output: str  # a folder that does not exist yet
    source: str | None = None  # None: that of the stores, or the output's name when they differ


@dataclass(frozen=True, kw_only=True)
class DataSplitConfig:
    """`megalite data split`; one of `parts` and `fraction` is given."""

    store: str  # a token store
    output: str  # a folder that does not exist yet
    parts: int | None = None  # contiguous documents: part_0 ... in output, about the same tokens in each
    fraction: float | None = None  # of the documents, drawn by seed: validation/<source>; the rest: train/<source>
    seed: int = 1234


@dataclass(frozen=True, kw_only=True)
class DataConvertConfig:
    """`megalite data convert`: Megatron's .bin and .idx to a token store, or a token store to them."""

    input: str  # Megatron's files (x.idx, x.bin or x), or a token store
    output: str  # a folder that does not exist yet
    tokenizer: GivenTokenizerConfig  # the one that wrote the ids of Megatron's files; copied, and counts bytes of text
    vocab_size: int | None = None  # None: the tokenizer's
    end_of_document: int | None = None  # id that ends documents; None: the tokenizer's
    inner_ends: Literal["split", "stop"] = "stop"  # an end inside a document of Megatron: cut it there, or refuse
    source: str | None = None  # of the token store; None: the input's name
    keep_ends: bool = True  # to Megatron: documents keep their end-of-document token


@dataclass(frozen=True, kw_only=True)
class DataPackConfig:
    """`megalite data pack`."""

    store: str  # a token store, or a folder with several; the packing lies beside each, as <store>.packing
    sequence_length: int  # tokens of a row: data.sequence_length of the training
    packing: Literal["best_fit", "documents"] = "best_fit"  # whole documents share rows; or each has rows of its own
    overwrite: bool = False  # replace a packing that is there


@dataclass(frozen=True, kw_only=True)
class DataTraceConfig:
    """`megalite data trace`; one of `step` and `document` is given."""

    run_dir: str  # of a training run
    step: int | None = None  # which documents this step trained on; the first is 1
    document: str | None = None  # SOURCE:INDEX, which steps trained on it so far
