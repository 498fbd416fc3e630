"""`megalite data stats`, `repair`, `merge`, `split` and `convert`: tools for token stores that exist."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from megalite.config.compose import compose_config
from megalite.config.schema_data import (
    DataConvertConfig,
    DataMergeConfig,
    DataRepairConfig,
    DataSplitConfig,
    DataStatsConfig,
)

if TYPE_CHECKING:
    from rich.console import Console

    from megalite.data_tools.megatron.to_store import ImportReport
    from megalite.data_tools.store_tools.merging import StoreCounts
    from megalite.data_tools.store_tools.repairing import RepairReport
    from megalite.data_tools.store_tools.stats import StoreStats


def stats(argv: Sequence[str]) -> int:
    """Print what a store holds, in numbers, and write them as JSON where `output` names a file."""
    from rich.console import Console
    from rich.markup import escape
    from rich.rule import Rule

    from megalite.data_tools.store_tools.stats import collect_stats

    config = compose_config("data_stats", DataStatsConfig, argv)
    console = Console()
    for path, found in collect_stats(config).items():
        console.print(Rule(escape(path)))
        _print_stats(console, found)
    if config.output:
        print(f"written to {config.output}")
    return 0


def repair(argv: Sequence[str]) -> int:
    """Write what is whole of a damaged store as a new one, and say what was lost."""
    from megalite.data_tools.store_tools.repairing import repair_store

    config = compose_config("data_repair", DataRepairConfig, argv)
    report = repair_store(config)
    if report is None:
        print(f"{config.store}: whole, nothing is written")
        return 0
    print("\n".join(_repair_lines(config, report)))
    return 0


def merge(argv: Sequence[str]) -> int:
    """Write the documents of several stores as one."""
    from megalite.data_tools.store_tools.merging import merge_stores

    config = compose_config("data_merge", DataMergeConfig, argv)
    _print_counts([merge_stores(config)])
    return 0


def split(argv: Sequence[str]) -> int:
    """Cut a store into several."""
    from megalite.data_tools.store_tools.splitting import split_store

    _print_counts(split_store(compose_config("data_split", DataSplitConfig, argv)))
    return 0


def convert(argv: Sequence[str]) -> int:
    """Megatron's dataset to a token store or, where `input` is one, a token store to Megatron's dataset."""
    from megalite.data.manifest import MANIFEST
    from megalite.data_tools.megatron.from_store import export_store
    from megalite.data_tools.megatron.to_store import import_dataset

    config = compose_config("data_convert", DataConvertConfig, argv)
    if not (Path(config.input) / MANIFEST).is_file():
        print("\n".join(_import_lines(config, import_dataset(config))))
        return 0
    report = export_store(config)
    print(f"{report.prefix}.bin and .idx: {report.documents:,} documents, {report.tokens:,} tokens as {report.dtype}")
    print(f"for Megatron: --data-path {report.prefix}")
    return 0


def _print_counts(stores: "Iterable[StoreCounts]") -> None:
    for store in stores:
        print(f"{store.path}: {store.documents:,} documents, {store.tokens:,} tokens, {store.bytes:,} bytes of text")


def _repair_lines(config: DataRepairConfig, report: "RepairReport") -> Iterable[str]:
    for file, problem in report.problems.items():
        yield f"damaged: {file} {problem}"
    yield f"{config.output}: {report.documents:,} documents, {report.tokens:,} tokens"
    shards = f", from {', '.join(report.lost_shards)}" if report.lost_shards else ""
    yield f"lost: {report.lost_documents:,} documents, {report.lost_tokens:,} tokens{shards}"
    if report.unverified_documents:
        yield f"not verified: {report.unverified_documents:,} documents of damaged shards, complete by what can be seen"
    if report.recounted_documents:
        yield f"recounted by decoding: the bytes of {report.recounted_documents:,} documents"
    if report.lost_tokenizer:
        yield "lost: the tokenizer; name a whole copy as tokenizer.path to have it in the new store"


def _import_lines(config: DataConvertConfig, report: "ImportReport") -> Iterable[str]:
    yield f"{config.output}: {report.documents:,} documents, {report.tokens:,} tokens from an index {report.format}"
    total = report.megatron_documents
    yield f"{report.ended:,} of {total:,} documents ended with end_of_document, {report.given_ends:,} were given it"
    if report.documents != total:
        yield f"{report.documents - total:,} more than Megatron's {total:,}: cut at ends inside documents"
    if report.common_last is not None:
        yield f"all of them ended with the id {report.common_last}: is that the end of a document? See end_of_document"
    if report.bytes is None:
        yield "bytes of text are not known and stand as 0, so bits per byte will mean nothing: give tokenizer.path"


def _print_stats(console: "Console", stats: "StoreStats") -> None:
    from rich.markup import escape
    from rich.table import Table

    lengths = f"mean {stats.mean_length:,.1f}, median {stats.median_length:,}, 90 % up to {stats.p90_length:,}"
    lines = [
        f"source {stats.source}: {stats.documents:,} documents, {stats.tokens:,} tokens in {stats.shards} shards",
        f"{stats.bytes:,} bytes of text, {stats.bytes_per_token:.2f} a token",
        f"tokens per document: {lengths}, longest {stats.max_length:,}",
        f"vocabulary: {stats.vocab_used:,} of {stats.vocab_size:,} entries occur ({stats.vocab_share:.1%})",
    ]
    if stats.unknown_share is not None:
        lines.append(f"unknown: {stats.unknown_tokens:,} tokens ({stats.unknown_share:.4%})")
    console.print("\n".join(lines), highlight=False, markup=False)
    table = Table("tokens per document", "", title="lengths")
    table.add_column("documents", justify="right")
    highest = max((count for _, count in stats.histogram), default=0)
    for bound, count in stats.histogram:
        table.add_row(f"{bound:,} to {2 * bound - 1:,}", "█" * round(30 * count / highest), f"{count:,}")
    console.print(table)
    table = Table("id", "token", title="most frequent tokens")
    for heading in ("count", "share"):
        table.add_column(heading, justify="right")
    for token in stats.top_tokens:
        text = "" if token.text is None else escape(repr(token.text))
        table.add_row(str(token.id), text, f"{token.count:,}", f"{token.share:.2%}")
    console.print(table)
