"""Which source the i-th sample of a run comes from, and its how-manieth draw that is: a closed form.

A run is made of segments, each with weights of its own. Let A_k(N) be what source k should have given after N samples:
the sum over segments of their lengths times its share. Sources are taken out one after the other. Of the N samples,
R_1(N) = round(N - A_1(N)) do not come from source 1; of those R, h_2(R) do not come from source 2 either; and so on.
h_l is the line, broken where segments begin, that maps B_{l-1} to B_l with B_l = N - A_1 - .. - A_l, rounded to a whole
number. Its slope lies between 0 and 1, so each sample either goes on to the next level or belongs to the source of this
one, and the number of draws before it is known: nothing is counted up from the start.

Each level rounds by at most 1/2 and passes on what comes to it no larger, so that for every N and every source

    |draws of source k among the first N - A_k(N)| <= k / 2   (k from 1), whatever the number of segments.

The lines are kept in fixed point (64 bits below the point) and are exact as they stand: they differ from the weights'
own by less than N * 2^-64.
"""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

import numpy as np
from numpy.typing import NDArray

from megalite.errors import DataError

_U64 = NDArray[np.uint64]
_I64 = NDArray[np.int64]

_ONE = 1 << 64
_HALF = _ONE // 2 - 1  # a tie stays with the earlier source
_LOW = np.uint64(0xFFFFFFFF)
_SHIFT = np.uint64(32)


@dataclass(frozen=True)
class Segment:
    """Samples from `start` on, up to the next segment, are drawn by `weights`, one for each source, of any scale."""

    start: int
    weights: tuple[float, ...]


class Mixture:
    """`sample -> (source, draw)` and back."""

    def __init__(self, segments: Sequence[Segment]):
        """The first segment starts at sample 0. Raises `DataError` for unfit weights, and starts that do not rise."""
        _check(segments)
        self.num_sources = len(segments[0].weights)
        self._levels = _levels(segments)

    def locate(self, samples: _I64) -> tuple[_I64, _I64]:
        """Sources and draws of `samples` [N] >= 0, each [N]: the sample is its source's `draw`-th, counted from 0."""
        sources = np.zeros(len(samples), np.int64)
        draws = np.array(samples, np.int64)
        left = np.arange(len(samples))  # those whose source is not known yet
        for level in self._levels:
            before = level.rest(draws[left])
            goes_on = level.rest(draws[left] + 1) > before
            here = left[~goes_on]
            draws[here] -= before[~goes_on]
            left = left[goes_on]
            draws[left] = before[goes_on]
            sources[left] += 1
        return sources, draws

    def counts(self, num_samples: int) -> _I64:
        """Draws of each source among the first `num_samples`: [num_sources]."""
        left, counts = np.array([num_samples]), []
        for level in self._levels:
            rest = level.rest(left)
            counts.append(left - rest)
            left = rest
        return np.concatenate([*counts, left])

    def sample_of(self, source: int, draws: _I64, limit: int) -> _I64:
        """The sample that is the `draws`-th [N] of `source`: [N]; `limit` where that is `limit` or later."""
        low = np.zeros(len(draws), np.int64)  # so many samples hold `draws` of it at most
        high = np.full(len(draws), limit, np.int64)
        while np.any(low < high):
            middle = (low + high) // 2
            enough = self._count_of(source, middle + 1) > draws
            low, high = np.where(enough, low, np.minimum(middle + 1, high)), np.where(enough, middle, high)
        return low

    def _count_of(self, source: int, num_samples: _I64) -> _I64:
        left = num_samples
        for number, level in enumerate(self._levels):
            rest = level.rest(left)
            if number == source:
                return left - rest
            left = rest
        return left


