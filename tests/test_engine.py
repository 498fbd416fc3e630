"""A layout never changes numbers: the engine in every layout against a plain torch loop on whole tensors."""

import dataclasses
import functools
import math
import os
import warnings

import pyarrow.parquet
import pytest
import torch
import torch._dynamo
import torch._inductor.compile_fx  # slow imports, before ranks are forked

from megalite.config.schema import TrainConfig
from megalite.engine import Engine
from megalite.mesh import build_mesh
from megalite.objectives import Batch, CausalLM
from megalite.optim import learning_rate
from tests.models.plain import plain_losses
from tests.plain_training import Curve, initial_weights, plain_curve
from tests.ranks import run_ranks
from tests.runs import tiny_config

STEPS, GLOBAL_BATCH, LENGTH = 50, 8, 32
LAYOUTS = [
    # world size, tensor, ZeRO stage
    (1, 1, 1),
    (2, 2, 0),
    (2, 2, 1),
    (2, 1, 0),
    (2, 1, 1),
    (2, 1, 2),
    (2, 1, 3),
    (4, 2, 1),
    (4, 2, 2),
    (4, 2, 3),
]
# In `make test` the first of them: past the warm-up. Half a minute for fifty.
NUM_STEPS = pytest.mark.parametrize("steps", [12, pytest.param(STEPS, marks=pytest.mark.slow)])


def config_of(tensor: int, zero_stage: int, precision: str = "fp32", **groups) -> TrainConfig:
    engine = {"zero_stage": zero_stage, "precision": precision} | groups.pop("engine", {})
    batch = {"steps": STEPS, "global_batch_size": GLOBAL_BATCH, "micro_batch_size": 2}
    warmup = {"warmup_steps": 10}
    return tiny_config("unused", parallel={"tensor": tensor}, engine=engine, trainer=batch, schedule=warmup, **groups)


@functools.cache
def text() -> torch.Tensor:
    """Real text, a byte a token."""
    table = pyarrow.parquet.read_table("data_tools/sample_corpus/corpus.parquet", columns=["text"])
    return torch.tensor(list("".join(table["text"].slice(0, 300).to_pylist()).encode()))


def samples(step: int) -> torch.Tensor:
    """The global batch of a step, [GLOBAL_BATCH, LENGTH + 1]."""
    starts = torch.arange(GLOBAL_BATCH) * 40_000 + step * LENGTH
    return text()[starts[:, None] + torch.arange(LENGTH + 1)]


def curve_of(config: TrainConfig, steps: int, plant=lambda: None) -> Curve:
    """Losses and norms of the engine; runs on every rank."""
    mesh = build_mesh(config.parallel, torch.device("cpu"))
    engine = Engine(config, mesh)
    engine.init_weights()
    plant()
    objective, data, micro = CausalLM(LENGTH), mesh.data, config.trainer.micro_batch_size
    curve = []
    for step in range(steps):
        parts = samples(step).split(micro)[data.rank :: data.size]
        rate = learning_rate(config.schedule, config.optimizer.lr, step, STEPS)
        result = engine.train_step([objective.batch(part) for part in parts], step, rate)
        assert result.applied
        curve.append((float(result.loss), float(result.grad_norm)))
    return curve


@pytest.fixture(scope="module")
def reference() -> Curve:
    """The same training in plain torch, with a schedule of its own."""
    progress = [(step - 10) / (STEPS - 1 - 10) for step in range(STEPS)]
    cosine = [0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * part)) for part in progress]
    rates = [3e-4 * ((step + 1) / 10 if step < 10 else cosine[step]) for step in range(STEPS)]
    curve = plain_curve(config_of(1, 0), map(samples, range(STEPS)), rates)
    assert curve[-1][0] < 0.8 * curve[0][0], "the reference does not learn, so it would not notice much"
    return curve


def worst(curve: Curve, reference: Curve) -> tuple[float, float]:
    """Largest difference of the losses, largest relative one of the norms."""
    pairs = list(zip(curve, reference[: len(curve)], strict=True))
    return max(abs(a[0] - b[0]) for a, b in pairs), max(abs(a[1] / b[1] - 1) for a, b in pairs)


@NUM_STEPS
@pytest.mark.parametrize(("world_size", "tensor", "zero_stage"), LAYOUTS)
def test_every_layout_trains_as_plain_torch_does(world_size, tensor, zero_stage, steps, reference):
    for curve in run_ranks(world_size, curve_of, config_of(tensor, zero_stage), steps):
        assert len(curve) == steps
        loss, norm = worst(curve, reference)
        assert loss <= 1e-5
        assert norm <= 1e-4


def compiled_curve_of(config: TrainConfig, steps: int) -> tuple[Curve, int]:
    """The curve with compiled blocks, and how many graphs were made for all of them."""
    os.environ["TORCHINDUCTOR_COMPILE_THREADS"] = "1"
    torch._dynamo.utils.counters.clear()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        curve = curve_of(config, steps)
    return curve, torch._dynamo.utils.counters["stats"]["unique_graphs"]


