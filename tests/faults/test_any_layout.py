"""R11: one checkpoint, loaded by every layout, is saved again byte for byte, and trains on as one process does.

Every layout is held to the same canonical form, so every pair of layouts may follow each other. All layouts of one
world size run in the same ranks, one engine after the other.
"""

import dataclasses
import functools
import tempfile
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from deepspeed.accelerator import get_accelerator
from safetensors.numpy import load_file

from megalite.checkpoint import Counters, Saver, load_checkpoint
from megalite.checkpoint_folder import newest_checkpoint
from megalite.checkpoint_format import KINDS, read_manifest
from megalite.config.schema import TrainConfig
from megalite.config.validate import validate_train
from megalite.data.dataset import build_dataset
from megalite.data.loader import Loader
from megalite.engine import Engine
from megalite.mesh import build_mesh
from megalite.objectives import build_objective
from megalite.optim import learning_rate
from tests.ranks import run_ranks
from tests.runs import tiny_config, train_on_ranks, write_store

SAVED_AT, MORE, BATCH = 4, 10, 8
# 301 is divided by no number of ranks: each of them holds another part of the padding.
MODEL = {"num_layers": 2, "hidden_size": 64, "num_attention_heads": 4, "vocab_size": 301, "max_sequence_length": 32}


@dataclass(frozen=True)
class Layout:
    """Sizes of the axes, ZeRO stage, precision."""

    tensor: int = 1
    data: int = 1
    zero_stage: int = 0
    context: int = 1
    precision: str = "fp32"

    def __str__(self) -> str:
        return f"tp{self.tensor}-dp{self.data}-cp{self.context}-zero{self.zero_stage}-{self.precision}"

    @property
    def world(self) -> int:
        """Number of ranks."""
        return self.tensor * self.data * self.context


SIZES = [(1, 1), (1, 2), (1, 4), (2, 1), (2, 2), (4, 1)]
PLAIN = [Layout(tensor, data, zero) for tensor, data in SIZES for zero in range(4)]
CONTEXT = [
    Layout(1, 1, 1, context=2),
    Layout(1, 2, 3, context=2),
    Layout(2, 1, 2, context=2),
    Layout(1, 1, 0, context=4),
]
HALF = [
    Layout(1, 1, 1, precision="bf16"),
    Layout(1, 2, 3, precision="bf16"),
    Layout(2, 2, 2, precision="bf16"),
    Layout(2, 1, 1, precision="fp16"),
    Layout(2, 2, 3, precision="fp16"),
]
ALL = PLAIN + CONTEXT + HALF
# In `make test`: all of one process, every stage and size with others, one each of the rest.
QUICK = [
    *(layout for layout in PLAIN if layout.world == 1),
    *(Layout(1, 2, 0), Layout(1, 2, 3), Layout(2, 1, 1), Layout(2, 1, 2)),
    *(Layout(2, 2, 2), Layout(4, 1, 1), HALF[1]),
]


@functools.cache
def folder() -> Path:
    """Of this module; removed with the process."""
    holder = tempfile.TemporaryDirectory(prefix="any-layout-")
    folder.holder = holder  # type: ignore[attr-defined]  kept alive
    write_store(Path(holder.name) / "words")
    return Path(holder.name)


def config_of(layout: Layout, run_dir: str, **trainer) -> TrainConfig:
    scale = {"ds_overrides": {"fp16": {"initial_scale_power": 8}}} if layout.precision == "fp16" else {}
    return tiny_config(
        folder() / run_dir,
        folder() / "words",
        model=MODEL,
        parallel={"tensor": layout.tensor, "context": layout.context},
        engine={"zero_stage": layout.zero_stage, "precision": layout.precision} | scale,
        trainer={"steps": 20, "global_batch_size": BATCH, "micro_batch_size": 2} | trainer,
        checkpoint={"allow_changes": ["engine.precision", "engine.ds_overrides"]},
    )


