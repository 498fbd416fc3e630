"""datatrove's MinHash deduplication, all four steps: `python peer_datatrove.py SOURCE.jsonl SCRATCH`.

Runs in an environment of its own: `pip install datatrove[processing] orjson spacy`. To its favour words are cut at
white space instead of by a language's model, and what is kept is written uncompressed.
"""

import sys
from pathlib import Path

import datatrove.pipeline.dedup.minhash as minhash
from datatrove.executor import LocalPipelineExecutor
from datatrove.pipeline.dedup import MinhashDedupSignature
from datatrove.pipeline.readers import JsonlReader
from datatrove.pipeline.writers.jsonl import JsonlWriter
from datatrove.utils.hashing import HashConfig
from datatrove.utils.typeshelper import Languages


class WhiteSpace:
    """Words between white space."""

    def word_tokenize(self, text: str) -> list[str]:
        """Cut a text."""
        return text.split()


def main() -> None:
    """Signatures, buckets, clusters, filter."""
    source, scratch = Path(sys.argv[1]), Path(sys.argv[2])
    minhash.load_word_tokenizer = lambda *_, **__: WhiteSpace()
    config = minhash.MinhashConfig(hash_config=HashConfig(precision=64), num_buckets=21, hashes_per_bucket=6)
    signatures, buckets, remove = (str(scratch / name) for name in ("signatures", "buckets", "remove"))
    reader = {"data_folder": str(source.parent), "glob_pattern": source.name}
    sign = MinhashDedupSignature(output_folder=signatures, config=config, language=Languages.english)
    run([JsonlReader(**reader), sign], scratch / "logs1")
    for bucket in range(config.num_buckets):
        step = minhash.MinhashDedupBuckets(input_folder=signatures, output_folder=buckets, config=config)
        step.run(rank=bucket, world_size=config.num_buckets)
    run([minhash.MinhashDedupCluster(input_folder=buckets, output_folder=remove, config=config)], scratch / "logs2")
    keep = minhash.MinhashDedupFilter(input_folder=remove)
    run([JsonlReader(**reader), keep, JsonlWriter(str(scratch / "kept"), compression=None)], scratch / "logs3")


def run(pipeline: list, logs: Path) -> None:
    """One step in this process."""
    LocalPipelineExecutor(pipeline=pipeline, tasks=1, logging_dir=str(logs)).run()


if __name__ == "__main__":
    main()
