"""Training steps of named models through the real engine, from a token store on disk, timed.

Legend: B micro batch size in sequences, S sequence length in tokens.
"""

import contextlib
import dataclasses
import math
import statistics
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch._dynamo
import torch.distributed as dist
import yaml

from benchmarks.gpu.facts import pick_device
from benchmarks.gpu.isolate import Emit, short_error
from megalite.config.loader import load_config
from megalite.config.schema import (
    CheckpointConfig,
    DataConfig,
    EngineConfig,
    LaunchConfig,
    LoggingConfig,
    ModelConfig,
    ObjectiveConfig,
    OptimizerConfig,
    ParallelConfig,
    Precision,
    ScheduleConfig,
    StoreConfig,
    TrainConfig,
    TrainerConfig,
)
from megalite.config.validate import resolve_auto, validate_train
from megalite.data.dataset import BlendedDataset
from megalite.data.format import TokenStore
from megalite.data.loader import Loader
from megalite.data.writer import StoreWriter
from megalite.engine import Engine, StepResult
from megalite.mesh import build_mesh
from megalite.metrics.hardware import memory_bytes, mfu
from megalite.models import count_parameters, flops_per_token
from megalite.objectives import build_objective

CONF = Path(__file__).parents[2] / "conf" / "model"
FLOPS_FORMULA = (
    "FLOPs a token = 6 N + 12 L h s, N: elements of the matrices a token is multiplied with, the output head among "
    "them, without the embedding lookup (megalite.models.flops_per_token); recomputation does not count; "
    "MFU = tokens/s x FLOPs a token / dense bf16 peak of the device"
)
WARMUP_STEPS = 5
STORE_TOKENS = 4_000_000
MAX_SEQUENCE_LENGTH = 2048  # tokens; models with more positions are trained on shorter sequences
ZeroStage = Literal[0, 1, 2, 3]


@dataclasses.dataclass(frozen=True)
class TrainingCell:
    """What is trained and how; micro batch sizes vary inside it."""

    model: str
    compiled: bool
    tiny: bool = False
    zero_stage: ZeroStage = 1
    accumulation: int = 1  # micro batches a step
    dropout: float = 0.0
    precision: Precision = "auto"  # bf16 on a GPU


def model_names() -> list[str]:
    """The models that can be named: those of conf/model, and GPT-3 XL."""
    return [*sorted(path.stem for path in CONF.glob("*.yaml") if path.stem != "tiny"), "gpt3_1_3b"]


def model_config(name: str, tiny: bool) -> ModelConfig:
    """The model called `name`, or two narrow layers of its kind."""
    file = CONF / f"{'gpt2_124m' if name == 'gpt3_1_3b' else name}.yaml"
    config = load_config(ModelConfig, yaml.safe_load(file.read_text()))
    if name == "gpt3_1_3b":
        # GPT-3 XL (Brown et al. 2020, table 2.1) with 16 heads of 128, which make up its width; the table's 24 do not.
        sizes: dict[str, Any] = {
            "num_layers": 24,
            "hidden_size": 2048,
            "num_attention_heads": 16,
            "max_sequence_length": 2048,
        }
        config = dataclasses.replace(config, **sizes)
    if tiny:
        grouped: dict[str, Any] = (
            {} if config.num_key_value_heads is None else {"num_key_value_heads": 2, "ffn_hidden_size": 96}
        )
        sizes = {"vocab_size": 500, "num_layers": 2, "hidden_size": 64, "num_attention_heads": 4}
        config = dataclasses.replace(config, **sizes, **grouped, max_sequence_length=32)
    return config


