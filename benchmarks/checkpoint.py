"""What safety costs: `python -m benchmarks.checkpoint --output FILE`.

Two ranks on a CPU, data 2, ZeRO 1, a model whose checkpoint takes 1 GB; saving with digests and reading back against
saving without either, loading with and without verification, what an asynchronous save keeps the training waiting for,
and the watchdog's calls against a step. In turns, medians of `--repeats`; everything on the disk of `--folder`.
"""

import argparse
import contextlib
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np

from benchmarks.data.loading import facts
from megalite.checkpoint import Counters, Saver, agree_on_checkpoint, load_checkpoint, writing
from megalite.checkpoint_folder import checkpoint_name
from megalite.config.loader import load_config
from megalite.config.place import Place
from megalite.config.schema import TrainConfig
from megalite.data.writer import StoreWriter
from megalite.engine import Engine, preload
from megalite.guard.heartbeat import Heartbeat
from megalite.launch.spawn import spawn_ranks
from megalite.mesh import build_mesh
from megalite.preflight import preflight
from megalite.process import last_collectives, pick_device, start_process_group

WIDTH, LAYERS, VOCABULARY = 768, 8, 16_384
_CALLS = 100_000
_PHASES_A_STEP = 4  # that the trainer enters


class NoDigest:
    """What `xxhash.xxh3_128` looks like to a writer."""

    def update(self, data: object) -> None:
        """Nothing."""

    def hexdigest(self) -> str:
        """Always the same."""
        return "0" * 32


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, help="on the disk to be measured; a temporary one")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=arguments.folder, prefix="megalite-checkpoint-") as scratch:
        folder = Path(scratch)
        config = preflight(make_config(folder))
        preload()
        code = spawn_ranks(lambda place: measure(place, config, folder, arguments.repeats), 2)
        assert code == 0, f"the ranks ended with {code}"
        seconds = {name: statistics.median(values) for name, values in json.loads((folder / "out").read_text()).items()}
    ratios = {
        "save: with digests / without": seconds["save"] / seconds["save, no digests"],
        "load: verified / not": seconds["load"] / seconds["load, not verified"],
        "asynchronous save: blocked / synchronous": seconds["asynchronous, blocked"] / seconds["save"],
        "watchdog: its calls / step": seconds["watchdog a step"] / seconds["step"],
    }
    for name, value in [*seconds.items(), *ratios.items()]:
        print(f"{name:<44}{value:12.6f}")
    if arguments.output:
        result = {"facts": facts(), "seconds": seconds, "ratios": ratios}
        arguments.output.write_text(json.dumps(result, indent=1) + "\n")


def make_config(folder: Path) -> TrainConfig:
    with StoreWriter(folder / "store", vocab_size=VOCABULARY, end_of_document=0, source="random") as writer:
        tokens = np.random.default_rng(0).integers(1, VOCABULARY, 100_000)
        writer.add_document(tokens, num_bytes=4 * len(tokens))
    model = {"vocab_size": VOCABULARY, "hidden_size": WIDTH, "num_layers": LAYERS, "num_attention_heads": 12,
             "max_sequence_length": 128, "tied_embeddings": False}  # fmt: skip
    values: dict[str, Any] = {
        name: {} for name in ("parallel", "objective", "optimizer", "schedule", "launch", "logging")
    }
    values |= {
        "run_name": "checkpoint",
        "run_dir": str(folder / "run"),
        "model": model,
        "trainer": {"global_batch_size": 4, "micro_batch_size": 2},
        "engine": {"precision": "fp32", "zero_stage": 1},
        "data": {"train": str(folder / "store"), "sequence_length": 128},
        "checkpoint": {"keep": 1},
    }
    return load_config(TrainConfig, values)


def measure(place: Place, config: TrainConfig, folder: Path, repeats: int) -> None:
    """All figures, in seconds, on one rank; rank 0 writes them down."""
    device = pick_device(place)
    start_process_group(place, device)
    engine = Engine(config, build_mesh(config.parallel, device))
    engine.init_weights()
    step = stepper(engine, config)
    step()
    at_once = Saver(engine, folder / "run")
    engine.config = replace(config, checkpoint=replace(config.checkpoint, asynchronous=True))
    later = Saver(engine, folder / "run")
    found: dict[str, list[float]] = {}

    def timed(name: str, work: Callable[[], object]) -> None:
        barrier()
        began = time.perf_counter()
        work()
        found.setdefault(name, []).append(time.perf_counter() - began)

    counters, checkpoints = Counters(), folder / "run/checkpoints"
    for _ in range(repeats):
        counters.step += 1
        checkpoint = str(checkpoints / checkpoint_name(counters.step))
        timed("save", lambda: at_once.save(counters, {}))
        timed("load", partial(load, engine, checkpoint, verified=True))
        timed("load, not verified", partial(load, engine, checkpoint, verified=False))
        counters.step += 1
        with without_digests():
            timed("save, no digests", lambda: at_once.save(counters, {}))
        counters.step += 1
        blocked = [0.0]
        clock(blocked, lambda: later.save(counters, {}))
        while later.is_pending:  # as the trainer does, between its steps
            step()
            clock(blocked, lambda: None if any_busy(later) else later.advance())
        found.setdefault("asynchronous, blocked", []).append(blocked[0])
        timed("step", step)
        found.setdefault("watchdog a step", []).append(watchdog_cost(folder, place) * _PHASES_A_STEP)
    if place.rank == 0:
        (folder / "out").write_text(json.dumps(found))


def load(engine: Engine, checkpoint: str, verified: bool) -> None:
    """As the trainer does: rank 0 verifies, then every rank reads."""
    if verified:
        agree_on_checkpoint(checkpoint, Path("unused"))
    load_checkpoint(engine, Path(checkpoint))


def stepper(engine: Engine, config: TrainConfig) -> Callable[[], None]:
    """One optimizer step on the same batch each time."""
    from megalite.data.feed import Feed
    from megalite.objectives import build_objective

    feed = Feed(config, engine.mesh)
    feed.start(0, range(1, 2))
    objective = build_objective(config.objective, config.data, 0)
    batches = [objective.batch(ids) for ids in feed.next()]
    feed.close()
    return lambda: engine.train_step(batches, 0, 1e-4)


def clock(total: list[float], work: Callable[[], object]) -> None:
    began = time.perf_counter()
    work()
    total[0] += time.perf_counter() - began


def barrier() -> None:
    import torch.distributed as dist

    dist.barrier()


def any_busy(saver: Saver) -> bool:
    """The trainer learns this from the step's own collective; here it costs one more."""
    import torch
    import torch.distributed as dist

    busy = torch.tensor(int(saver.is_busy))
    dist.all_reduce(busy)
    return bool(busy)


@contextlib.contextmanager
def without_digests() -> Iterator[None]:
    with mock.patch("megalite.tensor_file.xxhash.xxh3_128", NoDigest), mock.patch.object(writing, "verify_file"):
        yield


def watchdog_cost(folder: Path, place: Place) -> float:
    """CPU seconds of one `enter`, the thread's included."""
    heartbeat = Heartbeat(folder / f"logs_{place.rank}", place.rank, 1, 2)  # local rank 1: without a monitor
    heartbeat.watch_collectives(last_collectives)
    began = time.process_time()
    for _ in range(_CALLS):
        heartbeat.enter("step")
    cost = time.process_time() - began
    heartbeat.close()
    return cost / _CALLS


if __name__ == "__main__":
    main()
