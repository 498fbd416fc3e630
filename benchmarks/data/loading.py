"""Reading, start-up and order, with peers in the same run: `python -m benchmarks.data.loading`.

Every figure is the median over whole processes, which take turns: MegaLite, peer, peer, MegaLite, ... Peers that are
not installed are left out and named. Prints tables and writes one JSON.
"""

import argparse
import dataclasses
import datetime
import importlib.util
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from collections import defaultdict
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.data.readers import READERS
from megalite.data.manifest import FORMAT_VERSION, FileRecord, Manifest, ShardRecord
from megalite.data.writer import StoreWriter

NEEDS = {"litdata": "litdata", "megatron": "megatron.core"}
ROOT = Path(__file__).parent.parent.parent
VOCAB_SIZE, DOCUMENT_TOKENS = 50_000, 1000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=100_000_000, help="of the store that is read")
    parser.add_argument("--seconds", type=float, default=5.0, help="of CPU for each measurement of reading")
    parser.add_argument("--shards", type=int, default=1000, help="of the large store, 10^9 tokens each")
    parser.add_argument("--readers", nargs="*", default=list(READERS))
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    missing = [name for name in arguments.readers if name in NEEDS and not _is_installed(NEEDS[name])]
    readers = [name for name in arguments.readers if name not in missing]
    with tempfile.TemporaryDirectory(prefix="megalite-loading-") as scratch:
        folder = Path(scratch)
        make_readable(folder, arguments.tokens, readers)
        large = make_large(folder / "large", arguments.shards)
        small = folder / "small"
        write_store(small, 1_000_000)
        commands = {f"read {name}": ["readers", name, str(folder), str(arguments.seconds)] for name in readers}
        commands |= {"open 10^6 tokens": ["starts", "open", str(small)]}
        commands |= {f"open {arguments.shards} x 10^9 tokens": ["starts", "open", str(large)]}
        commands |= {"order": ["starts", "order"]}
        figures: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
        failed: dict[str, str] = {}
        for _ in range(arguments.repeats):
            for name in [name for name in commands if name not in failed]:
                done = run(commands[name])
                if done.returncode:
                    failed[name] = done.stderr.strip().splitlines()[-1]
                    continue
                for key, value in json.loads(done.stdout.splitlines()[-1]).items():
                    figures[name][key].append(value)
    result = {
        "facts": facts(),
        "settings": vars(arguments) | {"output": None},
        "not_installed": missing,
        "failed": failed,
    }
    result["medians"] = {name: {key: statistics.median(v) for key, v in row.items()} for name, row in figures.items()}
    result["all"] = figures
    for name, row in result["medians"].items():
        print(f"{name:<28}" + "  ".join(f"{key} {value:,.1f}" for key, value in row.items()))
    if missing:
        print(f"not installed, left out: {', '.join(missing)}")
    for name, reason in failed.items():
        print(f"{name} failed: {reason}")
    date = datetime.datetime.now(datetime.UTC).strftime("%Y%m%d-%H%M%S")
    output = arguments.output or ROOT / f"benchmarks/results/data_loading_{date}.json"
    output.write_text(json.dumps(result, indent=1, default=str) + "\n")
    print(f"written to {output}")


