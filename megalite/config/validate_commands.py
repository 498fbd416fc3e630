"""The rules of the commands besides training; `validate.py` has those of training."""

import itertools
import math
from collections.abc import Iterator
from typing import get_args

from megalite.config.schema import DoctorConfig, EvaluateConfig, GenerateConfig, ResumeCheckConfig
from megalite.config.schema_data import (
    DataBuildConfig,
    DataConvertConfig,
    DataMergeConfig,
    DataPackConfig,
    DataRepairConfig,
    DataSplitConfig,
    DataStatsConfig,
    DataTraceConfig,
    Split,
    TokenizerTrainConfig,
)
from megalite.config.schema_monitor import JobsConfig, LogsConfig
from megalite.config.validate import same_source_rules
from megalite.config.validate_launch import build_launch_rules, slurm_path_rules
from megalite.errors import ConfigError


def validate_tokenizer_train(config: TokenizerTrainConfig) -> None:
    """Raise one `ConfigError` with a line for every setting of `megalite tokenizer train` that cannot work."""
    _raise(_tokenizer_train_rules(config))


def validate_data_build(config: DataBuildConfig) -> None:
    """Raise one `ConfigError` with a line for every setting of `megalite data build` that cannot work."""
    _raise(_data_build_rules(config))


def validate_data_repair(config: DataRepairConfig) -> None:
    """Raise `ConfigError` for a setting of `megalite data repair` that cannot work."""
    _raise(_named(config, "store", "output"))


def validate_data_stats(config: DataStatsConfig) -> None:
    """Raise one `ConfigError` with a line for every setting of `megalite data stats` that cannot work."""
    _raise(_data_stats_rules(config))


def validate_data_merge(config: DataMergeConfig) -> None:
    """Raise one `ConfigError` with a line for every setting of `megalite data merge` that cannot work."""
    _raise(_data_merge_rules(config))


def validate_data_split(config: DataSplitConfig) -> None:
    """Raise one `ConfigError` with a line for every setting of `megalite data split` that cannot work."""
    _raise(_data_split_rules(config))


def validate_data_convert(config: DataConvertConfig) -> None:
    """Raise one `ConfigError` with a line for every setting of `megalite data convert` that cannot work."""
    _raise(_data_convert_rules(config))


def validate_data_pack(config: DataPackConfig) -> None:
    """Raise one `ConfigError` with a line for every setting of `megalite data pack` that cannot work."""
    _raise(itertools.chain(_named(config, "store"), _at_least("", config, "sequence_length")))


def validate_data_trace(config: DataTraceConfig) -> None:
    """Raise one `ConfigError` with a line for every setting of `megalite data trace` that cannot work."""
    _raise(_data_trace_rules(config))


def validate_evaluate(config: EvaluateConfig) -> None:
    """Raise `ConfigError` for a setting of `megalite eval` that cannot work."""
    _raise(_evaluate_rules(config))


def validate_generate(config: GenerateConfig) -> None:
    """Raise one `ConfigError` with a line for every setting of `megalite generate` that cannot work."""
    _raise(_generate_rules(config))


def validate_resume_check(config: ResumeCheckConfig) -> None:
    """Raise one `ConfigError` with a line for every setting of `megalite resume-check` that cannot work."""
    _raise(_resume_check_rules(config))


def validate_doctor(config: DoctorConfig) -> None:
    """Raise one `ConfigError` with a line for every setting of `megalite doctor` that cannot work."""
    _raise(_doctor_rules(config))


def validate_jobs(config: JobsConfig) -> None:
    """Raise one `ConfigError` with a line for every setting of `megalite jobs` that cannot work."""
    _raise(_jobs_rules(config))


def validate_logs(config: LogsConfig) -> None:
    """Raise one `ConfigError` with a line for every setting of `megalite logs` that cannot work."""
    _raise(_logs_rules(config))


def _evaluate_rules(config: EvaluateConfig) -> Iterator[str]:
    yield from _at_least("", config, "micro_batch_size")
    yield from same_source_rules("data", config.data)


def _tokenizer_train_rules(config: TokenizerTrainConfig) -> Iterator[str]:
    tokenizer, reader = config.tokenizer, config.reader
    yield from _input_rules(config.input, config.output)
    yield from _at_least("tokenizer.", tokenizer, "vocab_size", "sample_bytes")
    yield from _at_least("reader.", reader, "max_document_bytes")
    if not 0 < tokenizer.character_coverage <= 1:
        yield f"tokenizer.character_coverage: found {tokenizer.character_coverage}, allowed: above 0 and at most 1"
    if not 0 <= tokenizer.language_balance <= 1:
        yield f"tokenizer.language_balance: found {tokenizer.language_balance}, allowed: 0 to 1"
    if not 1 <= tokenizer.num_threads <= 128:
        yield f"tokenizer.num_threads: found {tokenizer.num_threads}, allowed: 1 to 128"
    if config.split is not None and config.split not in get_args(Split):
        yield f"split: found {config.split!r}, allowed: {', '.join(get_args(Split))}, or null for all documents"
    if config.split is not None and reader.split_column is None:
        yield f"split={config.split} needs reader.split_column, the column that tells it"
    if tokenizer.language_balance > 0 and reader.language_column is None:
        yield "tokenizer.language_balance needs reader.language_column, the column that tells the language"


