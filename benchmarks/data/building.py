"""Building token stores, with peers in the same run: `python -m benchmarks.data.building --gpt2 DIR --output FILE`.

Text is the Python installation's own sources, a file a document, as one .jsonl. Every figure is the median over whole
processes, start-up included, which take turns; CPU seconds are those of the whole process tree. `--gpt2`: a folder with
GPT-2's vocab.json and merges.txt. Peers that are not installed are left out and named: for deduplication datatrove, in
the environment of `--peer-python`.
"""

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.data.loading import ROOT, facts

PARTS = ("byte_level", "sentencepiece", "dedup", "memory")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--parts", nargs="*", choices=PARTS, default=list(PARTS))
    parser.add_argument("--gpt2", type=Path, help="a folder with vocab.json and merges.txt")
    parser.add_argument("--megabytes", type=int, default=256)
    parser.add_argument("--large-megabytes", type=int, default=5000, help="of the second build of `memory`")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--peer-python", type=Path, help="the interpreter of an environment with datatrove")
    parser.add_argument("--output", type=Path, required=True)
    arguments = parser.parse_args()
    result: dict[str, Any] = {"facts": facts(), "settings": {key: str(value) for key, value in vars(arguments).items()}}
    with tempfile.TemporaryDirectory(prefix="megalite-building-") as scratch:
        folder = Path(scratch)
        for part in arguments.parts:
            result[part] = PART_FUNCTIONS[part](folder, arguments)
            for name, row in result[part].items():
                print(f"{part:<14}{name:<26}" + "  ".join(f"{key} {value:,.2f}" for key, value in row.items()))
            arguments.output.write_text(json.dumps(result, indent=1) + "\n")
    print(f"written to {arguments.output}")


def byte_level(folder: Path, arguments: argparse.Namespace) -> dict[str, dict[str, float]]:
    """Tokens per CPU second into a store, GPT-2's tokenizer; beside it the libraries, into one flat file."""
    source = make_source(folder, arguments.megabytes)
    assert arguments.gpt2, "byte_level needs --gpt2"
    commands = {
        "megalite": build_command(source, folder, arguments.gpt2),
        "megalite, 1 worker": build_command(source, folder, arguments.gpt2, "workers=1"),
        "gigatoken to a flat file": peer_command("gigatoken", source, arguments.gpt2),
        "tokenizers to a flat file": peer_command("tokenizers", source, arguments.gpt2),
    }
    return with_rates(measure(commands, folder, arguments.repeats), source)


def sentencepiece(folder: Path, arguments: argparse.Namespace) -> dict[str, dict[str, float]]:
    """The same with SentencePiece, 8,192 entries, trained on the text; beside it the library's own batch encoding."""
    source = make_source(folder, arguments.megabytes)
    tokenizer = folder / "tokenizer"
    if not tokenizer.exists():
        train = ["tokenizer", "train", f"input={source}", f"output={tokenizer}", "tokenizer.sample_bytes=20000000"]
        subprocess.run(command(*train), check=True, cwd=ROOT, env=environment(), capture_output=True)
    commands = {
        "megalite": build_command(source, folder, tokenizer),
        "megalite, reference": build_command(source, folder, tokenizer, "tokenizer.engine=reference"),
        "sentencepiece alone": peer_command("sentencepiece", source, tokenizer),
    }
    return with_rates(measure(commands, folder, arguments.repeats), source)


def dedup(folder: Path, arguments: argparse.Namespace) -> dict[str, dict[str, float]]:
    """Megabytes of text per CPU second, near duplicates by signatures of 126 values; ours tokenises besides."""
    source = make_source(folder, arguments.megabytes)
    assert arguments.gpt2, "dedup needs --gpt2"
    near = ("dedup.exact=true", "dedup.near=true")
    commands = {"megalite": build_command(source, folder, arguments.gpt2, *near)}
    commands["megalite, cleaned too"] = build_command(source, folder, arguments.gpt2, *near, "clean=code")
    if arguments.peer_python:
        peer = [str(arguments.peer_python), str(Path(__file__).with_name("peer_datatrove.py"))]
        commands["datatrove"] = [*peer, str(source), str(folder / "datatrove")]
    return with_rates(measure(commands, folder, arguments.repeats), source)