class _Level:
    """One broken line: of the first n samples that reach this level, `rest(n)` go on to the next."""

    def __init__(self, pieces: Sequence[tuple[int, int, int]]):
        """`pieces`: (start, value there, slope), value and slope in units of 2^-64; slope 2^64 is 1."""
        self._starts = np.array([start for start, _, _ in pieces], np.int64)
        self._whole = np.array([value >> 64 for _, value, _ in pieces], np.int64)
        self._parts = np.array([value % _ONE for _, value, _ in pieces], np.uint64)
        self._slopes = np.array([slope % _ONE for _, _, slope in pieces], np.uint64)
        self._is_one = np.array([slope == _ONE for _, _, slope in pieces])

    def rest(self, n: _I64) -> _I64:
        """Exact for n [N] below 2^63."""
        piece = np.searchsorted(self._starts, n, side="right") - 1
        steps = n - self._starts[piece]
        high, low = _multiply(self._slopes[piece], steps.astype(np.uint64))
        parts = self._parts[piece]
        carry = low + parts < parts
        high = np.where(self._is_one[piece], steps, high.astype(np.int64) + carry)
        return self._whole[piece] + high


def _multiply(a: _U64, b: _U64) -> tuple[_U64, _U64]:
    """The upper and the lower 64 bits of a * b."""
    a_high, a_low, b_high, b_low = a >> _SHIFT, a & _LOW, b >> _SHIFT, b & _LOW
    low = a_low * b_low
    middle = a_high * b_low + (low >> _SHIFT)
    cross = a_low * b_high + (middle & _LOW)
    return a_high * b_high + (middle >> _SHIFT) + (cross >> _SHIFT), a * b


def _levels(segments: Sequence[Segment]) -> list[_Level]:
    """One for each source but the last."""
    shares = [_shares(segment.weights) for segment in segments]
    starts = [Fraction(segment.start) for segment in segments]  # B of the level before, where each segment begins
    levels = []
    for source in range(len(shares[0]) - 1):
        slopes = []
        for share in shares:
            left = sum(share[source:])
            # Where nothing is left for this level nothing reaches it either, and any slope does.
            slopes.append(min(_ONE, int(sum(share[source + 1 :]) / left * _ONE)) if left else 0)
        levels.append(_Level(_pieces(starts, slopes)))
        starts = _values(starts, slopes)
    return levels


def _values(starts: list[Fraction], slopes: list[int]) -> list[Fraction]:
    """The line's value at each start; at the first it is 0."""
    values = [Fraction(0)]
    for i in range(1, len(starts)):
        values.append(values[-1] + (starts[i] - starts[i - 1]) * slopes[i - 1] / _ONE)
    return values


def _pieces(starts: list[Fraction], slopes: list[int]) -> list[tuple[int, int, int]]:
    """The line between whole numbers: (start, value in units of 2^-64, slope), so that whole steps grow by 0 or 1."""
    pieces = [(0, _HALF, slopes[0])]
    for start, value, slope in zip(starts[1:], _values(starts, slopes)[1:], slopes[1:], strict=True):
        first = math.ceil(start)
        if first == pieces[-1][0]:
            pieces.pop()  # a piece without a whole number in it
        exact = int((value * _ONE) + (first - start) * slope) + _HALF
        if pieces:
            # Cut to 64 bits, it must not fall below its predecessor.
            before, at_start, slope_before = pieces[-1]
            exact = max(exact, at_start + (first - 1 - before) * slope_before)
        pieces.append((first, exact, slope))
    return pieces


def _shares(weights: Sequence[float]) -> list[Fraction]:
    total = sum(map(Fraction, weights))
    return [Fraction(weight) / total for weight in weights]


def _check(segments: Sequence[Segment]) -> None:
    if not segments or segments[0].start != 0:
        raise DataError("the first segment of a blend begins at sample 0")
    for before, segment in itertools.pairwise(segments):
        if segment.start <= before.start:
            raise DataError(f"a segment at sample {segment.start} follows one at {before.start}: starts must increase")
    for segment in segments:
        weights = list(segment.weights)
        if len(weights) != len(segments[0].weights):
            raise DataError(
                f"{len(segments[0].weights)} sources but {len(weights)} weights from sample {segment.start}"
            )
        if not all(math.isfinite(w) and w >= 0 for w in weights) or not any(weights):
            raise DataError(
                f"blend weights {weights}: each must be a finite number >= 0, and one of them more than 0; change the "
                "weights in data.train or data.schedule"
            )
