"""Streams repeat, differ where they must, and look random."""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F

from megalite import rng
from megalite.config.schema import ParallelConfig
from megalite.mesh import build_mesh
from tests.ranks import run_ranks

CPU = torch.device("cpu")
ROWS, COLUMNS = 512, 1024


def key(seed=1, step=2, micro_batch=3, data_rank=4):
    return rng.micro_batch_key(seed, step, micro_batch, data_rank, CPU)


def mask(key_K, p=0.5):
    return rng.keep_mask(ROWS, COLUMNS, p, key_K)


def correlation(a, b):
    """Of two masks; standard deviation 1 / sqrt(elements) if they are independent."""
    return torch.corrcoef(torch.stack([a.flatten().double(), b.flatten().double()]))[0, 1].item()


FIVE_SIGMA = 5 / math.sqrt(ROWS * COLUMNS)


def test_fold_never_changes():
    # Or an old run could not be repeated.
    assert rng.fold(1234, "blocks.0.attention.qkv.weight") == 307968603740066088
    assert rng.fold() == 13020603013274838756


def test_fold_tells_values_and_their_places_apart():
    values = [(1,), ("1",), (1, 1), (11,), ("ab", "c"), ("a", "bc"), ("abc",), (-1,), (2**70,), ("",), ()]
    assert len({rng.fold(*value) for value in values}) == len(values)
    assert all(0 <= rng.fold(*value) < 2**64 for value in values)


def test_the_same_key_repeats():
    assert torch.equal(key(), key())
    assert torch.equal(mask(key()), mask(key()))
    assert torch.equal(rng.derive(key(), 5), rng.derive(key(), 5))


@pytest.mark.parametrize("change", [{"seed": 2}, {"step": 3}, {"micro_batch": 4}, {"data_rank": 5}])
def test_every_part_of_a_key_counts(change):
    assert abs(correlation(mask(key()), mask(key(**change)))) < FIVE_SIGMA


def test_layers_and_sites_are_independent():
    layers = rng.derive(key(), torch.arange(4, dtype=torch.int32))
    sites = [rng.derive(layer, site) for layer in layers for site in (0, 1)]
    masks = [mask(site) for site in sites] + [mask(layers[0])]
    for a, b in itertools.combinations(masks, 2):
        assert abs(correlation(a, b)) < FIVE_SIGMA
        assert abs(correlation(a[1:], b[:-1])) < FIVE_SIGMA  # nor is one the other, shifted


def test_one_stream_at_a_time_or_all_at_once():
    together = rng.derive(key(), torch.arange(3, dtype=torch.int32))
    assert torch.equal(together, torch.stack([rng.derive(key(), stream) for stream in range(3)]))


@pytest.mark.parametrize("p", [0.01, 0.1, 0.5, 0.9])
def test_rate(p):
    dropped = 1 - mask(key(), p).double().mean().item()
    assert abs(dropped - p) < 5 * math.sqrt(p * (1 - p) / (ROWS * COLUMNS))


def test_neighbours_are_independent():
    keep = mask(key())
    for rows, columns in [(1, 0), (0, 1), (1, 1), (2, 0), (0, 2), (0, 16), (16, 0), (256, 0), (0, 512)]:
        shifted = keep[rows:, columns:]
        assert abs(correlation(keep[: ROWS - rows, : COLUMNS - columns], shifted)) < FIVE_SIGMA
    # A hash of row xor column alone would make squares a, b / b, a: four corners with an even number of ones.
    corners = keep[:-1, :-1] ^ keep[1:, :-1] ^ keep[:-1, 1:] ^ keep[1:, 1:]
    assert abs(corners.double().mean().item() - 0.5) < FIVE_SIGMA


def test_rows_and_columns_have_the_rate_each():
    keep = mask(key(), 0.1).double()
    for dim, count in ((0, ROWS), (1, COLUMNS)):
        spread = keep.mean(dim).std().item()
        assert 0.85 < spread / math.sqrt(0.09 / count) < 1.15


def test_dropout_scales_and_its_gradient_has_the_same_mask():
    x = torch.randn(2, 8, 64, requires_grad=True)
    y = rng.dropout(x, 0.25, key())
    keep = rng.keep_mask(16, 64, 0.25, key()).view(2, 8, 64)
    torch.testing.assert_close(y, x * keep / 0.75)
    gradient = torch.randn_like(y)
    y.backward(gradient)
    torch.testing.assert_close(x.grad, gradient * keep / 0.75)
    assert rng.dropout(x, 0.0, key()) is x
    assert rng.dropout(x.bfloat16(), 0.25, key()).dtype == torch.bfloat16


def test_the_global_generator_is_not_touched():
    before = torch.get_rng_state()
    rng.dropout(torch.ones(4, 4), 0.5, rng.derive(key(), 1))
    assert torch.equal(before, torch.get_rng_state())


def test_compiled_is_eager_without_compiling_for_each_step():
    compilations = []

    def backend(graph, inputs):
        compilations.append(graph)
        return graph

    def function(x, key_K):
        return rng.dropout(x * 2, 0.3, rng.derive(key_K, 1))

    compiled = torch.compile(function, fullgraph=True, dynamic=False, backend=backend)
    for step in range(4):
        x = torch.randn(8, 32, requires_grad=True)
        assert torch.equal(compiled(x, key(step=step)), function(x, key(step=step)))
    assert len(compilations) == 1


def masks_of_a_rank():
    mesh = build_mesh(ParallelConfig(tensor=2), CPU)
    residual = rng.dropout(torch.ones(4, 64), 0.5, rng.micro_batch_key(1, 2, 3, mesh.data.rank, CPU))
    rng.seed_attention_stream(1, 2, 3, mesh.data.rank, mesh.tensor.rank)
    q = torch.zeros(1, 2, 32, 32)
    attention = F.scaled_dot_product_attention(q, q, torch.eye(32).expand(1, 2, 32, 32), dropout_p=0.5)
    return residual, attention


def test_tensor_ranks_agree_on_residuals_and_differ_in_attention():
    (residual_0, attention_0), (residual_1, attention_1), (residual_2, attention_2), _ = run_ranks(4, masks_of_a_rank)
    assert torch.equal(residual_0, residual_1)
    assert not torch.equal(residual_0, residual_2)  # another replica
    for other in (attention_1, attention_2):
        assert abs(correlation(attention_0, other)) < 5 / math.sqrt(attention_0.numel())
    again = run_ranks(4, masks_of_a_rank)
    assert torch.equal(again[0][1], attention_0)
    assert torch.equal(again[1][1], attention_1)
