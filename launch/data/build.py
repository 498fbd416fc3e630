"""`megalite data build`, `verify` and `inspect`: raw text into token stores, and a look into them."""

from collections.abc import Sequence

from megalite.config.compose import compose_config
from megalite.config.schema_data import DataBuildConfig
from megalite.config.validate_commands import validate_data_build
from megalite.errors import ConfigError

from ..slurm.build import submit_build


def build(argv: Sequence[str]) -> int:
    """Tokenise text files into token stores: output/{train,validation}/<source>/."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    config = compose_config("data_build", DataBuildConfig, argv)
    validate_data_build(config)
    from megalite.data_tools.builder.building import build_part, build_store, check_build

    if config.launch.name == "slurm":
        if not config.launch.slurm.after:  # another job may still make what this one reads
            check_build(config)
        return submit_build(config, argv)
    if config.part:
        print(f"part {config.part[0]} of {config.part[1]}: {build_part(config)} units are done")
        return 0
    report = build_store(config)
    table = Table("store", title=escape(f"token stores in {report.output}"))
    for heading in ("documents", "tokens", "bytes", "bytes per token"):
        table.add_column(heading, justify="right")
    for name, store in report.stores.items():
        table.add_row(
            escape(name),
            f"{store.documents:,}",
            f"{store.tokens:,}",
            f"{store.bytes:,}",
            f"{store.bytes_per_token:.2f}",
        )
    console = Console()
    console.print(table)
    for stage, before, after in report.stages:
        console.print(f"{stage}: {before - after:,} of {before:,} documents left out", highlight=False)
    drops = {name: count for name, count in report.cleaning.items() if "dropped" in name}
    for name, count in sorted(drops.items(), key=lambda item: -item[1])[:5]:
        console.print(f"  {name}: {count:,}", highlight=False, markup=False)
    skipped = ", ".join(f"{count:,} x {reason}" for reason, count in report.skipped.items()) or "nothing"
    console.print(
        f"{report.documents_read:,} documents from {report.files:,} files; skipped: {skipped}\n"
        f"all of it: {report.page}",
        highlight=False,
        markup=False,
        soft_wrap=True,
    )
    return 0


def verify(argv: Sequence[str]) -> int:
    """Read token stores again and compare every file with the digests in the manifests.

    `store=` is a token store, or a folder with several, such as the output of `megalite data build`.
    """
    from megalite.data_tools.store_tools.inspection import verify_stores

    for store in verify_stores(_keys(argv, {"store": None})["store"]):
        print(f"{store}: whole")
    return 0


def inspect(argv: Sequence[str]) -> int:
    """Show a token store's counts and its first documents, decoded.

    `store=` as for `verify`; `documents=3`: so many of each store are printed.
    """
    from rich.console import Console
    from rich.markup import escape
    from rich.rule import Rule

    from megalite.data.format import TokenStore
    from megalite.data_tools.store_tools.inspection import find_stores, inspect_documents

    keys = _keys(argv, {"store": None, "documents": "3"})
    if not keys["documents"].isdecimal():
        raise ConfigError(f"documents: expected a whole number, found {keys['documents']!r}")
    console = Console()
    for path in find_stores(keys["store"]):
        store = TokenStore.open(path)
        manifest = store.manifest
        name, digest = (manifest.tokenizer.name, manifest.tokenizer.digest) if manifest.tokenizer else ("none", "-")
        console.print(Rule(escape(str(path))))
        console.print(
            f"source {manifest.source}: {manifest.num_documents:,} documents, {manifest.num_tokens:,} tokens, "
            f"{manifest.num_bytes:,} bytes of text, {len(manifest.shards)} shards of {manifest.dtype}\n"
            f"tokenizer {name} with {manifest.vocab_size:,} entries, digest {digest}",
            highlight=False,
            markup=False,
        )
        for document in inspect_documents(store, int(keys["documents"])):
            console.print(Rule(f"document {document.index}: {document.num_tokens} tokens, {document.num_bytes} bytes"))
            console.print(document.text, markup=False, highlight=False)
    return 0


def _keys(argv: Sequence[str], defaults: dict[str, str | None]) -> dict[str, str]:
    """`key=value` arguments; one without a key is the store. Raises `ConfigError`."""
    keys = dict(defaults)
    for argument in argv:
        key, separator, value = argument.partition("=")
        if not separator:
            key, value = "store", argument
        if key not in defaults:
            raise ConfigError(f"unknown key {key}. Allowed here: {', '.join(defaults)}")
        keys[key] = value
    if not keys["store"]:
        raise ConfigError("store is required: give it as store=PATH")
    return {key: value for key, value in keys.items() if value is not None}
