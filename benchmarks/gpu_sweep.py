"""One command for a GPU machine: is the arithmetic right there, and how fast does it train?

    python benchmarks/gpu_sweep.py [--parts ...] [--time-limit SECONDS]

Needs the repository and the packages of benchmarks/README.md; MegaLite itself need not be installed. Parts, in order:
facts (the machine), layers and decoder (parity with the CPU in float64), syncs (where the host waits in a step), train
(tokens/s, MFU, memory of real training steps). A part that fails is a line of the table; the others still run.
"""

import argparse
import dataclasses
import json
import os
import re
import sys
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))  # so that neither megalite nor this folder need be installed
# Asked through the driver's runtime, the number of devices would make CUDA unusable in forked processes.
os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")

from benchmarks.gpu import facts, parity, syncs, training  # noqa: E402
from benchmarks.gpu.isolate import Row, run_isolated  # noqa: E402

PARTS = ("facts", "layers", "decoder", "syncs", "train")
GRACE_SECONDS = 60.0  # a cell that runs so far beyond the time limit is stopped


@dataclasses.dataclass(frozen=True)
class Cell:
    """One piece of work in a process of its own."""

    part: str
    name: str
    function: Callable[..., None]
    arguments: tuple[Any, ...]


def main(arguments: list[str] | None = None) -> int:
    """Run the sweep; 0 when every row is right (running out of memory or time is no error), else 1."""
    options = parse(arguments)
    started = time.monotonic()
    deadline = started + options.time_limit
    report: dict[str, Any] = {
        "format_version": 1,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "tiny": options.tiny,
        "flops_formula": training.FLOPS_FORMULA,
        "rows": [],
    }
    for cell in cells(options, deadline):
        if time.monotonic() > deadline:
            rows: list[Row] = [{"status": "skipped", "error": "the time limit"}]
        else:
            print(f"[{time.monotonic() - started:5.0f} s] {cell.part}: {cell.name}", file=sys.stderr, flush=True)
            rows = run_isolated(cell.function, deadline - time.monotonic() + GRACE_SECONDS, *cell.arguments)
        report["rows"] += [{"part": cell.part, "case": cell.name} | row for row in rows]
        report["total_seconds"] = time.monotonic() - started
        path = write(report, options.output)  # after every cell: what is stopped from outside leaves its results
    print_table(report)
    print(f"written: {path}")
    return int(any(row["status"] == "failed" for row in report["rows"]))


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS), help="which to run (default: all)")
    parser.add_argument(
        "--models", nargs="+", choices=training.model_names(), default=["gpt2_124m", "gpt3_1_3b"], metavar="MODEL",
        help="trained models: gpt3_1_3b or a name from conf/model (default: gpt2_124m gpt3_1_3b)",
    )  # fmt: skip
    parser.add_argument(
        "--micro-batches", nargs="+", type=int, default=[8, 16, 32, 64], metavar="B",
        help="sequences at once, growing until memory runs out (default: 8 16 32 64)",
    )  # fmt: skip
    parser.add_argument("--steps", type=int, default=20, help="timed steps of each training (default: 20)")
    parser.add_argument("--compile", choices=("off", "on", "both"), default="both", help="torch.compile of the blocks")
    parser.add_argument("--device", default="cuda", help="cuda (default), cuda:N, or cpu to try the sweep itself")
    parser.add_argument("--tiny", action="store_true", help="models of two narrow layers, for a trial on a CPU")
    parser.add_argument(
        "--time-limit", type=float, default=480.0, metavar="SECONDS", help="no new measurement after this (default 480)"
    )
    parser.add_argument(
        "--output", type=Path, default=None, help="JSON file (default: benchmarks/results/gpu_<device>_<date>.json)"
    )
    options = parser.parse_args(arguments)
    if min(options.micro_batches) < 1 or options.steps < 1:
        parser.error("--micro-batches and --steps must be at least 1")
    options.micro_batches = sorted(set(options.micro_batches))
    return options


