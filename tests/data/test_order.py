import math
import time
from collections import Counter
from fractions import Fraction

import numpy as np
import pytest

from megalite.data.mixture import Segment
from megalite.data.order import SampleOrder, permute, unpermute
from megalite.errors import DataError

MASK = 2**64 - 1
GOLDEN = 0x9E3779B97F4A7C15


class SlowOrder:
    """The same order in plain Python integers, one sample at a time, written from the description."""

    def __init__(self, seed, num_units, weights):
        self.num_units = num_units
        self.weights = [Fraction(w) for w in weights]
        self.seed_key = self.mix(seed & MASK)

    def source(self, i):
        """Sources are taken out one by one; what goes on from n is n times the share of those left, rounded."""
        for k in range(len(self.weights) - 1):
            share = sum(self.weights[k + 1 :]) / sum(self.weights[k:])
            before, after = (math.ceil(n * share - Fraction(1, 2)) for n in (i, i + 1))
            if after == before:
                return k, i - before
            i = before
        return len(self.weights) - 1, i

    @staticmethod
    def mix(x):
        x = (x + GOLDEN) & MASK
        x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & MASK
        x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & MASK
        return x ^ (x >> 31)

    def hash(self, stream, source, counter):
        return self.mix((self.mix((self.mix((self.seed_key + source) & MASK) + stream) & MASK) + counter) & MASK)

    def locate(self, i):
        k, draw = self.source(i)
        n = self.num_units[k]
        epoch, value = divmod(draw, n)
        key = self.hash(2, k, epoch)
        a = max(8, math.isqrt(n - 1) + 1)
        b = max(8, -(-n // a))
        while True:
            left, right = divmod(value, b)
            for r in range(1, 7, 2):
                left = (left + self.mix((key + right + r * GOLDEN) & MASK) & MASK) % a
                right = (right + self.mix((key + left + (r + 1) * GOLDEN) & MASK) & MASK) % b
            value = left * b + right
            if value < n:
                return k, value, epoch


@pytest.mark.parametrize("seed", [0, 1234, -5, 2**70])
def test_equals_the_slow_reference(seed):
    units, weights = [1000, 7, 1], [0.5, 0.3, 0.2]
    order, slow = SampleOrder(seed, units, weights), SlowOrder(seed, units, weights)
    indices = np.concatenate([np.arange(300), np.arange(65516, 65556), [10**6, 10**9, 10**12]])
    found = list(zip(*(a.tolist() for a in order.locate(indices)), strict=True))
    assert found == [slow.locate(int(i)) for i in indices]


def test_golden_values():
    """Frozen: another order would change what every saved run trains on next."""
    sources, units, epochs = SampleOrder(1234, [1000, 37, 5], [0.5, 0.3, 0.2]).locate(
        [0, 1, 2, 3, 4, 100, 70000, 10**12]
    )
    assert sources.tolist() == [0, 1, 0, 2, 0, 0, 0, 0]
    assert units.tolist() == [19, 16, 120, 4, 27, 223, 379, 232]
    assert epochs.tolist() == [0, 0, 0, 0, 0, 0, 35, 500000000]


@pytest.mark.parametrize("size", [*range(1, 40), 63, 64, 65, 127, 997, 4096, 4097, 65535, 65537])
def test_permute_is_bijective(size):
    keys = np.full(size, 99, np.uint64)
    image = permute(np.arange(size), np.full(size, size), keys)
    assert sorted(image.tolist()) == list(range(size))
    np.testing.assert_array_equal(unpermute(image, np.full(size, size), keys), np.arange(size))


def test_permute_reaches_large_sizes():
    size = 10**12 + 39
    positions = np.arange(1000) * 10**9
    image = permute(positions, np.full(1000, size), np.full(1000, 5, np.uint64))
    assert len(set(image.tolist())) == 1000
    assert image.min() >= 0
    assert image.max() < size
    assert abs(image.mean() / size - 0.5) < 0.05
    np.testing.assert_array_equal(unpermute(image, np.full(1000, size), np.full(1000, 5, np.uint64)), positions)


@pytest.mark.parametrize("units", [[1], [2], [5, 3], [101, 50, 7], [70000, 3]])
def test_every_epoch_has_every_unit_once(units):
    order = SampleOrder(3, units, [1.0] * len(units))
    sources, found, epochs = order.locate(np.arange(150_000 if max(units) > 1000 else 3000))
    for k, n in enumerate(units):
        mine, draws = found[sources == k], epochs[sources == k]
        assert np.all(np.diff(draws) >= 0), "epochs follow one another"
        whole = len(mine) // n
        assert whole >= 1
        assert draws.tolist() == (np.arange(len(mine)) // n).tolist()
        table = np.sort(mine[: whole * n].reshape(whole, n), axis=1)
        np.testing.assert_array_equal(table, np.tile(np.arange(n), (whole, 1)))


def first_epoch(seed, units, source, epoch=0):
    sources, found, epochs = SampleOrder(seed, units, [1.0] * len(units)).locate(np.arange(2000))
    return found[(sources == source) & (epochs == epoch)].tolist()


def test_seeds_sources_and_epochs_differ():
    orders = [
        first_epoch(1, [100, 100], 0),
        first_epoch(1, [100, 100], 1),
        first_epoch(1, [100, 100], 0, epoch=1),
        first_epoch(2, [100, 100], 0),
    ]
    assert all(sorted(order) == list(range(100)) for order in orders)
    for i, a in enumerate(orders):
        for b in orders[:i]:
            assert sum(x == y for x, y in zip(a, b, strict=True)) < 10


@pytest.mark.parametrize("weights", [[1, 1], [0.7, 0.2, 0.1], [3, 5, 7, 11], [0.999, 0.001], [1, 0, 1]])
def test_weights_hold_in_every_prefix(weights):
    sources, _, _ = SampleOrder(11, [100] * len(weights), weights).locate(np.arange(100_000))
    share = np.array(weights) / sum(weights)
    prefix = np.arange(1, 100_001)
    for k in range(len(weights)):
        drift = np.abs(np.cumsum(sources == k) - prefix * share[k])
        assert drift.max() <= (k + 1) / 2 + 1e-6


def test_no_unit_repeats_before_its_epoch_ends_though_weights_change():
    order = SampleOrder(4, [30, 50], [1, 1], [Segment(20, (5, 1)), Segment(33, (0, 1)), Segment(90, (2, 3))])
    sources, units, epochs = order.locate(np.arange(500))
    for k, n in enumerate([30, 50]):
        mine = units[sources == k]
        assert epochs[sources == k].tolist() == (np.arange(len(mine)) // n).tolist()
        for epoch in range(len(mine) // n):
            assert sorted(mine[epoch * n : (epoch + 1) * n].tolist()) == list(range(n))


def test_back_from_a_unit_to_its_samples():
    order = SampleOrder(9, [40, 7], [3, 1], [Segment(100, (1, 1))])
    sources, units, epochs = order.locate(np.arange(400))
    for k, n in enumerate([40, 7]):
        for unit in range(n):
            found, its_epochs = order.samples_of(k, unit, 400)
            np.testing.assert_array_equal(found, np.flatnonzero((sources == k) & (units == unit)))
            np.testing.assert_array_equal(its_epochs, epochs[found])
    with pytest.raises(IndexError, match="unit 7 of source 1, which has 7"):
        order.samples_of(1, 7, 400)


@pytest.mark.parametrize("weights", [[-1, 2], [math.nan, 1], [math.inf, 1], [0, 0], []])
def test_unfit_weights(weights):
    with pytest.raises(DataError, match="weights"):
        SampleOrder(0, [10] * len(weights), weights)


def test_other_unfit_arguments():
    with pytest.raises(DataError, match="2 sources but 1 weights"):
        SampleOrder(0, [10, 10], [1.0])
    with pytest.raises(DataError, match="no units"):
        SampleOrder(0, [10, 0], [1.0, 1.0])
    with pytest.raises(DataError, match="no units"):
        SampleOrder(0, [10, 0], [1.0, 0.0], [Segment(9, (1.0, 1e-9))])
    with pytest.raises(IndexError):
        SampleOrder(0, [10], [1.0]).locate([-1])
    SampleOrder(0, [10, 0], [1.0, 0.0])


def test_indices_in_any_order_and_number():
    order = SampleOrder(5, [50, 60], [1, 2])
    whole = np.stack(order.locate(np.arange(500)))
    rng = np.random.default_rng(0)
    picked = rng.integers(0, 500, 200)
    np.testing.assert_array_equal(np.stack(order.locate(picked)), whole[:, picked])
    assert all(len(a) == 0 for a in order.locate([]))


@pytest.mark.parametrize("size", [3, 4, 5])
def test_permutations_are_uniform(size):
    """Chi-square over all size! orders of an epoch; 5 standard deviations of its distribution are allowed."""
    epochs = 300 * math.factorial(size)
    _, units, _ = SampleOrder(7, [size], [1.0]).locate(np.arange(size * epochs))
    counts = Counter(map(tuple, units.reshape(-1, size).tolist()))
    expected = epochs / math.factorial(size)
    assert len(counts) == math.factorial(size)
    chi = sum((count - expected) ** 2 / expected for count in counts.values())
    freedom = math.factorial(size) - 1
    assert abs(chi - freedom) < 5 * math.sqrt(2 * freedom)


def test_positions_and_neighbours_are_uniform():
    """Where a unit lands in an epoch, and how far neighbours land from each other, over 1000 units and 400 epochs."""
    n, epochs = 1000, 400
    _, units, _ = SampleOrder(21, [n], [1.0]).locate(np.arange(n * epochs))
    table = units.reshape(epochs, n)
    coarse = np.histogram2d(np.tile(np.arange(n), epochs), units, bins=(20, 20))[0]
    expected = n * epochs / 400
    # Rows and columns of the table are fixed, which leaves 19 x 19 degrees of freedom.
    chi = float(((coarse - expected) ** 2 / expected).sum())
    assert abs(chi - 361) < 5 * math.sqrt(2 * 361)
    steps = np.histogram(np.diff(table, axis=1) % n, bins=20, range=(0, n))[0]
    assert np.abs(steps / steps.mean() - 1).max() < 0.03


def test_neighbours_in_time_are_not_correlated():
    """Serial correlation of the units of one long epoch, at several distances: 4 standard deviations are allowed."""
    n = 200_000
    _, units, _ = SampleOrder(5, [n], [1.0]).locate(np.arange(n))
    centred = units - units.mean()
    for lag in (1, 2, 3, 64, 447, 448, 1000):  # 448 is the root of n, a side of the Feistel network's square
        correlation = float((centred[:-lag] * centred[lag:]).mean() / (centred**2).mean())
        assert abs(correlation) < 4 / math.sqrt(n)


def test_a_random_function_of_any_size_is_a_bijection():
    """Sizes that nobody chose: random ones up to 5,000, with random keys."""
    rng = np.random.default_rng(8)
    for size in rng.integers(1, 5000, 60).tolist():
        image = permute(np.arange(size), np.full(size, size), np.full(size, rng.integers(2**63), np.uint64))
        assert np.bincount(image, minlength=size).tolist() == [1] * size


def test_speed():
    order = SampleOrder(1, [10**9, 10**6], [1, 1])
    start = time.perf_counter()
    order.locate(np.arange(10**12, 10**12 + 100_000))
    assert time.perf_counter() - start < 1  # 0.5 microseconds a sample when measured; leave room for a busy machine