def cell_config(cell: TrainingCell, device_type: str) -> TrainConfig:
    """The training configuration of a cell; the store's path comes with `prepared_engine`."""
    model = dataclasses.replace(model_config(cell.model, cell.tiny), dropout=cell.dropout)
    config = TrainConfig(
        run_name="gpu_sweep",
        run_dir="not written",
        model=model,
        # The engine takes micro batches of any size: these two only tell DeepSpeed how many there are in a step.
        trainer=TrainerConfig(steps=1_000_000, global_batch_size=cell.accumulation, micro_batch_size=1),
        parallel=ParallelConfig(),
        engine=EngineConfig(zero_stage=cell.zero_stage, compile=cell.compiled, precision=cell.precision),
        objective=ObjectiveConfig(),
        optimizer=OptimizerConfig(lr=3e-3 if cell.tiny else 3e-4),
        schedule=ScheduleConfig(),
        data=DataConfig(
            train=(StoreConfig(path="store"),), sequence_length=min(model.max_sequence_length, MAX_SEQUENCE_LENGTH)
        ),
        checkpoint=CheckpointConfig(),
        launch=LaunchConfig(),
        logging=LoggingConfig(),
    )
    config = resolve_auto(config, device_type, 1)
    validate_train(config, 1, device_type)
    return config


def write_store(path: Path, vocab_size: int, num_tokens: int) -> None:
    """A token store of random documents, with a natural skew: the r-th token is as frequent as 1 / r (Zipf)."""
    generator = np.random.default_rng(1)
    with StoreWriter(path, vocab_size=vocab_size, end_of_document=0, source="random") as writer:
        while writer.num_tokens < num_tokens:
            ranks = np.exp(generator.random(4095) * np.log(vocab_size)).astype(np.int64)
            writer.add_document(np.minimum(ranks, vocab_size - 1), num_bytes=4 * len(ranks))


class Run:
    """An engine and the data it trains on."""

    def __init__(self, config: TrainConfig, engine: Engine, store: Path) -> None:
        self.config, self.engine = config, engine
        length = config.data.sequence_length
        self.dataset = BlendedDataset([(TokenStore.open(store), 1.0)], length, config.seed)
        self.objective = build_objective(config.objective, config.data, end_of_document=0)

    def train_step(self, step: int, micro_batch_size: int) -> StepResult:
        """One step as the trainer does it: samples from the store, batch, forward, backward, update."""
        count = self.config.trainer.global_batch_size * micro_batch_size
        device = self.engine.mesh.device
        loader = Loader(self.dataset, count, micro_batch_size, data_rank=0, data_size=1, pin=device.type == "cuda")
        samples = [ids_BS.to(device, non_blocking=True) for ids_BS in loader.micro_batches(step * count)]
        batches = [self.objective.batch(ids_BS) for ids_BS in samples]
        return self.engine.train_step(batches, step, self.config.optimizer.lr)


@contextlib.contextmanager
def prepared_engine(config: TrainConfig, device: torch.device) -> Iterator[Run]:
    """Write a store, start a process group of one, build the engine; undone at the end."""
    backend, device_id = ("nccl", device) if device.type == "cuda" else ("gloo", None)
    with tempfile.TemporaryDirectory(prefix="megalite-sweep-") as folder:
        tokens = STORE_TOKENS if config.model.known_vocab_size > 10_000 else 50_000
        write_store(Path(folder) / "store", config.model.known_vocab_size, tokens)
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1, device_id=device_id)
        try:
            engine = Engine(config, build_mesh(config.parallel, device))
            engine.init_weights()
            yield Run(config, engine, Path(folder) / "store")
        finally:
            dist.destroy_process_group()


def train(
    emit: Emit, device_name: str, cell: TrainingCell, micro_batches: Sequence[int], steps: int, deadline: float
) -> None:
    """A row a micro batch size, growing until memory runs out. `deadline`: by time.monotonic, no size starts after."""
    device = pick_device(device_name)
    config = cell_config(cell, device.type)
    label = f"{cell.model}{' (tiny)' if cell.tiny else ''}{' compiled' if cell.compiled else ''}"
    started = time.perf_counter()
    with prepared_engine(config, device) as run:
        common = {"build_seconds": time.perf_counter() - started} | _description(config, run.engine)
        for number, size in enumerate(micro_batches):
            row: dict[str, Any] = {"case": f"{label} B={size}", "micro_batch_size": size, "compiled": cell.compiled}
            if time.monotonic() > deadline:
                emit(row | {"status": "skipped", "error": "the time limit"})
                continue
            try:
                emit(row | common | measure(run, size, steps, device))
            except torch.OutOfMemoryError as error:
                emit(row | common | {"status": "oom", "error": short_error(error)})
                for left in micro_batches[number + 1 :]:
                    emit({"case": f"{label} B={left}", "status": "skipped", "error": f"no memory for B={size}"})
                return


