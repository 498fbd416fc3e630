"""The order of samples, in closed form: which unit of which source the i-th sample of a run is.

Nothing is built, stored or shared: a run resumes from the number of samples it has consumed, and the order does not
know how many ranks there are. Two maps make it:

1. sample -> (source k, its j-th draw). Samples come in blocks of 2^16, in which source k owns `slots[k]` places, its
   share by largest remainder. The places of a source are spread evenly: its r-th one sits at time (r + u) / slots[k]
   with u uniform in [0, 1) (stratified sampling), so every batch, not only the whole run, holds the sources close to
   their weights.
2. draw j -> (epoch e = j // n, unit). The unit is a permutation of j % n keyed by (seed, k, e): a Feistel network over
   pairs (l, r) in Z_a x Z_b with a * b just above n, walked until it falls below n (generalized Feistel and cycle
   walking: Black and Rogaway, "Ciphers with Arbitrary Finite Domains", 2002). Each epoch has every unit once.

The numbers are frozen by a test: a change here changes what every saved run trains on next.
"""

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

from megalite.errors import DataError

BLOCK = 1 << 16
_MIN_FACTOR = 8  # of the domain a * b; below it a small source has too few round functions to be shuffled well
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)  # 2^64 / golden ratio: the increment of SplitMix64
_MIX_1 = np.uint64(0xBF58476D1CE4E5B9)
_MIX_2 = np.uint64(0x94D049BB133111EB)
_ROUNDS = 6
_ROUND_KEYS = np.arange(1, _ROUNDS + 1, dtype=np.uint64) * _GOLDEN  # wrapping modulo 2^64
_TIMES, _UNITS = 1, 2  # streams of hashes: where slots sit, how units are permuted

_U64 = NDArray[np.uint64]
_I64 = NDArray[np.int64]


class SampleOrder:
    """The order over several sources with blend weights; `i -> (source, unit, epoch)`."""

    def __init__(self, seed: int, num_units: Sequence[int], weights: Sequence[float]):
        """`num_units[k]`: units (windows, documents, bins) of source k; `weights[k]`: its share, any positive scale.

        A weight of 0 leaves a source out. Raises `DataError` for weights that are negative, not finite or all zero, too
        small to own one sample in 65,536, and for a source without units.
        """
        if len(num_units) != len(weights):
            raise DataError(f"{len(num_units)} sources but {len(weights)} weights")
        self.num_units = np.array(num_units, np.int64)
        self.slots = np.array(_slots_per_block(weights), np.int64)
        for k, (n, slots, weight) in enumerate(zip(num_units, self.slots, weights, strict=True)):
            if slots == 0 and weight > 0:
                raise DataError(
                    f"source {k} has weight {weight}, less than one sample in {BLOCK}: raise it, or set it to 0"
                )
            if slots and n < 1:
                raise DataError(f"source {k} has weight {weight} but no units to draw")
        self._seed_key = _mix(np.array([seed % 2**64], np.uint64))
        self._source_of_slot, self._rank_of_slot = self._spread_slots()

    def locate(self, indices: ArrayLike) -> tuple[_I64, _I64, _I64]:
        """Sources, units and epochs of the samples `indices` [N], each [N] int64. Any order, any gaps."""
        i = np.asarray(indices, np.int64)
        if len(i) and i.min() < 0:
            raise IndexError(f"sample {i.min()}: samples count from 0")
        block, slot = np.divmod(i, BLOCK)
        sources = self._source_of_slot[slot]
        sizes = self.num_units[sources]
        epochs, positions = np.divmod(block * self.slots[sources] + self._rank_of_slot[slot], sizes)
        return sources, permute(positions, sizes, self._hash(_UNITS, sources, epochs)), epochs

    def _spread_slots(self) -> tuple[_I64, _I64]:
        """Source and rank (how many slots of the same source came before) of each slot of a block, both [BLOCK]."""
        sources = np.repeat(np.arange(len(self.slots)), self.slots)
        ranks = np.concatenate([np.arange(n) for n in self.slots])
        jitter = (self._hash(_TIMES, sources, ranks) >> np.uint64(11)).astype(np.float64) * 2.0**-53
        order = np.argsort((ranks + jitter) / self.slots[sources], kind="stable")
        return sources[order], ranks[order]

    def _hash(self, stream: int, sources: _I64, counters: _I64) -> _U64:
        """64 bits for each (source, counter) pair, [N]; another seed or stream gives unrelated ones."""
        keys = _mix(self._seed_key + sources.astype(np.uint64))
        return _mix(_mix(keys + np.uint64(stream)) + counters.astype(np.uint64))


def permute(positions: _I64, sizes: _I64, keys: _U64) -> _I64:
    """Keyed permutations: the image of `positions` in 0 .. size - 1, each [N] with its own size and key."""
    size = sizes.astype(np.uint64)
    a = np.maximum(np.ceil(np.sqrt(size)).astype(np.uint64), np.uint64(_MIN_FACTOR))
    b = np.maximum((size + a - np.uint64(1)) // a, np.uint64(_MIN_FACTOR))
    values = positions.astype(np.uint64)
    walking = np.arange(len(values))
    while len(walking):
        values[walking] = _feistel(values[walking], a[walking], b[walking], keys[walking])
        walking = walking[values[walking] >= size[walking]]
    return values.astype(np.int64)


def _feistel(values: _U64, a: _U64, b: _U64, keys: _U64) -> _U64:
    """A bijection of 0 .. a * b - 1: a value l * b + r, its halves shifted in turn by a hash of the other."""
    left, right = np.divmod(values, b)
    for round_ in range(0, _ROUNDS, 2):
        left = (left + _mix(keys + right + _ROUND_KEYS[round_])) % a
        right = (right + _mix(keys + left + _ROUND_KEYS[round_ + 1])) % b
    return left * b + right


def _mix(values: _U64) -> _U64:
    """The output function of SplitMix64 (Steele, Lea and Flood 2014): a bijection of 64 bits that scatters them."""
    values = values + _GOLDEN
    values = (values ^ (values >> np.uint64(30))) * _MIX_1
    values = (values ^ (values >> np.uint64(27))) * _MIX_2
    return values ^ (values >> np.uint64(31))


def _slots_per_block(weights: Sequence[float]) -> list[int]:
    """Whole slots for each source that add up to BLOCK, by largest remainder (ties to the earlier source)."""
    if not all(math.isfinite(w) and w >= 0 for w in weights) or not any(weights):
        raise DataError(
            f"blend weights {list(weights)}: each must be a finite number >= 0, and one of them more than 0; "
            "change the weights in data.train"
        )
    total = math.fsum(weights)
    quotas = [weight / total * BLOCK for weight in weights]
    slots = [math.floor(quota) for quota in quotas]
    by_remainder = sorted(range(len(quotas)), key=lambda k: (slots[k] - quotas[k], k))
    for k in by_remainder[: BLOCK - sum(slots)]:
        slots[k] += 1
    return slots
