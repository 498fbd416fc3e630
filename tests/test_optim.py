"""Schedules at their corners, optimizers by name, the norm under tensor parallelism."""

import math

import pytest
import torch

from megalite.config.schema import OptimizerConfig, ParallelConfig, ScheduleConfig
from megalite.mesh import Axis, build_mesh
from megalite.optim import build_optimizer, clip_grad_norm, learning_rate
from tests.ranks import run_ranks

STEPS, WARMUP, PEAK = 100, 10, 2.0


def rates(name: str, **keys) -> list[float]:
    config = ScheduleConfig(name=name, warmup_steps=WARMUP, **keys)
    return [learning_rate(config, PEAK, step, STEPS) for step in range(STEPS)]


@pytest.mark.parametrize("name", ["constant", "cosine", "inverse_sqrt", "linear"])
def test_warm_up_is_linear_and_ends_at_the_peak(name):
    assert rates(name)[:WARMUP] == pytest.approx([PEAK * (step + 1) / WARMUP for step in range(WARMUP)])
    assert max(rates(name)) == PEAK


@pytest.mark.parametrize("name", ["cosine", "linear"])
@pytest.mark.parametrize("floor", [0.0, 0.1, 1.0])
def test_decay_ends_at_the_floor_on_the_last_step(name, floor):
    curve = rates(name, min_lr_ratio=floor)
    assert curve[-1] == pytest.approx(floor * PEAK)
    assert curve[WARMUP] == PEAK
    assert curve[WARMUP:] == sorted(curve[WARMUP:], reverse=True)


def test_shapes_in_the_middle():
    middle = WARMUP + (STEPS - 1 - WARMUP) // 3
    progress = (middle - WARMUP) / (STEPS - 1 - WARMUP)
    assert rates("linear", min_lr_ratio=0.0)[middle] == pytest.approx(PEAK * (1 - progress))
    assert rates("cosine", min_lr_ratio=0.0)[middle] == pytest.approx(PEAK * (1 + math.cos(math.pi * progress)) / 2)
    assert rates("constant")[middle] == PEAK
    # Vaswani et al. 2017: d^-0.5 * min(n^-0.5, n * w^-1.5), n from 1, scaled so that the peak is ours.
    noam = [min(n**-0.5, n * WARMUP**-1.5) / WARMUP**-0.5 for n in range(1, STEPS + 1)]
    assert rates("inverse_sqrt") == pytest.approx([PEAK * rate for rate in noam])


def test_no_warm_up_starts_at_the_peak():
    assert learning_rate(ScheduleConfig(name="cosine"), PEAK, 0, STEPS) == PEAK
    assert learning_rate(ScheduleConfig(name="cosine"), PEAK, 0, 1) == PEAK


@pytest.mark.parametrize(("name", "reference"), [("adam", torch.optim.Adam), ("adamw", torch.optim.AdamW)])
def test_optimizers_are_torchs_and_decay_matrices_only(name, reference):
    matrix, vector = torch.nn.Parameter(torch.full((2, 2), 3.0)), torch.nn.Parameter(torch.full((2,), 3.0))
    config = OptimizerConfig(name=name, lr=0.1, betas=(0.8, 0.9), eps=1e-3, weight_decay=0.5)
    optimizer = build_optimizer(config, [matrix, vector])
    assert type(optimizer) is reference
    expected = []
    for value, decay in ((torch.full((2, 2), 3.0), 0.5), (torch.full((2,), 3.0), 0.0)):
        twin = torch.nn.Parameter(value)
        twin.grad = torch.ones_like(value)
        reference([twin], lr=0.1, betas=(0.8, 0.9), eps=1e-3, weight_decay=decay).step()
        expected.append(twin.detach())
    matrix.grad, vector.grad = torch.ones_like(matrix), torch.ones_like(vector)
    optimizer.step()
    torch.testing.assert_close(matrix.detach(), expected[0])
    torch.testing.assert_close(vector.detach(), expected[1])


def clipped_on_rank(max_norm: float) -> tuple[float, list[float], list[float]]:
    axis = build_mesh(ParallelConfig(tensor=2), torch.device("cpu")).tensor
    shard, replicated = torch.nn.Parameter(torch.zeros(2)), torch.nn.Parameter(torch.zeros(1))
    shard.tensor_model_parallel = True
    shard.grad, replicated.grad = torch.tensor([1.0, 2.0]) + axis.rank * 2, torch.tensor([5.0])
    norm = clip_grad_norm([shard, replicated], max_norm, axis)
    return float(norm), shard.grad.tolist(), replicated.grad.tolist()


def test_shards_are_summed_and_replicas_count_once():
    true = math.sqrt(1 + 4 + 9 + 16 + 25)
    for rank, (norm, shard, replicated) in enumerate(run_ranks(2, clipped_on_rank, 1.0)):
        assert norm == pytest.approx(true)
        assert shard == pytest.approx([(1 + 2 * rank) / true, (2 + 2 * rank) / true], rel=1e-5)
        assert replicated == pytest.approx([5 / true], rel=1e-5)
    for norm, shard, _ in run_ranks(2, clipped_on_rank, 0.0):
        assert norm == pytest.approx(true)
        assert shard[0] in (1.0, 3.0)


def test_a_small_gradient_is_left_alone():
    parameter = torch.nn.Parameter(torch.zeros(2))
    parameter.grad = torch.tensor([0.3, 0.4])
    assert float(clip_grad_norm([parameter], 1.0, Axis("tensor", 1, 0, None))) == pytest.approx(0.5)
    assert parameter.grad.tolist() == pytest.approx([0.3, 0.4])
