"""The engine on one GPU under NCCL: every ZeRO stage in bf16 against plain torch, compile, offload, host waits."""

import pytest
import torch

from benchmarks.gpu.syncs import recorded_syncs
from megalite.config.schema import ParallelConfig
from megalite.engine import Engine
from megalite.mesh import build_mesh
from megalite.objectives import CausalLM
from tests.gpu.runs import BATCH, LENGTH, samples, small_config
from tests.plain_training import plain_curve

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("process_group")]
STEPS = 10


def built(config, device):
    engine = Engine(config, build_mesh(ParallelConfig(), device))
    engine.init_weights()
    return engine


def batches(step):
    return [CausalLM(LENGTH).batch(part) for part in samples(step).split(BATCH // 2)]


def curve_of(config, device):
    """Losses and gradient norms of ten steps of two micro batches."""
    engine = built(config, device)
    results = [engine.train_step(batches(step), step, config.optimizer.lr) for step in range(STEPS)]
    assert all(result.applied for result in results)
    assert all(result.loss.device == device for result in results)
    return [(float(result.loss), float(result.grad_norm)) for result in results]


@pytest.fixture(scope="module")
def reference():
    """The same training on the CPU in fp32 and plain torch."""
    config = small_config()
    return plain_curve(config, map(samples, range(STEPS)), [config.optimizer.lr] * STEPS)


def check(curve, reference, loss_tolerance, norm_tolerance):
    for (loss, norm), (wanted_loss, wanted_norm) in zip(curve, reference, strict=True):
        assert loss == pytest.approx(wanted_loss, abs=loss_tolerance)
        assert norm == pytest.approx(wanted_norm, rel=norm_tolerance)


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_bf16_tracks_plain_fp32(stage, device, reference):
    curve = curve_of(small_config(engine={"zero_stage": stage}), device)
    check(curve, reference, 1e-2, 5e-2)


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_fp32_equals_plain_fp32(stage, device, reference):
    curve = curve_of(small_config(engine={"zero_stage": stage, "precision": "fp32"}), device)
    check(curve, reference, 1e-4, 1e-3)


def test_fp16_trains(device, reference):
    engine = {"zero_stage": 1, "precision": "fp16", "ds_overrides": {"fp16": {"initial_scale_power": 10}}}
    check(curve_of(small_config(engine=engine), device), reference, 1e-2, 5e-2)


@pytest.mark.parametrize("stage", [1, 2])
def test_compiled_blocks(stage, device, reference):
    torch._dynamo.reset()
    curve = curve_of(small_config(engine={"zero_stage": stage, "compile": True}), device)
    check(curve, reference, 1e-2, 5e-2)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0


@pytest.mark.parametrize(
    ("stage", "offload"), [(1, "optimizer"), (2, "optimizer"), (3, "optimizer"), (3, "parameters")]
)
def test_offload_to_the_host(stage, offload, device, reference):
    curve = curve_of(small_config(engine={"zero_stage": stage, "offload": offload}), device)
    check(curve, reference, 1e-2, 5e-2)


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_the_step_waits_for_the_device_only_in_deepspeed(stage, device):
    config = small_config(engine={"zero_stage": stage}, model=small_model(dropout=0.1))
    engine = built(config, device)
    for step in range(3):
        engine.train_step(batches(step), step, 1e-3)
    with recorded_syncs(device) as log:
        result = engine.train_step(batches(3), 3, 1e-3)
    assert log.ours == 0, log.places
    with recorded_syncs(device) as log:
        float(result.loss)
    assert sum(log.counts.values()) == 1  # the recorder does see one


def small_model(**changes):
    return {"vocab_size": 500, "max_sequence_length": LENGTH, "num_layers": 2, "hidden_size": 128} | changes
