"""The order of samples, in closed form: which unit of which source the i-th sample of a run is.

Nothing is built, stored or shared: a run resumes from the number of samples it has consumed, and the order does not
know how many ranks there are. Two maps make it:

1. sample -> (source k, its j-th draw): `mixture.py`. Every batch, not only the whole run, holds the sources close to
   their weights, and where the weights change a source's draws go on.
2. draw j -> (epoch e = j // n, unit). The unit is a permutation of j % n keyed by (seed, k, e): a Feistel network over
   pairs (l, r) in Z_a x Z_b with a * b just above n, walked until it falls below n (generalized Feistel and cycle
   walking: Black and Rogaway, "Ciphers with Arbitrary Finite Domains", 2002). Each epoch has every unit once.

Both can be asked backwards. The numbers are frozen by a test: a change here changes what every saved run trains on
next.
"""

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

from megalite.data.mixture import Mixture, Segment
from megalite.errors import DataError

_MIN_FACTOR = 8  # of the domain a * b; below it a small source has too few round functions to be shuffled well
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)  # 2^64 / golden ratio: the increment of SplitMix64
_MIX_1 = np.uint64(0xBF58476D1CE4E5B9)
_MIX_2 = np.uint64(0x94D049BB133111EB)
_ROUNDS = 6
_ROUND_KEYS = np.arange(1, _ROUNDS + 1, dtype=np.uint64) * _GOLDEN  # wrapping modulo 2^64
_UNITS = 2  # the stream of hashes that units are permuted by

_U64 = NDArray[np.uint64]
_I64 = NDArray[np.int64]


class SampleOrder:
    """The order over several sources with blend weights; `i -> (source, unit, epoch)`."""

    def __init__(self, seed: int, num_units: Sequence[int], weights: Sequence[float], later: Sequence[Segment] = ()):
        """`num_units[k]`: units (windows, documents, bins) of source k; `weights[k]`: its share, any positive scale.

        `later`: segments with other weights, by the samples they begin at. A weight of 0 leaves a source out, but
        for one sample where weights change. Raises `DataError` for unfit weights or segments, and for a source that is
        to be drawn from but has no units.
        """
        if len(num_units) != len(weights):
            raise DataError(f"{len(num_units)} sources but {len(weights)} weights")
        segments = [Segment(0, tuple(weights)), *later]
        self.num_units = np.array(num_units, np.int64)
        self.mixture = Mixture(segments)
        for k, n in enumerate(num_units):
            weight = max(segment.weights[k] for segment in segments)
            if weight > 0 and n < 1:
                raise DataError(f"source {k} has weight {weight} but no units to draw")
        self._seed_key = _mix(np.array([seed % 2**64], np.uint64))

    def locate(self, indices: ArrayLike) -> tuple[_I64, _I64, _I64]:
        """Sources, units and epochs of the samples `indices` [N], each [N] int64. Any order, any gaps."""
        i = np.asarray(indices, np.int64)
        if len(i) and i.min() < 0:
            raise IndexError(f"sample {i.min()}: samples count from 0")
        sources, draws = self.mixture.locate(i)
        sizes = self.num_units[sources]
        epochs, positions = np.divmod(draws, sizes)
        return sources, permute(positions, sizes, self._hash(_UNITS, sources, epochs)), epochs

    def samples_of(self, source: int, unit: int, limit: int) -> tuple[_I64, _I64]:
        """Every sample below `limit` that is this unit of this source, in order, and the epoch of each."""
        size = self.num_units[source]
        if not 0 <= unit < size:
            raise IndexError(f"unit {unit} of source {source}, which has {size}")
        epochs = np.arange(-(-self.mixture.counts(limit)[source] // size), dtype=np.int64)
        sizes = np.full(len(epochs), size)
        keys = self._hash(_UNITS, np.full(len(epochs), source), epochs)
        positions = unpermute(np.full(len(epochs), unit), sizes, keys)
        samples = self.mixture.sample_of(source, epochs * size + positions, limit)
        return samples[samples < limit], epochs[samples < limit]

    def _hash(self, stream: int, sources: _I64, counters: _I64) -> _U64:
        """64 bits for each (source, counter) pair, [N]; another seed or stream gives unrelated ones."""
        keys = _mix(self._seed_key + sources.astype(np.uint64))
        return _mix(_mix(keys + np.uint64(stream)) + counters.astype(np.uint64))


def permute(positions: _I64, sizes: _I64, keys: _U64) -> _I64:
    """Keyed permutations: the image of `positions` in 0 .. size - 1, each [N] with its own size and key."""
    return _walk(_feistel, positions, sizes, keys)


def unpermute(images: _I64, sizes: _I64, keys: _U64) -> _I64:
    """The inverse of `permute`: the positions that `images` came from."""
    return _walk(_unfeistel, images, sizes, keys)


def _walk(step: Callable[[_U64, _U64, _U64, _U64], _U64], positions: _I64, sizes: _I64, keys: _U64) -> _I64:
    """Apply a bijection of 0 .. a * b - 1 until the value falls below the size: a bijection of 0 .. size - 1."""
    size = sizes.astype(np.uint64)
    a = np.maximum(np.ceil(np.sqrt(size)).astype(np.uint64), np.uint64(_MIN_FACTOR))
    b = np.maximum((size + a - np.uint64(1)) // a, np.uint64(_MIN_FACTOR))
    values = positions.astype(np.uint64)
    walking = np.arange(len(values))
    while len(walking):
        values[walking] = step(values[walking], a[walking], b[walking], keys[walking])
        walking = walking[values[walking] >= size[walking]]
    return values.astype(np.int64)


def _feistel(values: _U64, a: _U64, b: _U64, keys: _U64) -> _U64:
    """A bijection of 0 .. a * b - 1: a value l * b + r, its halves shifted in turn by a hash of the other."""
    left, right = np.divmod(values, b)
    for round_ in range(0, _ROUNDS, 2):
        left = (left + _mix(keys + right + _ROUND_KEYS[round_]) % a) % a  # twice: the sum must not pass 2^64
        right = (right + _mix(keys + left + _ROUND_KEYS[round_ + 1]) % b) % b
    return left * b + right


def _unfeistel(values: _U64, a: _U64, b: _U64, keys: _U64) -> _U64:
    """The inverse of `_feistel`: the shifts taken back, last first."""
    left, right = np.divmod(values, b)
    for round_ in range(_ROUNDS - 2, -1, -2):
        right = (right + b - _mix(keys + left + _ROUND_KEYS[round_ + 1]) % b) % b
        left = (left + a - _mix(keys + right + _ROUND_KEYS[round_]) % a) % a
    return left * b + right


def _mix(values: _U64) -> _U64:
    """The output function of SplitMix64 (Steele, Lea and Flood 2014): a bijection of 64 bits that scatters them."""
    values = values + _GOLDEN
    values = (values ^ (values >> np.uint64(30))) * _MIX_1
    values = (values ^ (values >> np.uint64(27))) * _MIX_2
    return values ^ (values >> np.uint64(31))