def _data_build_rules(config: DataBuildConfig) -> Iterator[str]:
    yield from _input_rules(config.input, config.output)
    if not 0 <= config.validation_fraction < 1:
        yield f"validation_fraction: found {config.validation_fraction}, allowed: 0 or more and below 1"
    yield from _at_least("", config, "workers", "shard_tokens", "parts")
    yield from build_launch_rules(config.launch, config.parts)
    if config.launch.name == "slurm":
        yield from slurm_path_rules("output", config.output)
    if config.part and not 0 <= config.part[0] < config.part[1]:
        yield f"part: found {list(config.part)}, expected [i,n] with 0 <= i < n"
    if (config.part or config.parts > 1) and config.dedup.lines:
        yield "dedup.lines: found true, but what is left of a document then depends on all before it: build in one part"
    yield from _at_least("dedup.", config.dedup, "ngram", "min_line_characters")
    if not 0 < config.dedup.threshold <= 1:
        yield f"dedup.threshold: found {config.dedup.threshold}, allowed: above 0 and at most 1"
    yield from _at_least("decontaminate.", config.decontaminate, "ngram", "min_overlap")
    yield from _at_least("reader.", config.reader, "max_document_bytes")


def _data_stats_rules(config: DataStatsConfig) -> Iterator[str]:
    yield from _named(config, "store")
    yield from _at_least("", config, "top")


def _data_merge_rules(config: DataMergeConfig) -> Iterator[str]:
    yield from _named(config, "output")
    if len(config.input) < 2 or not all(config.input):
        yield f"input: found {list(config.input)}, name two token stores at least"


def _data_split_rules(config: DataSplitConfig) -> Iterator[str]:
    yield from _named(config, "store", "output")
    if (config.parts is None) == (config.fraction is None):
        yield f"parts and fraction: found {config.parts} and {config.fraction}, give one of them"
    if config.parts is not None and config.parts < 2:
        yield f"parts: found {config.parts}, allowed: 2 or more"
    if config.fraction is not None and not 0 < config.fraction < 1:
        yield f"fraction: found {config.fraction}, allowed: above 0 and below 1"


def _data_convert_rules(config: DataConvertConfig) -> Iterator[str]:
    yield from _named(config, "input", "output")
    yield from _at_least("", config, "vocab_size")
    if config.end_of_document is not None and config.end_of_document < 0:
        yield f"end_of_document: found {config.end_of_document}, allowed: 0 or more"
    if config.vocab_size is not None and config.vocab_size > 1 << 32:
        yield f"vocab_size: found {config.vocab_size}, allowed: at most 2^32, the ids that a store can hold"


def _data_trace_rules(config: DataTraceConfig) -> Iterator[str]:
    yield from _named(config, "run_dir")
    if (config.step is None) == (config.document is None):
        yield f"step and document: found {config.step} and {config.document}, give one of them"
    yield from _at_least("", config, "step")


def _named(config: object, *names: str) -> Iterator[str]:
    """Paths that must not be empty."""
    for name in names:
        if not getattr(config, name):
            yield f"{name}: is empty, name a path"


def _input_rules(inputs: tuple[str, ...], output: str) -> Iterator[str]:
    if not inputs or not all(inputs):
        yield f"input: found {list(inputs)}, name at least one file, folder or glob"
    if not output:
        yield "output: is empty, name a folder"


def _generate_rules(config: GenerateConfig) -> Iterator[str]:
    if config.temperature != 0 and not 1e-6 <= config.temperature < math.inf:
        yield f"temperature: found {config.temperature}, allowed: 0 (always the likeliest token), or 1e-6 and more"
    if config.top_p is not None and not 0 < config.top_p <= 1:
        yield f"top_p: found {config.top_p}, allowed: above 0 and at most 1"
    yield from _at_least("", config, "max_new_tokens", "num_samples", "top_k")
    if not 0 <= config.seed < 2**63:
        yield f"seed: found {config.seed}, allowed: 0 or more and below 2^63"


def _resume_check_rules(config: ResumeCheckConfig) -> Iterator[str]:
    if config.steps < 2:
        yield (
            f"resume_check.steps: found {config.steps}, allowed: 2 or more, so that there is a step between the save "
            "and the next one to be killed in"
        )
    if len(config.compare) not in (0, 2) or not all(config.compare):
        yield f"resume_check.compare: found {list(config.compare)}, name two run directories, or none"


def _doctor_rules(config: DoctorConfig) -> Iterator[str]:
    if not 1 <= config.port <= 65535:
        yield f"port: found {config.port}, allowed: 1 to 65535"
    if not 0 <= config.min_free_gib < math.inf:
        yield f"min_free_gib: found {config.min_free_gib}, allowed: 0 or more"
    if config.nproc_per_node is not None and not 2 <= config.nproc_per_node <= 1024:
        yield f"nproc_per_node: found {config.nproc_per_node}, allowed: 2 to 1024, or null to measure nothing"
    if not 1 <= config.size_mib <= 1 << 16:
        yield f"size_mib: found {config.size_mib}, allowed: 1 to {1 << 16}"


def _jobs_rules(config: JobsConfig) -> Iterator[str]:
    yield from _named(config, "folder")
    if config.watch != 0 and not 0.5 <= config.watch < math.inf:
        yield f"watch: found {config.watch}, allowed: 0 (look once), or 0.5 seconds and more"
    if config.watch and config.format == "json":
        yield f"watch: found {config.watch}, but format=json prints one document: leave watch out, or format=table"


def _logs_rules(config: LogsConfig) -> Iterator[str]:
    yield from _named(config, "run_dir")
    yield from _at_least("", config, "lines")
    if any(rank < 0 for rank in config.ranks):
        yield f"ranks: found {list(config.ranks)}, allowed: 0 or more"


def _at_least(prefix: str, config: object, *names: str) -> Iterator[str]:
    """Whole numbers that must be 1 or more, or null where the schema allows it."""
    for name in names:
        value = getattr(config, name)
        if value is not None and value < 1:
            yield f"{prefix}{name}: found {value}, allowed: 1 or more"


def _raise(problems: Iterator[str]) -> None:
    if found := list(problems):
        raise ConfigError("\n".join(found))