def cells(options: argparse.Namespace, deadline: float) -> list[Cell]:
    """All work in order, cheap before dear."""
    device, tiny = options.device, options.tiny
    compiled = {"off": (False,), "on": (True,), "both": (False, True)}[options.compile]
    found = [Cell("facts", "facts", facts.facts, (device,)), Cell("layers", "layers", parity.layers, (device, tiny))]
    for family in ("gpt", "llama"):
        for c in compiled:
            name = f"{family}{' compiled' if c else ''}"
            found.append(Cell("decoder", name, parity.decoder, (device, tiny, family, c)))
    found += [Cell("syncs", f"ZeRO {stage}", syncs.syncs, (device, stage)) for stage in (1, 2, 3)]
    for model in options.models:
        for c in compiled:
            cell = training.TrainingCell(model, c, tiny)
            name = f"{model}{' compiled' if c else ''}"
            work = (device, cell, options.micro_batches, options.steps, deadline)
            found.append(Cell("train", name, training.train, work))
    return [cell for cell in found if cell.part in options.parts]


def write(report: dict[str, Any], output: Path | None) -> Path:
    """The report as JSON; the default name carries the device and the date."""
    if output is None:
        device = next(
            (row["device"] for row in report["rows"] if row["part"] == "facts" and "device" in row), "unknown"
        )
        name = re.sub(r"[^a-z0-9]+", "-", str(device).lower()).strip("-")
        output = ROOT / "benchmarks" / "results" / f"gpu_{name}_{report['date'][:10]}.json"
    output.parent.mkdir(parents=True, exist_ok=True)
    temporary = output.with_name(output.name + ".tmp")
    temporary.write_text(json.dumps(report, indent=1, allow_nan=False) + "\n")
    temporary.replace(output)
    return output


def print_table(report: dict[str, Any]) -> None:
    """Every row as one line, then the formula of the FLOPs and where the host waits."""
    from rich.console import Console
    from rich.table import Table

    console = Console(width=None if sys.stdout.isatty() else 150, highlight=False, markup=False)
    machine: Row = next((row for row in report["rows"] if row["part"] == "facts" and "device" in row), {})
    table = Table(title=f"{machine.get('device', 'unknown device')}{', tiny models' if report['tiny'] else ''}")
    for heading in ("part", "case", "status", "tokens/s", "MFU", "step ms", "peak GiB"):
        table.add_column(heading, justify="left" if heading in ("part", "case", "status") else "right", no_wrap=True)
    table.add_column("details")
    for row in report["rows"]:
        table.add_row(row["part"], row["case"], row["status"], *_figures(row), _details(row))
    console.print(table)
    versions = ", ".join(f"{name} {version}" for name, version in machine.get("packages", {}).items() if version)
    console.print(f"Python {machine.get('python')}, CUDA {machine.get('cuda')}, {versions}")
    peak = machine.get("peak_flops")
    console.print(f"{report['flops_formula']} ({f'{peak / 1e12:.0f} TFLOP/s' if peak else 'peak not known'}).")
    for row in report["rows"]:
        for place in row.get("where", ()):
            console.print(f"the host waits, {row['case']}: {place['count']} x {place['where']} ({place['what']})")


def _figures(row: Row) -> list[str]:
    if "tokens_per_second" not in row:
        return [""] * 4
    share = f"{100 * row['mfu']:.1f} %" if row["mfu"] is not None else "n/a"
    milliseconds = f"{1e3 * row['step_seconds_median']:.1f}"
    return [f"{row['tokens_per_second']:,.0f}", share, milliseconds, f"{row['peak_memory_bytes'] / 2**30:.1f}"]


def _details(row: Row) -> str:
    if row.get("error"):
        return str(row["error"])
    if "syncs" in row:
        return f"the host waits {row['syncs']} times in a step, {row['syncs_of_megalite']} of them in megalite"
    if "errors" in row:
        return ", ".join(f"{name} {f'{e:.0e}' if isinstance(e, float) else e}" for name, e in row["errors"].items())
    return ""


if __name__ == "__main__":
    sys.exit(main())
