"""`megalite data pack` and `trace`: a store laid out in rows of documents; which documents a step trained on."""

from collections.abc import Sequence

from megalite.config.compose import compose_config
from megalite.config.schema_data import DataPackConfig, DataTraceConfig


def pack(argv: Sequence[str]) -> int:
    """Compute packings of stores, beside them."""
    from megalite.config.validate_commands import validate_data_pack
    from megalite.data.format import TokenStore
    from megalite.data.packing import write_packing
    from megalite.data_tools.store_tools.inspection import find_stores

    config = compose_config("data_pack", DataPackConfig, argv)
    validate_data_pack(config)
    for path in find_stores(config.store):
        rows = write_packing(TokenStore.open(path), config.packing, config.sequence_length, config.overwrite)
        found = rows.manifest
        print(
            f"{rows.path}: {found.num_pieces:,} pieces of documents in {found.num_rows:,} sequences, "
            f"{found.fill:.1%} of their positions filled"
        )
    return 0


def trace(argv: Sequence[str]) -> int:
    """Print the documents of a step, or the steps of a document, a line for each."""
    from megalite.data_tools.trace import open_trace

    config = compose_config("data_trace", DataTraceConfig, argv)
    found = open_trace(config)
    if config.step is not None:
        for use in found.documents(config.step):
            print(
                f"sample {use.sample}  {use.source}:{use.document}  tokens {use.start}:{use.stop} of {use.num_tokens}  "
                f"{use.text}"
            )
    if config.document is not None:
        steps = found.steps(config.document)
        for step in steps:
            print(f"step {step.step}  sample {step.sample}  epoch {step.epoch}")
        if not steps:
            print(f"{config.document} was in none of the {found.steps_so_far} steps so far")
    return 0