def run(command: list[str]) -> subprocess.CompletedProcess[str]:
    """One measurement in a process of its own, on one thread."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT}:{os.environ.get('PYTHONPATH', '')}"}
    module, *rest = command
    arguments = [sys.executable, "-m", f"benchmarks.data.{module}", *rest]
    return subprocess.run(arguments, cwd=ROOT, env=environment, capture_output=True, text=True)


def make_readable(folder: Path, num_tokens: int, readers: list[str]) -> None:
    """The same random documents for every reader, in its own format."""
    write_store(folder / "store", num_tokens)
    (folder / "tokens.bin").symlink_to(folder / "store/tokens_00000.bin")
    if "megatron" in readers:
        subprocess.run(
            [sys.executable, "-m", "megalite.launch.cli", "data", "convert", f"input={folder}/store",
             f"output={folder}/megatron"], check=True, stdout=subprocess.DEVNULL,
        )  # fmt: skip
    if "litdata" in readers:
        subprocess.run([sys.executable, "-c", _LITDATA, str(folder)], check=True, stdout=subprocess.DEVNULL)


# Its `optimize` runs what it is given in processes of its own, which must be able to import it.
_LITDATA = """
import sys
from pathlib import Path
import numpy as np, torch
from litdata import optimize, TokensLoader
folder = Path(sys.argv[1])
def documents(part):
    data = np.memmap(folder / "tokens.bin", dtype=np.uint16, mode="r")
    for start in range(part * len(data) // 4, (part + 1) * len(data) // 4, 1_000_000):
        yield torch.from_numpy(data[start : start + 1_000_000].astype(np.int32))
if __name__ == "__main__":
    optimize(documents, list(range(4)), str(folder / "litdata"), chunk_size=2049 * 4000, num_workers=1,
             item_loader=TokensLoader(), start_method="fork")
"""


def write_store(path: Path, num_tokens: int) -> None:
    """Random ids in documents of 1,000 tokens, one shard."""
    rng = np.random.default_rng(0)
    block = 1000
    with StoreWriter(path, vocab_size=VOCAB_SIZE, end_of_document=0, shard_tokens=num_tokens) as writer:
        while writer.num_tokens < num_tokens:
            tokens = rng.integers(1, VOCAB_SIZE, block * DOCUMENT_TOKENS, dtype=np.uint16)
            tokens[DOCUMENT_TOKENS - 1 :: DOCUMENT_TOKENS] = 0
            count = np.full(block, DOCUMENT_TOKENS)
            writer.add_documents(tokens, count, count)


def make_large(path: Path, num_shards: int) -> Path:
    """A shard of 10^9 tokens (sparse: zeros) and 10^6 documents, hard-linked so often under one manifest."""
    path.mkdir()
    num_tokens, num_documents = 10**9, 10**6
    offsets = (np.arange(num_documents + 1) * (num_tokens // num_documents)).astype("<u8")
    sizes = {}
    for name, content in (("tokens", None), ("document_offsets", offsets), ("document_bytes", np.diff(offsets))):
        with open(path / f"{name}_00000.bin", "wb") as file:
            if content is None:
                file.truncate(2 * num_tokens)
            else:
                content.tofile(file)
        sizes[name] = (path / f"{name}_00000.bin").stat().st_size
        for shard in range(1, num_shards):
            os.link(path / f"{name}_00000.bin", path / f"{name}_{shard:05d}.bin")
    shards = tuple(
        ShardRecord(
            **{n: FileRecord(file=f"{n}_{i:05d}.bin", bytes=size, digest=32 * "0") for n, size in sizes.items()}
        )
        for i in range(num_shards)
    )
    manifest = Manifest(
        format_version=FORMAT_VERSION, dtype="uint16", vocab_size=VOCAB_SIZE, end_of_document=0,
        num_tokens=num_shards * num_tokens, num_documents=num_shards * num_documents,
        num_bytes=num_shards * num_tokens, source="large", tokenizer=None, shards=shards,
    )  # fmt: skip
    (path / "manifest.json").write_text(json.dumps(dataclasses.asdict(manifest), indent=2))
    return path


def facts() -> dict[str, Any]:
    """What ran this, and how busy it was."""
    models = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    packages = ("megalite", "numpy", "torch", "litdata", "megatron-core")
    return {
        "cpu": models[0].partition(":")[2].strip() if models else platform.machine(),
        "cores": os.cpu_count(),
        "load": os.getloadavg(),
        "python": platform.python_version(),
        "packages": {name: _version(name) for name in packages},
    }


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _is_installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:
        return False


if __name__ == "__main__":
    main()