@functools.cache
def original() -> Path:
    """The one checkpoint: of tensor 2 x data 2, ZeRO 1, fp32."""
    train_on_ranks(config_of(Layout(2, 2, 1), "original", stop_after=SAVED_AT), 4)
    found = newest_checkpoint(folder() / "original")
    assert found is not None
    return found


def tensors(checkpoint: Path) -> dict[tuple[str, str], tuple[tuple[int, ...], bytes]]:
    """Shape and bytes by kind and name."""
    return {
        (entry.kind, name): (value.shape, value.tobytes())
        for entry in read_manifest(checkpoint).files
        for name, value in load_file(checkpoint / entry.name).items()
    }


def go_on(layouts: list[Layout], checkpoint: Path) -> dict[Layout, list[float]]:
    """On every rank: for each layout load, save as it is, and train; returns the losses."""
    get_accelerator().is_fp16_supported = lambda: True  # torch computes it in software
    losses = {}
    for layout in layouts:
        config = config_of(layout, str(layout))
        validate_train(config, layout.world)
        mesh = build_mesh(config.parallel, torch.device("cpu"))
        engine = Engine(config, mesh)
        counters = load_checkpoint(engine, checkpoint)
        saver = Saver(engine, Path(config.run_dir))
        saver.save(counters, {})
        saver.close()
        losses[layout] = train(engine, counters)
    return losses


def train(engine: Engine, counters: Counters) -> list[float]:
    """Ten steps of the run's own data."""
    config, mesh = engine.config, engine.mesh
    dataset = build_dataset(config.data, BATCH, config.seed)
    loader = Loader(dataset, BATCH, config.trainer.micro_batch_size, mesh.data.rank, mesh.data.size)
    objective = build_objective(config.objective, config.data, dataset.stores[0].manifest.end_of_document)
    losses = []
    for step in range(counters.step, counters.step + MORE):
        batches = [objective.batch(ids) for ids in loader.micro_batches(step * BATCH)]
        rate = learning_rate(config.schedule, config.optimizer.lr, step, config.trainer.steps)
        losses.append(float(engine.train_step(batches, step, rate).loss))
    return losses


@functools.cache
def losses_of(world: int, quick: bool) -> dict[Layout, list[float]]:
    """Of all layouts of this size, from the same ranks."""
    layouts = [layout for layout in ALL if layout.world == world and (layout in QUICK) == quick]
    return run_ranks(world, go_on, layouts, original())[0]


CASES = [pytest.param(layout, id=str(layout), marks=() if layout in QUICK else pytest.mark.slow) for layout in ALL]


@pytest.mark.parametrize("layout", CASES)
def test_any_layout_saves_what_it_loaded_and_trains_on_alike(layout):
    losses = losses_of(layout.world, layout in QUICK)[layout]
    saved = newest_checkpoint(folder() / str(layout))
    assert saved is not None
    found, expected = tensors(saved), tensors(original())
    assert found.keys() == expected.keys()
    assert len(expected) % len(KINDS) == 0
    assert [key for key in expected if found[key] != expected[key]] == []
    counters = [field.name for field in dataclasses.fields(Counters)] + ["optimizer_step", "seed", "stores"]
    manifests = read_manifest(saved), read_manifest(original())
    assert [getattr(manifests[0], name) for name in counters] == [getattr(manifests[1], name) for name in counters]
    reference = losses_of(1, True)[Layout()]
    assert reference[-1] < reference[0] - 0.01, "the reference does not learn, so it would not notice much"
    assert losses == pytest.approx(reference, abs={"fp32": 1e-5, "bf16": 0.02, "fp16": 0.005}[layout.precision])


def test_the_moments_are_not_zero_and_the_padding_is_not_saved():
    saved = tensors(original())
    assert all(any(content) for _, content in saved.values()), "a tensor of zeros would be equal by chance"
    assert {shape for (_, name), (shape, _) in saved.items() if name.endswith("embedding.tokens.weight")} == {(301, 64)}
