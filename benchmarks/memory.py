"""What memory takes to be spared: `python -m benchmarks.memory --output FILE`.

`loss`: the loss without the logits against `F.cross_entropy` on all of them, at 4,096 tokens, width 1,024 and 131,072
entries in fp32: peak memory beyond the inputs, the weight and their gradients, and CPU seconds. `convert`: weights of a
Llama of 1B in and out: peak anonymous memory above the start. Each measurement is a process; they take turns.
"""

import argparse
import json
import re
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import defaultdict
from pathlib import Path

from benchmarks.data.loading import ROOT, facts

LOSSES = ("megalite", "cross_entropy")
TOKENS, WIDTH, VOCABULARY = 4096, 1024, 131_072


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--parts", nargs="*", choices=("loss", "convert"), default=["loss", "convert"])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--one", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        name, *paths = arguments.one.split(",")
        print(json.dumps(ONE[name](*map(Path, paths))))
        return
    result: dict[str, object] = {"facts": facts()}
    with tempfile.TemporaryDirectory(prefix="megalite-memory-") as scratch:
        if "loss" in arguments.parts:
            result["loss"] = medians({name: name for name in LOSSES}, arguments.repeats)
        if "convert" in arguments.parts:
            make_llama(Path(scratch) / "hf")
            steps = {"import": f"import,{scratch}/hf,{scratch}/run", "export": f"export,{scratch}/run,{scratch}/out"}
            result["convert"] = medians(steps, 1)
    for part in arguments.parts:
        for name, row in result[part].items():  # type: ignore[attr-defined]
            print(f"{part:<10}{name:<16}" + "  ".join(f"{key} {value:,.2f}" for key, value in row.items()))
    if arguments.output:
        arguments.output.write_text(json.dumps(result, indent=1) + "\n")


def medians(measurements: dict[str, str], repeats: int) -> dict[str, dict[str, float]]:
    """Each in a process of its own, in turn."""
    found: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for _ in range(repeats):
        for name, one in measurements.items():
            command = [sys.executable, "-m", "benchmarks.memory", "--one", one]
            done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
            for key, value in json.loads(done.stdout.splitlines()[-1]).items():
                found[name][key].append(value)
    return {name: {key: statistics.median(values) for key, values in row.items()} for name, row in found.items()}


class Peak:
    """The most anonymous memory while it is entered, in MB above the start."""

    def __enter__(self) -> "Peak":
        self.start = self.most = anonymous_mb()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._stop.set()
        self._thread.join()
        self.above_start = self.most - self.start

    def _watch(self) -> None:
        while not self._stop.is_set():
            self.most = max(self.most, anonymous_mb())
            time.sleep(0.002)


def anonymous_mb() -> float:
    found = re.search(r"RssAnon:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found
    return int(found[1]) * 1024 / 1e6


def megalite_loss() -> dict[str, float]:
    import torch

    from megalite.layers.cross_entropy import Target, Vocabulary, linear_cross_entropy
    from megalite.mesh import single_mesh

    vocabulary = Vocabulary(VOCABULARY, single_mesh(torch.device("cpu")).tensor)
    weights = torch.full((1, TOKENS), 1 / TOKENS)
    return measure_loss(
        lambda x, weight, labels: linear_cross_entropy(x[None], weight, Target(labels[None], weights), vocabulary)
    )


def torch_loss() -> dict[str, float]:
    import torch.nn.functional as F

    return measure_loss(lambda x, weight, labels: F.cross_entropy(x @ weight.t(), labels))


def measure_loss(loss) -> dict[str, float]:  # type: ignore[no-untyped-def]
    """Forward and backward once for the gradients to be there, then once measured."""
    import torch

    generator = torch.Generator().manual_seed(0)
    x = torch.randn(TOKENS, WIDTH, generator=generator, requires_grad=True)
    weight = (0.02 * torch.randn(VOCABULARY, WIDTH, generator=generator)).requires_grad_()
    labels = torch.randint(VOCABULARY, (TOKENS,), generator=generator)
    small = slice(0, 64)
    loss(x[small].repeat(TOKENS // 64, 1), weight, labels).backward()
    started = time.process_time()
    with Peak() as peak:
        value = loss(x, weight, labels)
        value.backward()
    return {"peak_mb": peak.above_start, "cpu_seconds": time.process_time() - started, "loss": float(value)}


def make_llama(folder: Path) -> None:
    """A Llama 3.2 1B of zeros in bf16, as Hugging Face saves it."""
    import torch

    from megalite.config.compose import compose_train
    from megalite.convert.families import family_for
    from megalite.convert.tensors import bytes_of, logical_shards, part_shapes
    from megalite.tensor_file import TensorFileWriter

    model = compose_train(["data.train=unused", "model=llama_1b", "model.vocab_size=128256"]).model
    family, shards = family_for(model), logical_shards(model)
    contents = {
        part: ("BF16", shape) for rule in family.rules(model) for part, shape in part_shapes(rule, shards[rule.name])
    }
    folder.mkdir()
    with TensorFileWriter(folder / "model.safetensors", contents) as file:
        for _, shape in contents.values():
            file.write(bytes_of(torch.zeros(shape, dtype=torch.bfloat16)))
    values = {"model_type": family.model_type, **family.write(model)}
    (folder / "config.json").write_text(json.dumps(values))


def measure_import(source: Path, output: Path) -> dict[str, float]:
    from megalite.convert.importing import import_model

    with Peak() as peak:
        import_model(source, output)
    return {"peak_mb": peak.above_start, "largest_tensor_mb_in_fp32": 128_256 * 2048 * 4 / 1e6}


def measure_export(run_dir: Path, output: Path) -> dict[str, float]:
    from megalite.convert.exporting import export_model

    with Peak() as peak:
        export_model(run_dir / "checkpoints/step_00000000", output, None, None)
    return {"peak_mb": peak.above_start, "largest_tensor_mb_in_fp32": 128_256 * 2048 * 4 / 1e6}


ONE = {
    "megalite": megalite_loss,
    "cross_entropy": torch_loss,
    "import": measure_import,
    "export": measure_export,
}

if __name__ == "__main__":
    main()
