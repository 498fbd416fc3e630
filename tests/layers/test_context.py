"""Attention over sequences that ranks share, against attention over whole ones: outputs and every gradient."""

from functools import partial

import pytest
import torch

from megalite.config.schema import ParallelConfig
from megalite.layers import context as context_room
from megalite.layers.attend import attend
from megalite.layers.attention_block import (
    block_backward,
    block_forward,
    plain_backward,
    plain_forward,
)
from megalite.layers.context import Context
from megalite.mesh import Axis, build_mesh
from tests.layers.parallel import random_tensors
from tests.ranks import run_ranks

CPU = torch.device("cpu")
LENGTH = 24


def plain(q_BSHK, k_BSGK, v_BSGK, hidden=None):
    """Head by head, with the softmax written out."""
    shared = q_BSHK.shape[2] // k_BSGK.shape[2]
    if hidden is None:
        hidden = torch.ones(q_BSHK.shape[1], q_BSHK.shape[1], dtype=torch.bool).triu(1)
    heads = []
    for head in range(q_BSHK.shape[2]):
        scores = q_BSHK[:, :, head] @ k_BSGK[:, :, head // shared].mT / q_BSHK.shape[3] ** 0.5
        heads.append(scores.masked_fill(hidden, -torch.inf).softmax(-1) @ v_BSGK[:, :, head // shared])
    return torch.stack(heads, dim=2)


def inputs(heads, kv_heads):
    shapes = {"q": (2, LENGTH, heads, 8), "k": (2, LENGTH, kv_heads, 8), "v": (2, LENGTH, kv_heads, 8)}
    return [*random_tensors(1, **shapes).values(), *random_tensors(2, grad=(2, LENGTH, heads, 8)).values()]


def documents_mask():
    """Causal, within documents of several lengths: (1, 1, T, T), the same for both sequences."""
    ids = torch.tensor([[0] * 5 + [1] + [2] * 11 + [3] * 7])
    return (ids[:, :, None] == ids[:, None, :]).tril()[:, None]


def on_rank(size, method, heads, kv_heads, plant=None, masked=False):
    """Which positions this rank holds, its output, and the gradients of its q, k and v."""
    if plant:
        plant()
    context = Context(build_mesh(ParallelConfig(context=size), CPU).context, method)
    positions = context.positions(LENGTH, CPU)
    *parts, grad = (x[:, positions].clone() for x in inputs(heads, kv_heads))
    leaves = [part.requires_grad_() for part in parts]
    mask = documents_mask() if masked else None
    y = context.attend(*leaves, partial(attend, mask_ST=mask), mask)
    y.backward(grad)
    return positions, [y.detach(), *(leaf.grad for leaf in leaves)]


def worst(size, method, heads, kv_heads, plant=None, masked=False):
    *leaves, grad = inputs(heads, kv_heads)
    for leaf in leaves:
        leaf.requires_grad_()
    y = plain(*leaves, ~documents_mask()[0, 0]) if masked else plain(*leaves)
    y.backward(grad)
    wanted = [y.detach(), *(leaf.grad for leaf in leaves)]
    found = run_ranks(size, on_rank, size, method, heads, kv_heads, plant, masked)
    assert sorted(torch.cat([positions for positions, _ in found]).tolist()) == list(range(LENGTH))
    return max(
        (part - whole[:, positions]).abs().max().item()
        for positions, parts in found
        for part, whole in zip(parts, wanted, strict=True)
    )


@pytest.mark.parametrize(
    ("size", "method", "heads", "kv_heads"),
    [
        *((size, "ulysses", heads, kv_heads) for size in (2, 4) for heads, kv_heads in ((4, 4), (8, 4))),
        *((size, "ring", heads, kv_heads) for size in (2, 3, 4) for heads, kv_heads in ((2, 2), (4, 1))),
    ],
)
def test_attention_over_shared_sequences(size, method, heads, kv_heads):
    assert worst(size, method, heads, kv_heads) < 1e-10


@pytest.mark.parametrize(
    ("size", "method", "heads", "kv_heads"),
    [(2, "ulysses", 4, 2), (2, "ring", 4, 2), (3, "ring", 2, 1), (4, "ring", 2, 2)],
)
def test_attention_within_documents(size, method, heads, kv_heads):
    assert worst(size, method, heads, kv_heads, masked=True) < 1e-10


def test_zigzag_gives_every_rank_the_same_share_of_the_causal_triangle():
    contexts = [Context(Axis("context", 4, rank, None), "ring") for rank in range(4)]
    held = [context.positions(LENGTH, CPU) for context in contexts]
    assert held[1].tolist() == [3, 4, 5, 18, 19, 20]
    assert len({int(positions.sum()) for positions in held}) == 1
    assert Context(Axis("context", 4, 1, None), "ulysses").positions(LENGTH, CPU).tolist() == list(range(6, 12))


def gradients_stay():
    honest = context_room._Shift.wait
    context_room._Shift.wait = lambda self: self._sent if self._sent.dtype == torch.float64 else honest(self)


def late_run_sees_nothing_of_later_ranks():
    honest = context_room._visible
    context_room._visible = lambda step, axis, length: honest(min(step, axis.rank), axis, length)


@pytest.mark.parametrize("plant", [gradients_stay, late_run_sees_nothing_of_later_ranks])
def test_planted_bugs_in_the_ring_are_seen(plant):
    assert worst(2, "ring", 2, 2, plant) > 1e-3


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("kv_heads", [4, 2])
def test_blocks_in_products_equal_the_kernels(causal, kv_heads):
    """What fp32 on CUDA uses is held against what CPUs use."""
    tensors = random_tensors(3, q=(2, 4, 6, 8), k=(2, kv_heads, 6, 8), v=(2, kv_heads, 6, 8), grad=(2, 4, 6, 8))
    q, k, v, grad = tensors.values()
    out, log_sum = block_forward(q, k, v, causal)
    whole = [x.repeat_interleave(4 // kv_heads, 1) for x in (k, v)]
    seen = torch.ones(6, 6, dtype=torch.bool).tril() if causal else None
    for found, wanted in zip(plain_forward(q, *whole, seen), (out, log_sum), strict=True):
        torch.testing.assert_close(found, wanted, atol=1e-12, rtol=0)
    wanted = block_backward(grad, q, out, log_sum, k, v, causal)
    found_q, *found_kv = plain_backward(grad, q, *whole, out, log_sum, seen)
    found = [found_q, *(x.unflatten(1, (kv_heads, -1)).sum(2) for x in found_kv)]
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b, atol=1e-12, rtol=0)