def memory(folder: Path, arguments: argparse.Namespace) -> dict[str, dict[str, float]]:
    """Peak anonymous memory of a build with exact and near deduplication, of a small and of a large input; run once."""
    assert arguments.gpt2, "memory needs --gpt2"
    rows = {}
    for megabytes in (arguments.large_megabytes // 10, arguments.large_megabytes):
        source = make_source(folder, megabytes)
        build = build_command(source, folder, arguments.gpt2, "dedup.exact=true", "dedup.near=true")
        rows[f"{megabytes} MB"] = {"peak_anonymous_mib": peak_anonymous(build, folder)}
        source.unlink()
    return rows


PART_FUNCTIONS: dict[str, Callable[[Path, argparse.Namespace], dict[str, dict[str, float]]]] = {
    "byte_level": byte_level,
    "sentencepiece": sentencepiece,
    "dedup": dedup,
    "memory": memory,
}


def make_source(folder: Path, megabytes: int) -> Path:
    """The sources of this Python, over and over with another first line, up to a size."""
    path = folder / f"python_{megabytes}.jsonl"
    if path.exists():
        return path
    roots = dict.fromkeys((sysconfig.get_paths()["stdlib"], sysconfig.get_paths()["purelib"]))
    files = [file for root in roots for file in sorted(Path(root).rglob("*.py"))]
    size = copy = 0
    with open(path, "w", encoding="utf-8") as output:
        while size < megabytes * 1e6:
            for file in files:
                try:
                    text = file.read_text(encoding="utf-8")
                except (OSError, UnicodeDecodeError):
                    continue
                if text.strip() and size < megabytes * 1e6:
                    size += output.write(json.dumps({"text": f"# copy {copy}\n{text}" if copy else text}) + "\n")
            copy += 1
    return path


def command(*arguments: str) -> list[str]:
    """The `megalite` command of this checkout."""
    return [sys.executable, "-c", "import sys; from megalite.launch.cli import main; sys.exit(main())", *arguments]


def build_command(source: Path, folder: Path, tokenizer: Path, *more: str) -> list[str]:
    """`megalite data build` to a folder that `measure` removes."""
    return command("data", "build", f"input={source}", f"output={folder}/out", f"tokenizer.path={tokenizer}", *more)


def peer_command(name: str, source: Path, tokenizer: Path) -> list[str]:
    """A library by itself: see `encoders.py`."""
    return [sys.executable, "-m", "benchmarks.data.encoders", name, str(source), str(tokenizer)]


def measure(commands: dict[str, list[str]], folder: Path, repeats: int) -> dict[str, dict[str, float]]:
    """Medians of CPU and wall seconds; the commands take turns."""
    found: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for _ in range(repeats):
        for name, arguments in commands.items():
            subprocess.run(["rm", "-rf", str(folder / "out"), str(folder / "datatrove")], check=True)
            before, started = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
            subprocess.run(arguments, check=True, cwd=ROOT, env=environment(), capture_output=True)
            after = resource.getrusage(resource.RUSAGE_CHILDREN)
            found[name]["cpu_seconds"].append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
            found[name]["wall_seconds"].append(time.perf_counter() - started)
            if (report := folder / "out/build_report.json").exists():
                stores = json.loads(report.read_text())["stores"].values()
                found[name]["tokens"].append(sum(store["tokens"] for store in stores))
    return {name: {key: statistics.median(values) for key, values in row.items()} for name, row in found.items()}


def with_rates(rows: dict[str, dict[str, float]], source: Path) -> dict[str, dict[str, float]]:
    """Megabytes of the input, and tokens as MegaLite counts them, per CPU second."""
    megabytes, tokens = source.stat().st_size / 1e6, max(row.get("tokens", 0) for row in rows.values())
    rates = {"mb_per_cpu_second": megabytes, "million_tokens_per_cpu_second": tokens / 1e6}
    return {
        name: row | {key: amount / row["cpu_seconds"] for key, amount in rates.items()} for name, row in rows.items()
    }


def peak_anonymous(arguments: list[str], folder: Path) -> float:
    """The largest sum of anonymous memory of a process and its children, in MiB, looked at every 50 ms."""
    subprocess.run(["rm", "-rf", str(folder / "out")], check=True)
    process = subprocess.Popen(arguments, cwd=ROOT, env=environment(), stdout=subprocess.DEVNULL)
    peak = 0.0
    while process.poll() is None:
        peak = max(peak, sum(anonymous(pid) for pid in [process.pid, *children_of(process.pid)]))
        time.sleep(0.05)
    assert process.returncode == 0, f"the build ended with {process.returncode}"
    return peak


def anonymous(pid: int) -> float:
    """RssAnon of a process, in MiB; 0 when it is gone."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0.0
    return sum(int(line.split()[1]) / 1024 for line in lines if line.startswith("RssAnon"))


def children_of(pid: int) -> list[int]:
    """Processes below `pid`."""
    try:
        own = [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except OSError:
        return []
    return own + [grandchild for child in own for grandchild in children_of(child)]


def environment() -> dict[str, str]:
    return os.environ | {"PYTHONPATH": f"{ROOT}:{os.environ.get('PYTHONPATH', '')}", "OMP_NUM_THREADS": "1"}


if __name__ == "__main__":
    main()
