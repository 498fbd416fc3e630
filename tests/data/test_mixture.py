"""Which source a sample comes from, against counting in exact fractions."""

import random
from fractions import Fraction

import numpy as np
import pytest

from megalite.data.mixture import Mixture, Segment
from megalite.errors import DataError


def random_segments(rng: random.Random) -> list[Segment]:
    """Up to 6 segments of up to 6 sources; weights from nothing over a millionth to all."""
    num_sources, num_segments = rng.randint(1, 6), rng.randint(1, 6)
    segments = []
    for start in [0, *sorted(rng.sample(range(1, 250), num_segments - 1))]:
        weights = [0.0]
        while not any(weights):
            weights = [rng.choice([0, 0, 1, 5, rng.random(), 1e-6 * rng.random()]) for _ in range(num_sources)]
        segments.append(Segment(start, tuple(weights)))
    return segments


def ideal_counts(segments: list[Segment], num_samples: int) -> list[list[Fraction]]:
    """The sum of the segments' shares after 0, 1, .. `num_samples` samples, of each source."""
    counts = [[Fraction(0)] * len(segments[0].weights)]
    for sample in range(num_samples):
        weights = [Fraction(w) for w in next(s for s in reversed(segments) if s.start <= sample).weights]
        counts.append([before + w / sum(weights) for before, w in zip(counts[-1], weights, strict=True)])
    return counts


@pytest.mark.parametrize("seed", range(16))
def test_every_prefix_holds_every_source_to_its_share(seed):
    segments = random_segments(random.Random(seed))
    mixture, length = Mixture(segments), 300
    sources, draws = mixture.locate(np.arange(length))
    counts = np.zeros((length + 1, len(segments[0].weights)), np.int64)
    for sample, source in enumerate(sources.tolist()):
        assert draws[sample] == counts[sample, source], "draws of a source follow one another"
        counts[sample + 1] = counts[sample]
        counts[sample + 1, source] += 1
    for k in range(counts.shape[1]):
        drift = max(
            abs(int(n) - ideal[k]) for n, ideal in zip(counts[:, k], ideal_counts(segments, length), strict=True)
        )
        assert drift <= Fraction(k + 1, 2) + Fraction(1, 10**9)
        last = counts[-1, k]
        expected = [*np.flatnonzero(sources == k), length, length]
        np.testing.assert_array_equal(mixture.sample_of(k, np.arange(last + 2), length), expected)
    for prefix in (0, 1, 17, length):
        np.testing.assert_array_equal(mixture.counts(prefix), counts[prefix])


@pytest.mark.parametrize("weights", [(0.5, 0.3, 0.2), (1.0, 1e-9), (1 / 3, 1 / 3, 1 / 3), (7, 0, 1, 1)])
@pytest.mark.parametrize("at", [10**9 + 7, 10**12, 2**60])
def test_shares_hold_however_far_the_run_is(weights, at):
    """Counts of the closed form, and the samples around them."""
    mixture = Mixture([Segment(0, weights)])
    counts = mixture.counts(at)
    assert counts.sum() == at
    total = sum(map(Fraction, weights))
    for k, weight in enumerate(weights):
        assert abs(int(counts[k]) - Fraction(weight) / total * at) <= len(weights) / 2 + 0.1
    sources, draws = mixture.locate(np.arange(at, at + 100))
    for source, draw in zip(sources.tolist(), draws.tolist(), strict=True):
        assert draw == counts[source]
        counts[source] += 1
    np.testing.assert_array_equal(mixture.counts(at + 100), counts)


def test_draws_go_on_where_weights_change():
    mixture = Mixture([Segment(0, (1, 1)), Segment(10, (1, 0)), Segment(14, (1, 3))])
    sources, draws = mixture.locate(np.arange(30))
    assert sources[:14].tolist() == [0, 1] * 5 + [0] * 4
    assert draws[10:14].tolist() == [5, 6, 7, 8]
    assert draws[sources == 1].tolist() == list(range(5 + 12))
    assert np.bincount(sources[14:]).tolist() == [4, 12]


@pytest.mark.parametrize(
    ("segments", "message"),
    [
        ([], "begins at sample 0"),
        ([Segment(1, (1,))], "begins at sample 0"),
        ([Segment(0, (1,)), Segment(5, (1,)), Segment(5, (1,))], "at sample 5 follows one at 5"),
        ([Segment(0, (1, 1)), Segment(5, (1,))], "2 sources but 1 weights from sample 5"),
        ([Segment(0, (1, 1)), Segment(5, (0, 0))], r"weights \[0, 0\]: .* data.schedule"),
    ],
)
def test_unfit_segments(segments, message):
    with pytest.raises(DataError, match=message):
        Mixture(segments)