def _description(config: TrainConfig, engine: Engine) -> dict[str, Any]:
    return {
        "parameters": count_parameters(config.model),
        "flops_per_token": flops_per_token(config.model, config.data.sequence_length),
        "sequence_length": config.data.sequence_length,
        "precision": engine.precision,
        "zero_stage": engine.zero_stage,
        "recompute": config.engine.recompute,
        "optimizer_wrapper": type(engine.optimizer).__name__,
    }


def measure(run: Run, micro_batch_size: int, steps: int, device: torch.device) -> dict[str, Any]:
    """Time `steps` steps after warm-up. The clock is the device's own: an event behind each step, read at the end."""
    torch._dynamo.reset()  # each size is one more compilation, and torch limits how many a function may have
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    started = time.perf_counter()
    results = [run.train_step(0, micro_batch_size)]
    _wait(device)
    first_step_seconds = time.perf_counter() - started
    results += [run.train_step(step, micro_batch_size) for step in range(1, WARMUP_STEPS)]
    clock = _Clock(device)
    for step in range(WARMUP_STEPS, WARMUP_STEPS + steps):
        results.append(run.train_step(step, micro_batch_size))
        clock.tick()
    seconds, wall = clock.stop()
    losses = torch.stack([result.loss for result in results]).tolist()
    median = statistics.median(seconds)
    length = run.config.data.sequence_length
    tokens_per_second = micro_batch_size * run.config.trainer.global_batch_size * length / median
    flops = flops_per_token(run.config.model, length)
    skipped = sum(not result.applied for result in results)
    finite = all(math.isfinite(loss) for loss in losses)
    return {
        "status": "ok" if finite and not skipped else "failed",
        "error": "" if finite and not skipped else f"{skipped} steps skipped, losses {losses[0]} .. {losses[-1]}",
        "tokens_per_second": tokens_per_second,
        "mfu": mfu(tokens_per_second, flops, device, 1),
        "tflops_per_second": tokens_per_second * flops / 1e12,
        "step_seconds_median": median,
        "step_seconds_min": min(seconds),
        "step_seconds_max": max(seconds),
        "wall_seconds_per_step": wall / steps,
        "first_step_seconds": first_step_seconds,
        "steps": steps,
        "peak_memory_bytes": memory_bytes(device),
        "reserved_memory_bytes": torch.cuda.max_memory_reserved(device) if device.type == "cuda" else None,
        "loss_first": losses[0] if math.isfinite(losses[0]) else None,
        "loss_last": losses[-1] if math.isfinite(losses[-1]) else None,
    }


class _Clock:
    """Times between ticks: CUDA events, which cost the host no wait, or the host's clock on a CPU."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        _wait(device)
        self.ticks: list[Any] = []
        self.tick()
        self.started = time.perf_counter()

    def tick(self) -> None:
        """Mark the end of what has been enqueued so far."""
        if self.device.type == "cuda":
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self.ticks.append(event)
        else:
            self.ticks.append(time.perf_counter())

    def stop(self) -> tuple[list[float], float]:
        """Seconds between ticks, and on the host's clock from the first tick until all work is done."""
        _wait(self.device)
        wall = time.perf_counter() - self.started
        pairs = zip(self.ticks, self.ticks[1:], strict=False)
        if self.device.type == "cuda":
            return [a.elapsed_time(b) / 1e3 for a, b in pairs], wall
        return [b - a for a, b in pairs], wall


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