@pytest.mark.parametrize(
    "zero_stage", [pytest.param(0, marks=pytest.mark.slow), 1, pytest.param(2, marks=pytest.mark.slow)]
)
def test_compiled_blocks_train_as_plain_torch_does(zero_stage, reference):
    config = config_of(2, zero_stage, engine={"compile": True})
    for curve, graphs in run_ranks(4, compiled_curve_of, config, 10):
        assert graphs == 1  # one for the four blocks, fullgraph
        loss, norm = worst(curve, reference)
        assert loss <= 1e-5
        assert norm <= 1e-4


class Done:
    """The handle of a collective that has ended."""

    def wait(self) -> None:
        pass


def forget_data_all_reduce() -> None:
    """What DeepSpeed sums over the data axis stays as it is on each rank."""

    def keep(*args, **kwargs):
        return Done()

    def keep_own_part(*args, **kwargs):
        output, source = (args + tuple(kwargs.get(name) for name in ("output", "input") if name in kwargs))[:2]
        group = kwargs.get("group")
        output.copy_(source.chunk(torch.distributed.get_world_size(group))[torch.distributed.get_rank(group)])
        return Done()

    torch.distributed.all_reduce = torch.distributed.reduce = keep
    torch.distributed.reduce_scatter_tensor = keep_own_part


def forget_tensor_all_reduce() -> None:
    """The backward of the layers' input no longer sums over the tensor axis."""
    from megalite import comm

    comm._Copy.backward = staticmethod(lambda ctx, grad: (grad, None))


@pytest.mark.parametrize(("world_size", "tensor", "zero_stage"), [layout for layout in LAYOUTS if layout[0] > 1])
def test_a_missing_all_reduce_is_seen(world_size, tensor, zero_stage, reference):
    plants = [forget_tensor_all_reduce] if tensor > 1 else []
    plants += [forget_data_all_reduce] if world_size > tensor else []
    for plant in plants:
        curve = run_ranks(world_size, curve_of, config_of(tensor, zero_stage), 4, plant)[0]
        loss, norm = worst(curve, reference)
        assert loss > 1e-5 or norm > 1e-4, f"{plant.__name__} went unnoticed"


def uneven_batches() -> list[Batch]:
    """Four micro batches of two sequences; the mask leaves all, some or nothing of them."""
    generator = torch.Generator().manual_seed(3)
    shares = (1.0, 0.5, 0.1, 0.0)
    batches = []
    for part, share in zip(samples(0)[:8].split(2), shares, strict=True):
        batch = CausalLM(LENGTH).batch(part)
        mask_BS = torch.rand(batch.labels_BS.shape, generator=generator) < share
        batches.append(Batch(batch.tokens_BS, batch.labels_BS, mask_BS))
    return batches


def uneven_step(config: TrainConfig) -> tuple[float, float]:
    mesh = build_mesh(config.parallel, torch.device("cpu"))
    engine = Engine(config, mesh)
    engine.init_weights()
    result = engine.train_step(uneven_batches()[mesh.data.rank :: mesh.data.size], 0, 0.0)
    return float(result.loss), float(result.grad_norm)


@pytest.mark.parametrize(("world_size", "tensor", "zero_stage"), [(2, 1, 0), (2, 1, 2), (4, 2, 1)])
def test_the_loss_is_normalised_by_the_tokens_of_the_global_batch(world_size, tensor, zero_stage):
    """Not by those of a micro batch or a replica: their means would weigh tokens differently."""
    config = config_of(tensor, zero_stage)
    config = dataclasses.replace(
        config, trainer=dataclasses.replace(config.trainer, global_batch_size=8, micro_batch_size=2)
    )
    weights = initial_weights(config)
    batches = uneven_batches()
    summed = sum(
        (plain_losses(weights, config.model, batch.tokens_BS, batch.labels_BS) * batch.mask_BS).sum()
        for batch in batches
    )
    loss = summed / sum(batch.mask_BS.sum() for batch in batches)
    loss.backward()
    norm = torch.nn.utils.get_total_norm([weight.grad for weight in weights.values()])
    for found_loss, found_norm in run_ranks(world_size, uneven_step, config):
        assert found_loss == pytest.approx(loss.item(), abs=1e-5)
        assert found_norm == pytest.approx(norm.item(), rel=1e-4)


@pytest.mark.parametrize(("tensor", "steps"), [(1, 12), pytest.param(2, STEPS, marks=pytest.mark.slow)])
def test_bf16_tracks_fp32_in_every_zero_stage(tensor, steps, reference):
    world_size = 2 * tensor
    curves = {s: run_ranks(world_size, curve_of, config_of(tensor, s, "bf16"), steps)[0] for s in (1, 2, 3)}
    for stage, curve in curves.items():
        loss, norm = worst(curve, reference)
        assert loss <= 2e-3, f"ZeRO {stage} is {loss} from fp32"
        assert norm <= 2e-2, f"ZeRO {stage} is {norm} from fp32"
    for stage in (2, 3):
        loss, _ = worst(curves[stage], curves[1])
        assert loss <= 1e-3, f"ZeRO {stage} is {loss} from ZeRO 1"
